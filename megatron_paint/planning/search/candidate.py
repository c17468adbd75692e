"""A layout that the search looks at. It may have dimensions that the settings do not have."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_paint.models.shape import ModelShape

Recomputation = Literal["none", "selective", "full"]
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")
VIRTUAL = (1, 2, 3, 4, 6, 8)  # chunks of a stage that are tried; ours
CONTEXT = (1, 2, 4, 8, 16)  # context-parallel sizes that are tried; ours
CONTEXT_TOKENS = 1024  # of the longest row, on a context-parallel rank; a smaller part is not tried; ours


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """How many ranks share what, and what saves memory. The names are those of Megatron's documentation."""

    tp: int = 1  # tensor parallel; sequence parallel too if it is above 1
    pp: int = 1  # pipeline stages
    vpp: int = 1  # chunks of layers in each stage (virtual pipeline)
    balanced: bool = False  # embedding and output layer count as a layer each when layers are divided over stages
    cp: int = 1  # context parallel
    ep: int = 1  # expert parallel: ranks that share the experts
    etp: int = 1  # expert tensor parallel: ranks that share each expert
    dp: int = 1  # data parallel: replicas
    recompute: Recomputation = "none"
    teacher_offload: bool = False  # the teacher's weights rest in host memory
    optimizer_offload: bool = False  # the optimiser's state is in host memory, and its step on the CPU

    @property
    def gpus(self) -> int:
        """The number of ranks, one on each GPU."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def parts(self) -> int:
        """What a layout has beyond data parallelism: the kinds of parallelism above 1, and what saves memory."""
        sizes = (self.tp, self.pp, self.vpp, self.cp, self.ep, self.etp)
        savings = (self.recompute != "none", self.teacher_offload, self.optimizer_offload)
        return sum(size > 1 for size in sizes) + self.balanced + sum(savings)

    def layout_text(self) -> str:
        """The layout in one line, without sizes of 1."""
        sizes = [("TP", self.tp), ("PP", self.pp), ("VP", self.vpp), ("CP", self.cp), ("DP", self.dp)]
        parts = [" x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"]
        if self.ep > 1 or self.etp > 1:
            parts.append(f"EP {self.ep}" + (f" x ETP {self.etp}" if self.etp > 1 else ""))
        if self.balanced:
            parts.append("ends count")
        return ", ".join(parts)

    def savings_text(self) -> str:
        """What saves memory, in one line; "-" if nothing does."""
        parts = [] if self.recompute == "none" else [f"{self.recompute} recomputation"]
        parts += ["teacher on the host"] if self.teacher_offload else []
        parts += ["optimiser on the host"] if self.optimizer_offload else []
        return ", ".join(parts) or "-"


def divisors(number: int) -> list[int]:
    """All divisors of a number from 1, in rising order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def context_sizes(longest: float) -> list[int]:
    """The context-parallel sizes for rows of up to `longest` tokens: 1, and those that leave each rank long parts."""
    return [size for size in CONTEXT if size == 1 or longest >= size * CONTEXT_TOKENS]


def layouts(
    shape: ModelShape, *, gpus: int, gpus_per_node: int, searched: Collection[str], context: Collection[int] = CONTEXT
) -> Iterator[Candidate]:
    """Every way to lay `gpus` ranks out, without recomputation and offload.

    searched: the names of the dimensions that may be above 1. context: the sizes of context parallelism. A
    tensor-parallel group stays within a node. An expert is complete on one rank or shared like the other layers. Sizes
    that do not fit the model are among the layouts: the checks of the settings refuse them.
    """
    context = context if "cp" in searched else (1,)
    for tp in divisors(min(gpus, gpus_per_node)):
        if gpus % tp == 0:
            for pp in divisors(gpus // tp):
                if pp <= shape.num_layers + 2:
                    rest = gpus // (tp * pp)
                    yield from _of_stages(shape, tp=tp, pp=pp, rest=rest, searched=searched, context=context)


def _of_stages(
    shape: ModelShape, *, tp: int, pp: int, rest: int, searched: Collection[str], context: Collection[int]
) -> Iterator[Candidate]:
    """The layouts with these stages. rest: ranks that context and data parallelism share."""
    for balanced in (False, True) if "balanced" in searched and pp > 1 else (False,):
        for vpp in VIRTUAL if "vpp" in searched and pp > 1 else (1,):
            if pp * vpp > shape.num_layers + 2 or (balanced and pp == 2 and vpp == 1):  # two stages have two ends
                continue
            for cp in context:
                if rest % cp == 0:
                    known = Candidate(tp=tp, pp=pp, vpp=vpp, balanced=balanced, cp=cp, dp=rest // cp)
                    yield from _of_experts(shape, known, searched=searched)


def _of_experts(shape: ModelShape, layout: Candidate, *, searched: Collection[str]) -> Iterator[Candidate]:
    if not shape.num_experts:
        yield layout
        return
    ranks = layout.tp * layout.cp * layout.dp  # of a stage
    for etp in sorted({1, layout.tp}) if "etp" in searched else (layout.tp,):
        for ep in divisors(shape.num_experts) if "ep" in searched else (1,):
            if ranks % (ep * etp) == 0:
                yield replace(layout, ep=ep, etp=etp)


def variants(layout: Candidate, *, teacher: bool, optimizer: bool) -> list[Candidate]:
    """The layout with each kind of recomputation. teacher, optimizer: also with them in host memory, these last."""
    return [
        replace(layout, recompute=recompute, teacher_offload=teacher_offload, optimizer_offload=optimizer_offload)
        for optimizer_offload in ((False, True) if optimizer else (False,))
        for teacher_offload in ((False, True) if teacher else (False,))
        for recompute in RECOMPUTATIONS
    ]
