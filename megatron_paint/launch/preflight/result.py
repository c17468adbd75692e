"""The result of one check on one node."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# node: the job would do better without this node. odd: the same, but only if the check passed on other nodes.
# job: the check would fail in the same way on any other node.
Fault = Literal["node", "odd", "job"]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check's result."""

    check: str
    ok: bool
    seen: str
    advice: str = ""  # what to do; empty if ok
    fault: Fault = "node"  # of a result that is not ok
    node: str = ""  # set by the process that gathers the results of several nodes

    def at(self, node: str) -> "CheckResult":
        """The same result with the node's name."""
        return replace(self, node=node)

    def plain(self) -> dict[str, Any]:
        """The form in which it is sent between nodes and written into the report."""
        return asdict(self)


def faulty_nodes(results: list[CheckResult], nodes: list[str]) -> list[str]:
    """The nodes that the job would do better without, in the order of `nodes`.

    If a check fails on all of several nodes, none of them is faulty: no node would be left without them.
    """
    faulty: set[str] = set()
    for check in {result.check for result in results}:
        of_it = [result for result in results if result.check == check]
        checked = {result.node for result in of_it}
        failed = {result.node for result in of_it if not result.ok}
        some_right = failed != checked
        for result in of_it:
            alone = len(checked) == 1 and result.fault == "node"
            if not result.ok and result.fault != "job" and (some_right or alone):
                faulty.add(result.node)
    return [node for node in nodes if node in faulty]
