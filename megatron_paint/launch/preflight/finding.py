"""What one check of one node came to."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# Of the node: the job would do better without it. Of the job: it would meet the same on any other node.
Fault = Literal["node", "job"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's result."""

    check: str
    ok: bool
    seen: str
    advice: str = ""  # what to do; empty if ok
    fault: Fault = "node"  # of a finding that is not ok
    node: str = ""  # set by whoever gathers findings of several nodes

    def at(self, node: str) -> "Finding":
        """The same, with the node's name."""
        return replace(self, node=node)

    def plain(self) -> dict[str, Any]:
        """As it is sent between nodes and written into the report."""
        return asdict(self)


def nodes_at_fault(findings: list[Finding], nodes: list[str]) -> list[str]:
    """Nodes that the job would do better without, in the order of `nodes`.

    What several nodes all fail alike is no node's fault: without them there would be none left.
    """
    at_fault: set[str] = set()
    for check in {finding.check for finding in findings}:
        failed = {f.node for f in findings if f.check == check and not f.ok}
        blamed = {f.node for f in findings if f.check == check and not f.ok and f.fault == "node"}
        if len(nodes) == 1 or failed != set(nodes):
            at_fault |= blamed
    return [node for node in nodes if node in at_fault]
