"""What one check of one node came to."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# Of the node: the job would do better without it. Odd: the same, but only where other nodes have it right. Of the job:
# it would meet the same on any other node.
Fault = Literal["node", "odd", "job"]


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

    What all of several nodes fail alike is no node's fault: without them there would be none left.
    """
    at_fault: set[str] = set()
    for check in {finding.check for finding in findings}:
        of_it = [finding for finding in findings if finding.check == check]
        checked = {finding.node for finding in of_it}
        failed = {finding.node for finding in of_it if not finding.ok}
        some_right = failed != checked
        for finding in of_it:
            alone = len(checked) == 1 and finding.fault == "node"
            if not finding.ok and finding.fault != "job" and (some_right or alone):
                at_fault.add(finding.node)
    return [node for node in nodes if node in at_fault]
