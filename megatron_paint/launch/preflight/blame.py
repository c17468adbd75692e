"""Decides which nodes are blamed when a sum over all nodes fails.

A node that hangs makes all other nodes wait. The nodes that only wait are not named.
"""

from collections.abc import Mapping, Sequence

from megatron_paint.base.counts import count_text
from megatron_paint.launch.preflight.collective import SumResult
from megatron_paint.launch.preflight.result import CheckResult

CHECK = "all-reduce over all nodes"
INTERFACES = "check the network between the nodes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
REPAIR = "have the node repaired, and exclude it until then"


def blame_nodes(
    sums: Mapping[str, SumResult], ranks: Mapping[str, Sequence[int]], *, silent: Sequence[str], floor: float | None
) -> list[CheckResult]:
    """A failed result for each node that is to blame; without one, a result for every node.

    sums: by node, of the nodes that answered. ranks: by node, the ranks of its processes. silent: nodes that took part
    and did not answer; the caller reports them. floor: the lowest accepted bandwidth in GB/s.
    """
    problems = {node: result for node, result in sums.items() if result.problem}
    if problems:
        return [] if silent else _blame_stopped(problems, sums)
    wrong = [node for node in sums if set(ranks[node]) & {r for each in sums.values() for r in each.wrong_ranks}]
    wrong = wrong or [node for node, result in sums.items() if result.wrong_sum]
    if wrong:
        count = sum(result.wrong_sum for result in sums.values())
        seen = f"the sum is wrong on {count} of {count_text(len(sums), 'node')}, because of this node"
        return [CheckResult(check=CHECK, ok=False, seen=seen, advice=REPAIR, node=node) for node in wrong]
    slowest = min(result.bandwidth for result in sums.values())
    if floor is not None and len(sums) > 1 and slowest < floor:
        seen = f"{slowest:.3g} GB/s, below the floor of {floor:g} GB/s"
        return [CheckResult(check=CHECK, ok=False, seen=seen, advice=INTERFACES, node=n, fault="job") for n in sums]
    return [CheckResult(check=CHECK, ok=True, seen=f"correct sum, {slowest:.3g} GB/s", node=node) for node in sums]


def _blame_stopped(problems: Mapping[str, SumResult], sums: Mapping[str, SumResult]) -> list[CheckResult]:
    """Blames the nodes whose processes died, else the nodes that made the least progress, else nobody."""
    killed = [node for node, result in problems.items() if result.kind == "killed"]
    least = min(result.progress for result in problems.values())
    behind = [node for node, result in sums.items() if result.progress == least]
    blamed = killed or (behind if len(behind) < len(sums) else [])
    results = []
    for node, result in problems.items():
        if node in blamed or not blamed:
            seen = f"it stopped after step {result.progress}: {result.problem}"
            advice, fault = (REPAIR, "node") if blamed else (INTERFACES, "job")
            results.append(CheckResult(check=CHECK, ok=False, seen=seen, advice=advice, node=node, fault=fault))
    return results
