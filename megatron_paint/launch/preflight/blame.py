"""Which nodes a failed sum over all nodes is laid to: one that hangs makes all others wait, and they are not named."""

from collections.abc import Mapping, Sequence

from megatron_paint.launch.preflight.collective import Result
from megatron_paint.launch.preflight.result import Finding

CHECK = "all-reduce over all nodes"
INTERFACES = "look at the network between the nodes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
SICK = "have the node looked at, and leave it out until then"


def judge(
    results: Mapping[str, Result], ranks: Mapping[str, Sequence[int]], *, silent: Sequence[str], floor: float | None
) -> list[Finding]:
    """A finding for each node that is to blame; one without blame for each, if there is none.

    results: by node, of those that answered; ranks: by node, its processes' ranks; silent: nodes that took part and
    have not answered, which others report; floor: least bandwidth in GB/s.
    """
    problems = {node: result for node, result in results.items() if result.problem}
    if problems:
        return [] if silent else _stopped(problems, results)
    wrong = [node for node in results if set(ranks[node]) & {r for each in results.values() for r in each.wrong_ranks}]
    wrong = wrong or [node for node, result in results.items() if result.wrong_sum]
    if wrong:
        count = sum(result.wrong_sum for result in results.values())
        seen = f"the sum is wrong on {count} of {len(results)} nodes, by what this one adds or makes of it"
        return [Finding(check=CHECK, ok=False, seen=seen, advice=SICK, node=node) for node in wrong]
    slowest = min(result.bandwidth for result in results.values())
    if floor is not None and len(results) > 1 and slowest < floor:
        seen = f"{slowest:.3g} GB/s, below the floor of {floor:g} GB/s"
        return [Finding(check=CHECK, ok=False, seen=seen, advice=INTERFACES, node=n, fault="job") for n in results]
    return [Finding(check=CHECK, ok=True, seen=f"right sum, {slowest:.3g} GB/s", node=node) for node in results]


def _stopped(problems: Mapping[str, Result], results: Mapping[str, Result]) -> list[Finding]:
    """The nodes whose processes died; else those that came less far than others; else nobody can be told."""
    killed = [node for node, result in problems.items() if result.kind == "killed"]
    least = min(result.progress for result in problems.values())
    behind = [node for node, result in results.items() if result.progress == least]
    blamed = killed or (behind if len(behind) < len(results) else [])
    findings = []
    for node, result in problems.items():
        if node in blamed or not blamed:
            seen = f"it stopped after step {result.progress}: {result.problem}"
            advice, fault = (SICK, "node") if blamed else (INTERFACES, "job")
            findings.append(Finding(check=CHECK, ok=False, seen=seen, advice=advice, node=node, fault=fault))
    return findings
