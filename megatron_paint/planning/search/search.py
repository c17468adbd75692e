"""The search: every layout is checked and timed; memory is estimated in the order of time, until enough layouts fit."""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.search.as_settings import (
    can_offload_optimizer,
    can_offload_teacher,
    phase_bytes,
    refusal,
    refusal_of_tree,
    searched_dimensions,
    settings_for,
    tree_for,
)
from megatron_paint.planning.search.candidate import (
    RECOMPUTATIONS,
    Candidate,
    context_sizes,
    layouts,
    variants,
)
from megatron_paint.planning.search.machines import Machine
from megatron_paint.planning.search.step_time import StepModel, StepTime
from megatron_paint.planning.search.workload import Lengths, Workload, workload_of

CLOSE = 1.01  # times that differ by less count as equal, and then the layout with fewer parts is better; ours


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the search is asked."""

    tree: Mapping[str, Any]  # the settings as nested dictionaries, without a layout
    settings: Settings  # the same, checked
    shape: ModelShape
    machine: Machine
    lengths: Lengths
    reserve: float  # fraction of a GPU's memory that must stay free
    sampling_gpus: int  # of vLLM's servers, beside those of the machine
    offload: bool = True  # teacher and optimiser may move to host memory

    @property
    def name(self) -> str:
        """The short name of the model: of its folder."""
        return Path(self.shape.source).parent.name

    def shown(self, message: str) -> str:
        """A message of a check, with the model's short name in place of the path of its config.json."""
        return message.replace(self.shape.source, self.name)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a rank may need."""
        return self.machine.gpu.memory * (1 - self.reserve)

    @property
    def offloads(self) -> dict[str, bool]:
        """What may move to host memory."""
        return {
            "teacher": self.offload and can_offload_teacher(self.settings),
            "optimizer": self.offload and can_offload_optimizer(self.settings),
        }

    @property
    def work(self) -> Workload:
        """What a step has to do."""
        return workload_of(self.settings, self.lengths)

    def model(self) -> StepModel:
        """The times of this question."""
        return StepModel(
            settings=self.settings,
            shape=self.shape,
            gpu=self.machine.gpu,
            work=self.work,
            sampling_gpus=self.sampling_gpus,
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A layout with its time and its memory."""

    candidate: Candidate
    time: StepTime
    memory: Mapping[str, float]  # bytes on a GPU, by phase

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return max(self.memory.values())


@dataclass(kw_only=True)
class Found:
    """What the search found."""

    ranked: list[Planned] = field(default_factory=list)  # those that fit, best first
    layouts: int = 0  # that were looked at
    refused: Counter[str] = field(default_factory=Counter)  # layouts, by the message that refuses them
    too_large: int = 0  # layouts that do not fit with any kind of recomputation and offload
    slower: int = 0  # layouts after the ranked ones in this order; their memory was not estimated
    closest: Planned | None = None  # of the layouts that do not fit, the one that needs least


def search(question: Question, *, top: int | None) -> Found:
    """The `top` fastest layouts that fit; None: all of them. Among those of about the same time, the simplest is first.

    A layout is ranked once: with the recomputation and offload that are best among those that fit.
    """
    found, model = Found(), question.model()
    accepted = list(_accepted(question, found))

    @cache
    def seconds(candidate: Candidate) -> float:
        return model.step(candidate).total

    fastest = min(map(seconds, accepted), default=0.0)

    def order(candidate: Candidate) -> tuple[int, int, float]:
        return math.floor(math.log(seconds(candidate) / fastest, CLOSE)), candidate.parts, seconds(candidate)

    queue = [(order(layout), number, [layout]) for number, layout in enumerate(accepted)]
    heapq.heapify(queue)
    while queue and (top is None or len(found.ranked) < top):
        _, number, (candidate, *others) = heapq.heappop(queue)
        planned = _planned(question, model, candidate)
        message = None
        if planned.peak <= question.usable:
            message = refusal_of_tree(tree_for(question.tree, candidate, question.shape))
            if message is None:
                found.ranked.append(planned)
                continue
        elif candidate == _plain(candidate):
            choices = variants(candidate, **question.offloads)
            leanest = choices[-len(RECOMPUTATIONS) :]  # everything that can be is in host memory
            smallest = min((_planned(question, model, each) for each in leanest), key=lambda each: each.peak)
            if found.closest is None or smallest.peak < found.closest.peak:
                found.closest = smallest
            others = sorted(choices[1:], key=order) if smallest.peak <= question.usable else []
        if others:  # another variant may fit, or be accepted
            heapq.heappush(queue, (order(others[0]), number, others))
        elif message is not None:
            found.refused[message] += 1
        else:
            found.too_large += 1
    found.slower = len(queue)
    return found


def _accepted(question: Question, found: Found) -> Iterator[Candidate]:
    """The layouts that the checks of a run accept; the others are counted."""
    shape, machine = question.shape, question.machine
    names = {dimension.name for dimension in searched_dimensions(shape)}
    node, context = machine.gpu.gpus_per_node, context_sizes(question.work.longest)
    for layout in layouts(shape, gpus=machine.gpus, gpus_per_node=node, searched=names, context=context):
        found.layouts += 1
        message = refusal(settings_for(question.settings, layout, shape), shape, gpus=machine.gpus)
        if message is None:
            yield layout
        else:
            found.refused[message] += 1


def _plain(candidate: Candidate) -> Candidate:
    return replace(candidate, recompute="none", teacher_offload=False, optimizer_offload=False)


def _planned(question: Question, model: StepModel, candidate: Candidate) -> Planned:
    settings = settings_for(question.settings, candidate, question.shape)
    memory = phase_bytes(settings, question.shape, gpus=question.machine.gpus)
    return Planned(candidate=candidate, time=model.step(candidate), memory=memory)
