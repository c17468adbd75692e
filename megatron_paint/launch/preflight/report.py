"""Reports the results: for people, for a job script, and for programs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.launch.preflight.coordinator import PreflightState
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.result import CheckResult, faulty_nodes
from megatron_paint.launch.preflight.time_limit import BAD
from megatron_paint.launch.preflight.timed_process import run_timed
from megatron_paint.runtime.files import write_atomically

DISK_SECONDS = 10.0


def report_results(state: PreflightState, options: Options, seconds: float) -> int:
    """Prints a line for each failed check and a summary, writes the requested files, returns the exit status."""
    failed = [result for result in state.results if not result.ok]
    for line in failure_lines(failed):
        print(line)
    if state.bandwidth is not None:
        floor = "no floor" if options.bandwidth_floor is None else f"the floor is {options.bandwidth_floor:g} GB/s"
        print(f"preflight: all-reduce over the nodes: {state.bandwidth:.3g} GB/s ({floor})")
    excluded = excludable(state)
    files = []
    if options.exclude_bad is not None:
        files.append((options.exclude_bad, "".join(f"{node}\n" for node in excluded)))
    if options.report is not None:
        files.append((options.report, _report_json(state, excluded, seconds)))
    unwritten = [problem for path, text in files if (problem := _write(path, text))]
    for problem in unwritten:
        print(f"preflight: node {state.node.name}: {problem}")
    print(summary(state.node.names, failed, seconds), flush=True)
    return BAD if failed or unwritten else 0


def failure_lines(failed: Sequence[CheckResult]) -> list[str]:
    """A line for each failed check. Nodes on which it failed in the same way share a line."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for result in failed:
        alike.setdefault((result.check, result.seen, result.advice), []).append(result.node)
    return [
        f"preflight: {agreeing(len(nodes), 'node', 'nodes')} {', '.join(nodes)}: {check}: "
        f"{seen}{f'; {advice}' if advice else ''}"
        for (check, seen, advice), nodes in alike.items()
    ]


def summary(names: Sequence[str], failed: Sequence[CheckResult], seconds: float) -> str:
    """The last line."""
    bad = [name for name in names if any(result.node == name for result in failed)]
    if not bad:
        return f"preflight: {count_text(len(names), 'node')} ok in {seconds:.1f} s"
    return f"preflight: {len(bad):,} of {count_text(len(names), 'node')} not ok in {seconds:.1f} s: {', '.join(bad)}"


def excludable(state: PreflightState) -> list[str]:
    """Names of bad nodes for Slurm's --exclude; without labels such as 'node 3', which replace unknown names."""
    return [name for name in faulty_nodes(state.results, list(state.node.names)) if " " not in name]


def _report_json(state: PreflightState, excluded: list[str], seconds: float) -> str:
    content = {
        "ok": all(result.ok for result in state.results),
        "seconds": seconds,
        "nodes": state.node.names,
        "excluded": excluded,
        "bandwidth_gb_s": state.bandwidth,
        "versions": state.versions,
        "results": [result.plain() for result in state.results],
    }
    return to_json(content, indent=1) + "\n"


def _write(path: Path, text: str) -> str:
    """Writes a file; returns the reason if that failed, and else an empty text."""

    def write() -> str:
        try:
            write_atomically(path, text)
        except UserError as error:
            return str(error)
        return ""

    outcome = run_timed(write, DISK_SECONDS)
    return f"Cannot write {path}: {outcome.problem}" if outcome.problem else outcome.value
