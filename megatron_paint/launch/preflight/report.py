"""What came of it, for people, for a job script, and for programs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.launch.preflight.coordinator import Case
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.result import Finding, nodes_at_fault
from megatron_paint.launch.preflight.time_limit import BAD
from megatron_paint.launch.preflight.timed_process import carry_out
from megatron_paint.runtime.files import write_atomically

DISK_SECONDS = 10.0


def conclude(case: Case, options: Options, seconds: float) -> int:
    """Prints a line for each failed check and one for all, writes the files that were asked for; the exit status."""
    failed = [finding for finding in case.findings if not finding.ok]
    for line in failure_lines(failed):
        print(line)
    if case.bandwidth is not None:
        floor = "no floor" if options.bandwidth_floor is None else f"the floor is {options.bandwidth_floor:g} GB/s"
        print(f"preflight: all-reduce over the nodes: {case.bandwidth:.3g} GB/s ({floor})")
    excluded = excludable(case)
    files = []
    if options.exclude_bad is not None:
        files.append((options.exclude_bad, "".join(f"{node}\n" for node in excluded)))
    if options.report is not None:
        files.append((options.report, _report(case, excluded, seconds)))
    unwritten = [problem for path, text in files if (problem := _write(path, text))]
    for problem in unwritten:
        print(f"preflight: node {case.node.name}: {problem}")
    print(summary(case.node.names, failed, seconds), flush=True)
    return BAD if failed or unwritten else 0


def failure_lines(failed: Sequence[Finding]) -> list[str]:
    """A line for each check that failed, with all nodes on which it failed alike."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for finding in failed:
        alike.setdefault((finding.check, finding.seen, finding.advice), []).append(finding.node)
    return [
        f"preflight: node{'s' if len(nodes) > 1 else ''} {', '.join(nodes)}: {check}: {seen}"
        f"{f'; {advice}' if advice else ''}"
        for (check, seen, advice), nodes in alike.items()
    ]


def summary(names: Sequence[str], failed: Sequence[Finding], seconds: float) -> str:
    """The last line."""
    bad = [name for name in names if any(finding.node == name for finding in failed)]
    if not bad:
        return f"preflight: {len(names)} node{'s' if len(names) > 1 else ''} ok in {seconds:.1f} s"
    return f"preflight: {len(bad)} of {len(names)} nodes not ok in {seconds:.1f} s: {', '.join(bad)}"


def excludable(case: Case) -> list[str]:
    """Names of bad nodes for Slurm's --exclude; a label such as 'node 3', given for want of a name, is none."""
    return [name for name in nodes_at_fault(case.findings, list(case.node.names)) if " " not in name]


def _report(case: Case, excluded: list[str], seconds: float) -> str:
    content = {
        "ok": all(finding.ok for finding in case.findings),
        "seconds": seconds,
        "nodes": case.node.names,
        "excluded": excluded,
        "bandwidth_gb_s": case.bandwidth,
        "versions": case.versions,
        "findings": [finding.plain() for finding in case.findings],
    }
    return to_json(content, indent=1) + "\n"


def _write(path: Path, text: str) -> str:
    """Why a file could not be written; empty if it was."""

    def write() -> str:
        try:
            write_atomically(path, text)
        except UserError as error:
            return str(error)
        return ""

    outcome = carry_out(write, DISK_SECONDS)
    return f"Cannot write {path}: {outcome.problem}" if outcome.problem else outcome.value
