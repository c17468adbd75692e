"""Makes tables and a plot from the testbed's run folders.

The figure of a method is a mean over warm-ups. The value of a warm-up is the mean over its seeds. The interval is
Student's over the warm-ups' means, because runs of one warm-up share its model. One warm-up has no interval.
Differences are taken between runs with the same model, seed and problems.
"""

import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "opsd"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished run: accuracy in % and tokens sampled so far at each evaluation, and figures of the last one."""

    warm_up: int
    seed: int
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    tokens: tuple[float, ...]
    length: float  # mean length of an answer in tokens, at the end
    greedy: float

    @property
    def key(self) -> tuple[int, int]:
        return self.warm_up, self.seed


def is_done(folder: Path) -> bool:
    """Tells whether the evaluation after the run's last step exists."""
    config = folder / "config.yaml"
    if not config.exists():
        return False
    steps = YAML(typ="safe", pure=True).load(config.read_text())["run"]["steps"]
    return (folder / "eval" / f"step_{steps:06d}.json").exists()


def commit_file(folder: Path) -> Path:
    """Returns the file with the commit of a run."""
    return folder.parent / f"{folder.name}.commit"


def present_commit() -> str:
    """Returns the commit of the checkout, with a mark if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read_run(folder: Path) -> Finished | None:
    """Reads a run; None if it is not finished."""
    if not is_done(folder):
        return None
    reports = [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("step_*.json"))]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
    samples = metrics[0]["response/truncated_share"] is not None  # null if responses are not sampled
    spent = np.cumsum([0] + [line["num_tokens"] if samples else 0 for line in metrics])
    warm_up, seed = map(int, folder.name.split("-"))
    last = reports[-1]["metrics"]
    return Finished(
        warm_up=warm_up,
        seed=seed,
        steps=tuple(report["step"] for report in reports),
        accuracy=tuple(100 * report["metrics"]["avg"] for report in reports),
        tokens=tuple(float(spent[report["step"]]) for report in reports),
        length=last["length_mean"],
        greedy=100 * last["greedy"],
    )


def nested(values: dict[tuple[int, int], float]) -> tuple[float, float]:
    """Returns (mean, half-width of the 95 % interval) of values by (warm-up, seed)."""
    groups = defaultdict(list)
    for (warm_up, _), value in values.items():
        groups[warm_up].append(value)
    means = np.array([np.mean(group) for group in groups.values()])
    if len(means) < 2:
        return float(means.mean()), math.nan
    error = means.std(ddof=1) / math.sqrt(len(means))
    return float(means.mean()), float(scipy.stats.t.ppf(0.975, len(means) - 1) * error)


def at_tokens(run: Finished, budget: float) -> float:
    """Returns the accuracy after this number of sampled tokens, interpolated between evaluations."""
    return float(np.interp(budget, run.tokens, run.accuracy))


def write_report(
    out: Path, methods: Sequence[str], controls: Sequence[str], *, name: str = "runs", baseline: str = BASELINE
) -> None:
    """Writes `report.md`, `report.png` and `results.json` from the runs in the folder `out`/`name`.

    They go into `out`, or into `out`/report_of_<name> if the name is not `runs`. baseline: the method that the others
    are paired with.
    """
    runs_folder = out / name
    found: dict[str, dict[str, list[Finished]]] = defaultdict(dict)
    for folder in sorted(runs_folder.glob("*/*")):
        runs = [run for path in sorted(folder.iterdir()) if path.is_dir() and (run := read_run(path))]
        if runs:
            found[folder.parent.name][folder.name] = runs
    if not found:
        raise SystemExit(f"{runs_folder} has no finished run")
    rates = json.loads((out / "learning_rates.json").read_text()) if (out / "learning_rates.json").exists() else {}
    commits = sorted({file.read_text().strip() for file in runs_folder.glob("*/*/*.commit")})
    lines = [
        f"Runs of commit {', '.join(commits) or 'unknown'}; learning rates {rates.get('chosen', 'of the files')}.",
        "",
    ]
    for variant, by_method in found.items():
        order = [method for method in [*methods, *controls] if method in by_method]
        lines += _table(variant, by_method, order, baseline=baseline)
        lines += _table_of_evaluations(by_method, order)
    if name != "runs":
        out = out / f"report_of_{name}"
        out.mkdir(exist_ok=True)
    (out / "report.md").write_text("\n".join(lines) + "\n")
    plain = {v: {m: [vars(run) for run in runs] for m, runs in by.items()} for v, by in found.items()}
    (out / "results.json").write_text(json.dumps({"commits": commits, "rates": rates, "runs": plain}, indent=1) + "\n")
    plot(out / "report.png", found, methods)
    print("\n".join(lines))


def _table(variant: str, by_method: dict[str, list[Finished]], order: Sequence[str], *, baseline: str) -> list[str]:
    """Returns the table of the final figures and the differences to the baseline.

    Column `above`: the number of paired runs in which the method was better.
    """
    other = {run.key: run for run in by_method.get(baseline, [])}
    budget = min((run.tokens[-1] for runs in by_method.values() for run in runs if run.tokens[-1]), default=0.0)
    first = next(iter(by_method.values()))
    base, base_error = nested({run.key: run.accuracy[0] for run in first})
    lines = [
        f"## {variant}",
        "",
        f"Before training {_text(base, base_error)}. After {first[0].steps[-1]} steps, and when {budget:,.0f} tokens "
        "had been sampled:",
        "",
        f"| method | runs | Avg@8 | minus {baseline} | above | greedy | mean length | at equal tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in order:
        runs = by_method[name]
        paired = {run.key: run.accuracy[-1] - other[run.key].accuracy[-1] for run in runs if run.key in other}
        is_paired = paired and name != baseline
        difference = _text(*nested(paired), sign=True) if is_paired else ""
        above = f"{sum(value > 0 for value in paired.values())} of {len(paired)}" if is_paired else ""
        sampled = all(run.tokens[-1] > 0 for run in runs)
        equal = _text(*nested({run.key: at_tokens(run, budget) for run in runs})) if sampled and budget else "-"
        accuracy = _text(*nested({run.key: run.accuracy[-1] for run in runs}))
        greedy, length = np.mean([run.greedy for run in runs]), np.mean([run.length for run in runs])
        lines.append(
            f"| {name} | {len(runs)} | {accuracy} | {difference} | {above} | {greedy:.1f} | {length:.1f} | {equal} |"
        )
    return [*lines, ""]


def _table_of_evaluations(by_method: dict[str, list[Finished]], order: Sequence[str]) -> list[str]:
    """Returns the table of Avg@8 at each evaluation, and of each run at its end, as `warm-up-seed: Avg@8`."""
    steps = next(iter(by_method.values()))[0].steps
    lines = [
        f"| method | {' | '.join(f'after {step}' for step in steps)} | runs |",
        "|---|" + "---:|" * len(steps) + "---|",
    ]
    for name in order:
        runs = sorted(by_method[name], key=lambda run: run.key)
        means = [_text(*nested({run.key: run.accuracy[at] for run in runs})) for at in range(len(steps))]
        ends = ", ".join(f"{run.warm_up}-{run.seed}: {run.accuracy[-1]:.1f}" for run in runs)
        lines.append(f"| {name} | {' | '.join(means)} | {ends} |")
    return [*lines, ""]


def _text(mean: float, half: float, *, sign: bool = False) -> str:
    number = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return number if math.isnan(half) else f"{number} ± {half:.1f}"


def plot(path: Path, found: dict[str, dict[str, list[Finished]]], methods: Sequence[str]) -> None:
    """Draws accuracy against steps and against sampled tokens, with one column for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 6.4), layout="constrained")
    axes = figure.subplots(2, len(found), sharey=True, squeeze=False)
    for column, (variant, by_method) in enumerate(found.items()):
        for name in [name for name in methods if name in by_method]:
            runs, colour = by_method[name], f"C{list(methods).index(name)}"
            curves = np.array([run.accuracy for run in runs])
            axes[0][column].plot(runs[0].steps, curves.mean(0), color=colour, label=name)
            axes[0][column].fill_between(runs[0].steps, curves.min(0), curves.max(0), color=colour, alpha=0.12)
            if all(run.tokens[-1] > 0 for run in runs):
                axes[1][column].plot(np.mean([run.tokens for run in runs], axis=0), curves.mean(0), color=colour)
        axes[0][column].set(title=variant, xlabel="steps")
        axes[1][column].set(xlabel="tokens sampled")
    for row in axes:
        row[0].set_ylabel("Avg@8 on held-out problems, %")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
