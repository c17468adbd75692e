"""The checks of a single node. They run at the same time, and each may use the time that is left."""

from dataclasses import dataclass
from typing import Any

from megatron_paint.base.counts import count_text
from megatron_paint.launch.preflight import collective, gpus, shared, space
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.result import CheckResult
from megatron_paint.launch.preflight.timed_process import Outcome, TimedProcess

PACKAGES, NODE_SUM = "packages", "all-reduce in the node"
HANGS = "have the node repaired: its driver or a file system hangs"


@dataclass(frozen=True, kw_only=True)
class Canary:
    """The token that the first node wrote."""

    name: str
    token: str


@dataclass(frozen=True, kw_only=True)
class NodeResults:
    """The results of the checks of a single node."""

    results: list[CheckResult]
    versions: dict[str, str]
    gpus: int

    @property
    def can_join_sum(self) -> bool:
        """Whether its GPUs may take part in a sum over all nodes."""
        return all(result.ok for result in self.results if result.check in (gpus.CHECK, NODE_SUM))

    def plain(self) -> dict[str, Any]:
        """The results as JSON types, for the store."""
        return {"results": [result.plain() for result in self.results], "versions": self.versions, "gpus": self.gpus}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "NodeResults":
        """Reads what `plain` returned."""
        return cls(**{**plain, "results": [CheckResult(**result) for result in plain["results"]]})


def check_node(options: Options, me: Node, probes: Probes, canary: Canary | None, deadline: float) -> NodeResults:
    """Runs all checks. canary: None on the first node, or if the first node could not write the token."""
    versions = TimedProcess(lambda _: probes.versions())
    counted = TimedProcess(lambda _: gpus.check_gpus(probes.gpus, options.expect_gpus))
    answer = None
    if canary is not None:
        node = {"rank": me.rank, "node": me.name, "first": me.first, "patience": probes.patience}
        answer = TimedProcess(lambda _: shared.answer(options.run, canary.name, canary.token, **node))
    found_versions, found_gpus = versions.outcome(deadline), counted.outcome(deadline)
    gpu_result, count = found_gpus.value or (_failed(gpus.CHECK, found_gpus), 0)
    room = TimedProcess(
        lambda _: space.check_space(
            options.run,
            options.settings,
            options.overrides,
            ranks=me.count * max(1, count),
            statvfs=probes.statvfs,
        )
    )
    results = [gpu_result]
    if found_versions.problem:
        results.append(_failed(PACKAGES, found_versions))
    if gpu_result.ok:
        results.append(_sum_in_node(count, probes, deadline))
    if answer is not None:
        answered = answer.outcome(deadline)
        results.append(answered.value or _failed(shared.CHECK, answered))
    spaces = room.outcome(deadline)
    results += spaces.value or [_failed(space.SPACE, spaces)]
    return NodeResults(results=results, versions=found_versions.value or {}, gpus=count)


def _sum_in_node(gpu_count: int, probes: Probes, deadline: float) -> CheckResult:
    """A sum over the node's GPUs, or in one process on the CPU."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = max(1, gpu_count)
    group = collective.Group(
        name="node", host="127.0.0.1", port=store.port, first=0, local=workers, size=workers, on_gpu=gpu_count > 0
    )
    result = collective.run_sum(group, deadline, collective.own_part)
    if result.problem or result.wrong_sum or result.wrong_ranks:
        seen = result.problem or "the sum is wrong"
        return CheckResult(
            check=NODE_SUM, ok=False, seen=f"over {count_text(workers, 'process')}: {seen}", advice=HANGS
        )
    return CheckResult(check=NODE_SUM, ok=True, seen=f"correct sum over {workers}, {result.bandwidth:.3g} GB/s")


def _failed(check: str, outcome: Outcome) -> CheckResult:
    """Of a check that returned no result."""
    return CheckResult(check=check, ok=False, seen=outcome.problem, advice=HANGS)
