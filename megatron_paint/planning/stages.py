"""Which layers each pipeline stage has, and in which chunks: Megatron-Core's rules, from the settings alone.

A virtual pipeline gives each stage several chunks of layers. The layers go through the first chunk of every stage, then
through the second chunk of every stage, and so on. Layers, stages and chunks are counted from 0.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.models.shape import ModelShape

PIPELINE, VIRTUAL = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
LAYOUT = "pipeline_model_parallel_layout"
RULES = (PIPELINE, VIRTUAL, FIRST, LAST, EMBEDDING, LOSS)  # what divides the layers where no layout is written
DIVIDING = (FIRST, LAST, EMBEDDING, LOSS, LAYOUT)  # what divides the layers among stages by other rules than evenly


@dataclass(frozen=True, kw_only=True)
class LayerSplit:
    """The layers of each chunk of each stage."""

    layers: tuple[tuple[range, ...], ...]  # [stage][chunk]

    @property
    def chunks(self) -> int:
        """The number of chunks on each stage; 1 without a virtual pipeline."""
        return len(self.layers[0])

    @property
    def most(self) -> int:
        """Layers of the stage that has most."""
        return max(map(self.count, range(len(self.layers))))

    def sizes(self, stage: int) -> tuple[int, ...]:
        """Layers in each chunk of a stage."""
        return tuple(map(len, self.layers[stage]))

    def count(self, stage: int) -> int:
        """Layers of a stage."""
        return sum(self.sizes(stage))

    def __str__(self) -> str:
        """As in `4 layers a stage`, `4 layers a stage in 2 chunks` and `4, 3 layers on the stages`."""
        sizes = [self.sizes(stage) for stage in range(len(self.layers))]
        chunks = f" in {self.chunks} chunks" if self.chunks > 1 else ""
        if len({size for stage in sizes for size in stage}) == 1:
            return f"{count_text(self.most, 'layer')} a stage{chunks}"
        return f"{', '.join('+'.join(map(str, stage)) for stage in sizes)} layers on the stages{chunks}"


def chunks_a_stage(megatron: MegatronSettings) -> int:
    """How many chunks of layers each stage has; 1: no virtual pipeline. UserError: the layout has no such number."""
    if megatron.pipeline_model_parallel_layout is not None:
        return len(_layout_rows(megatron)) // megatron.pipeline_model_parallel_size
    return megatron.virtual_pipeline_model_parallel_size or 1


def split_layers(shape: ModelShape, megatron: MegatronSettings) -> LayerSplit:
    """The layers of every stage. UserError names the setting that does not fit the model, and the nearest value."""
    if megatron.pipeline_model_parallel_layout is not None:
        sizes = _sizes_of_layout(shape, megatron)
    else:
        try:
            sizes = _sizes(shape, megatron)
        except _Unfit as unfit:
            value = getattr(megatron, unfit.setting)
            instead = _instead(shape, tuple(getattr(megatron, name) for name in RULES), unfit.setting)
            raise UserError(f"megatron.{unfit.setting}={value} {unfit}; {instead}") from None
    begins = [0]
    for chunk in range(len(sizes[0])):
        for stage in sizes:
            begins.append(begins[-1] + stage[chunk])
    ranges = [range(*pair) for pair in pairwise(begins)]  # in the order of the layers
    return LayerSplit(layers=tuple(tuple(ranges[stage :: len(sizes)]) for stage in range(len(sizes))))


def in_flight(split: LayerSplit, stage: int, *, micro_batches: int) -> tuple[int, ...]:
    """For each chunk of a stage: of how many micro-batches it holds activations when the stage holds most.

    Megatron's schedules: forward passes first, fewer on later stages, then one forward and one backward pass in turn.
    """
    stages, chunks = len(split.layers), split.chunks
    if chunks == 1:
        return (min(stages - stage, micro_batches),)
    micro_batches = min(micro_batches, 4 * stages)  # from then on the numbers repeat
    padded = -(-micro_batches // stages) * stages
    order = [  # of the forward passes: as many micro-batches as stages, through one chunk after another
        (chunk, number)
        for first in range(0, padded, stages)
        for chunk in range(chunks)
        for number in range(first, first + stages)
    ]
    before = 2 * (stages - stage - 1) + (chunks - 1) * stages
    sizes, held = split.sizes(stage), [0] * chunks
    most = tuple(held)
    for place, (chunk, number) in enumerate(order):
        held[chunk] += number < micro_batches  # the others are empty
        most = max(most, tuple(held), key=lambda counts: sum(map(int.__mul__, counts, sizes)))
        if place >= before:
            chunk, number = order[place - before]
            held[chunks - 1 - chunk] -= number < micro_batches
    return most


class _Unfit(ValueError):
    """A setting does not fit the number of layers. The text continues the sentence that begins with the setting."""

    def __init__(self, setting: str, text: str) -> None:
        super().__init__(text)
        self.setting = setting


def _sizes(shape: ModelShape, megatron: MegatronSettings) -> list[list[int]]:
    """Layers of each chunk of each stage: [stage][chunk]. _Unfit: the settings do not fit the number of layers."""
    virtual = megatron.virtual_pipeline_model_parallel_size or 1
    by_stage = _of_stages(shape, megatron)
    for stage, count in enumerate(by_stage):
        if count % virtual:
            end = {0: FIRST, len(by_stage) - 1: LAST}.get(stage)
            if end is not None and getattr(megatron, end) is not None:
                raise _Unfit(end, f"is no multiple of {VIRTUAL}={virtual}")
            raise _Unfit(VIRTUAL, f"does not divide the number of layers of a stage, {count}, of {shape.source}")
    sizes = [[count // virtual] * virtual for count in by_stage]
    sizes[0][0] -= megatron.account_for_embedding_in_pipeline_split
    sizes[-1][-1] -= megatron.account_for_loss_in_pipeline_split
    return sizes


def _of_stages(shape: ModelShape, megatron: MegatronSettings) -> list[int]:
    """Layers of each stage; embedding and loss count as one where the settings say so."""
    layers, pp = shape.num_layers, megatron.pipeline_model_parallel_size
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    if pp == 1 and (asked := [name for name in (VIRTUAL, *DIVIDING) if divides(megatron, name)]):
        raise _Unfit(asked[0], f"divides the layers among pipeline stages, and {PIPELINE}=1")
    if first is None and last is None:
        counted = [name for name in (EMBEDDING, LOSS) if getattr(megatron, name)]
        together = layers + len(counted)
        if together % pp:
            more = f" and {len(counted)} more for {' and '.join(counted)}" if counted else ""
            raise _Unfit(PIPELINE, f"does not divide the number of layers, {layers}, of {shape.source}{more}")
        return [together // pp] * pp
    ends = [count for count in (first, last) if count is not None]
    rest, between = layers - sum(ends), pp - len(ends)
    fits = rest == 0 if between == 0 else rest > 0 and rest % between == 0
    if not fits:
        and_last = f"and {LAST}={last} leave" if len(ends) == 2 else "leaves"
        others = f"{count_text(between, 'other stage')}, which get the same number each" if between else "no stage"
        raise _Unfit(
            LAST if first is None else FIRST,
            f"{and_last} {max(rest, 0):,} of the {count_text(layers, 'layer')} of {shape.source} for {others}",
        )
    middle = [rest // between] * between if between else []
    return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]


def divides(megatron: MegatronSettings, name: str) -> bool:
    """Whether a setting divides the layers otherwise than evenly among the stages."""
    value = getattr(megatron, name)
    return (value or 1) > 1 if name == VIRTUAL else value != getattr(MegatronSettings, name)


@lru_cache(maxsize=4096)
def _instead(shape: ModelShape, rules: tuple, setting: str) -> str:
    """What to set instead: the nearest value that fits. rules: the values of RULES.

    A search over layouts asks for the same ones many times.
    """
    megatron = MegatronSettings(**dict(zip(RULES, rules, strict=True)))

    def fits(value: int) -> bool:
        try:
            _sizes(shape, replace(megatron, **{setting: value}))
        except _Unfit:
            return False
        return True

    value = getattr(megatron, setting)
    if megatron.pipeline_model_parallel_size == 1 and setting != PIPELINE:
        return f"leave {setting} out"
    found = [other for other in range(1, shape.num_layers + 3) if fits(other)]
    if found:
        return f"the nearest that fits the model is {min(found, key=lambda other: (abs(other - value), other))}"
    return f"no value of it fits with the other settings of the pipeline: give the layers of each stage in {LAYOUT}"


_KINDS = {"E": "the embedding", "t": "a layer", "L": "the loss"}


def _layout_rows(megatron: MegatronSettings) -> list[str]:
    """The rows of the layout, with repetitions written out: each row is a chunk, stage by stage, chunk by chunk.

    UserError: the layout is not written in Megatron's way, or its rows do not fit the stages.
    """
    text, pp = megatron.pipeline_model_parallel_layout, megatron.pipeline_model_parallel_size
    name = f"megatron.{LAYOUT}={text!r}"
    written = text.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*(\d{1,4})", r"([^()*\d])\*(\d{1,4})"):
        written = re.sub(pattern, lambda found: found[1] * int(found[2]), written)
    if unknown := sorted(set(written) - {*_KINDS, "|"}):
        raise UserError(
            f"{name} has {unknown[0]!r}, which is not a known letter: E is the embedding, t a layer, L the loss; | "
            "begins the next chunk; x*3 or (xy)*3 repeats, as in 'Et*3|t*4L'"
        )
    rows = written.split("|")
    if len(rows) % pp:
        raise UserError(
            f"{name} has {count_text(len(rows), 'chunk')}, and megatron.{PIPELINE}={pp} stages need the same number "
            f"each: give {count_text(pp, 'chunk')}, or a multiple of it"
        )
    virtual, asked = len(rows) // pp, megatron.virtual_pipeline_model_parallel_size
    if asked is not None and asked != virtual:
        raise UserError(
            f"{name} has {count_text(len(rows), 'chunk')}, {virtual} on each of {count_text(pp, 'stage')}, and "
            f"megatron.{VIRTUAL}={asked}: leave that out, or set it to {virtual}"
        )
    for letter, place, where in (("E", 0, "begin"), ("L", -1, "end")):
        row = rows[place]
        if written.count(letter) != 1 or not row or row[place] != letter:
            raise UserError(f"{name} must {where} with {letter}, {_KINDS[letter]}, and have it once")
    return rows


def _sizes_of_layout(shape: ModelShape, megatron: MegatronSettings) -> list[list[int]]:
    rows, pp = _layout_rows(megatron), megatron.pipeline_model_parallel_size
    counts = [row.count("t") for row in rows]
    if sum(counts) != shape.num_layers:
        raise UserError(
            f"megatron.{LAYOUT}={megatron.pipeline_model_parallel_layout!r} has {count_text(sum(counts), 'layer')} "
            f"(t), and {shape.source} has {shape.num_layers}: {_added_or_removed(shape.num_layers - sum(counts))}"
        )
    for stage in range(pp):
        if not any(rows[stage::pp]):
            raise UserError(
                f"megatron.{LAYOUT}={megatron.pipeline_model_parallel_layout!r} leaves stage {stage} of {pp} empty: "
                "give it a layer, or take fewer stages"
            )
    return [counts[stage::pp] for stage in range(pp)]


def _added_or_removed(missing: int) -> str:
    return f"add {missing}" if missing > 0 else f"remove {-missing}"
