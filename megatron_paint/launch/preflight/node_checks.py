"""The checks that a node makes by itself, side by side, each with what is left of their time."""

from dataclasses import dataclass
from typing import Any

from megatron_paint.launch.preflight import collective, gpus, shared, space
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.result import Finding
from megatron_paint.launch.preflight.timed_process import Errand, Outcome

PACKAGES, NODE_SUM = "packages", "all-reduce in the node"
HANGS = "have the node looked at: its driver or a file system hangs"


@dataclass(frozen=True, kw_only=True)
class Canary:
    """The token that the first node wrote."""

    name: str
    token: str


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a node found by itself."""

    findings: list[Finding]
    versions: dict[str, str]
    gpus: int

    @property
    def can_add_up(self) -> bool:
        """Whether its GPUs may take part in a sum over all nodes."""
        return all(f.ok for f in self.findings if f.check in (gpus.CHECK, NODE_SUM))

    def plain(self) -> dict[str, Any]:
        """As it is sent."""
        return {"findings": [f.plain() for f in self.findings], "versions": self.versions, "gpus": self.gpus}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Local":
        """What was sent."""
        return cls(**{**plain, "findings": [Finding(**finding) for finding in plain["findings"]]})


def examine(options: Options, me: Node, probes: Probes, canary: Canary | None, deadline: float) -> Local:
    """All of them. canary: None on the first node, or where it could write none."""
    versions = Errand(lambda _: probes.versions())
    counted = Errand(lambda _: gpus.check_gpus(probes.gpus, options.expect_gpus))
    answer = None
    if canary is not None:
        place = {"rank": me.rank, "node": me.name, "first": me.first}
        answer = Errand(lambda _: shared.answer(options.run, canary.name, canary.token, **place))
    found_versions, found_gpus = versions.outcome(deadline), counted.outcome(deadline)
    gpu_finding, count = found_gpus.value or (_failed(gpus.CHECK, found_gpus), 0)
    room = Errand(
        lambda _: space.check_space(
            options.run,
            options.settings,
            options.overrides,
            ranks=me.count * max(1, count),
            statvfs=probes.statvfs,
        )
    )
    findings = [gpu_finding]
    if found_versions.problem:
        findings.append(_failed(PACKAGES, found_versions))
    if gpu_finding.ok:
        findings.append(_sum_in_node(count, probes, deadline))
    if answer is not None:
        answered = answer.outcome(deadline)
        findings.append(answered.value or _failed(shared.CHECK, answered))
    spaces = room.outcome(deadline)
    findings += spaces.value or [_failed(space.SPACE, spaces)]
    return Local(findings=findings, versions=found_versions.value or {}, gpus=count)


def _sum_in_node(gpu_count: int, probes: Probes, deadline: float) -> Finding:
    """A sum over the node's GPUs, or by one process of the CPU."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = max(1, gpu_count)
    group = collective.Group(
        name="node", host="127.0.0.1", port=store.port, first=0, local=workers, size=workers, on_gpu=gpu_count > 0
    )
    result = collective.take_part(group, deadline, collective.own_part)
    if result.problem or result.wrong_sum or result.wrong_ranks:
        seen = result.problem or "the sum is wrong"
        return Finding(check=NODE_SUM, ok=False, seen=f"over {workers} processes: {seen}", advice=HANGS)
    return Finding(check=NODE_SUM, ok=True, seen=f"right sum over {workers}, {result.bandwidth:.3g} GB/s")


def _failed(check: str, outcome: Outcome) -> Finding:
    """Of a check that came to no result."""
    return Finding(check=check, ok=False, seen=outcome.problem, advice=HANGS)
