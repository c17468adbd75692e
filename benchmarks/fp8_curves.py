"""Compares training in float32, bfloat16 and emulated FP8 on a small experiment: accuracy and loss by step.

    python benchmarks/fp8_curves.py SETTINGS.yaml [KEY=VALUE ...] [--seeds 1,2,3] [--jobs 2] [--out FOLDER]

Each run is `megatron-paint train` in one process with one thread. The runs of a seed differ in the number format alone:
`float32`, `bfloat16`, and bfloat16 with `megatron.fp8_emulate` and the recipes tensorwise and blockwise. FP8 is e4m3
for values and e5m2 for gradients (`megatron.fp8=hybrid`). Finished runs are kept in the folder, so the same command
resumes. It prints tables and writes curves.png into the folder.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import scipy.stats

ROOT = Path(__file__).resolve().parents[1]
ONE_PROCESS = (
    *("megatron.tensor_model_parallel_size=1", "megatron.pipeline_model_parallel_size=1"),
    "megatron.sequence_parallel=false",
)
EMULATED = ("model.dtype=bfloat16", "megatron.fp8=hybrid", "megatron.fp8_emulate=true")
FORMATS = {
    "float32": ("model.dtype=float32",),
    "bfloat16": ("model.dtype=bfloat16",),
    "fp8 tensorwise": (*EMULATED, "megatron.fp8_recipe=tensorwise"),
    "fp8 blockwise": (*EMULATED, "megatron.fp8_recipe=blockwise"),
}
COMPARED_WITH = "bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_curves"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    folders = {(name, seed): options.out / f"{name.replace(' ', '_')}-{seed}" for seed in seeds for name in FORMATS}

    def train(key: tuple[str, int]) -> None:
        name, seed = key
        command = [sys.executable, "-m", "megatron_paint", "train", str(options.settings), "--processes=1", "--quiet"]
        command += [*ONE_PROCESS, *options.overrides, *FORMATS[name]]
        command += [f"run.dir={folders[key]}", "run.resume=auto", f"run.seed={seed}", f"data.seed={seed}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (options.out / f"{folders[key].name}.log").open("w") as log:
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(train, folders))
    evaluations = {key: read_evaluations(folder) for key, folder in folders.items()}
    losses = {key: read_losses(folder) for key, folder in folders.items()}
    print_accuracies(evaluations, seeds)
    print_losses(losses, seeds)
    plot(options.out / "curves.png", evaluations, losses)


def read_evaluations(folder: Path) -> dict[int, float]:
    """Accuracy in % by step."""
    reports = [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("step_*.json"))]
    return {report["step"]: 100 * report["metrics"]["avg"] for report in reports}


def read_losses(folder: Path) -> dict[int, float]:
    """Loss in nats a token by step."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def interval(values: list[float]) -> str:
    """Mean and Student's 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ± {scipy.stats.t.ppf(0.975, len(values) - 1) * error:.2f}"


def print_accuracies(evaluations: dict[tuple[str, int], dict[int, float]], seeds: list[int]) -> None:
    """Mean accuracy at each evaluation, and the difference at the end, paired by seed."""
    steps = list(next(iter(evaluations.values())))
    print(f"Accuracy in %, mean of {len(seeds)} seeds.\n")
    print(f"| format | {' | '.join(f'step {step}' for step in steps)} | last, minus {COMPARED_WITH} |")
    print("|---|" + "---:|" * (len(steps) + 1))
    for name in FORMATS:
        means = [f"{statistics.fmean(evaluations[name, seed][step] for seed in seeds):.1f}" for step in steps]
        last = [evaluations[name, seed][steps[-1]] - evaluations[COMPARED_WITH, seed][steps[-1]] for seed in seeds]
        print(f"| {name} | {' | '.join(means)} | {'' if name == COMPARED_WITH else interval(last)} |")


def print_losses(losses: dict[tuple[str, int], dict[int, float]], seeds: list[int]) -> None:
    """The loss of each fifth of the steps, as a ratio to that of bfloat16 with the same seed."""
    steps = list(next(iter(losses.values())))
    fifths = [steps[i * len(steps) // 5 : (i + 1) * len(steps) // 5] for i in range(5)]
    print(f"\nMean loss, divided by that of {COMPARED_WITH}.\n")
    print(f"| format | {' | '.join(f'steps {part[0]} to {part[-1]}' for part in fifths)} |")
    print("|---|" + "---:|" * len(fifths))
    for name in FORMATS:
        ratios = []
        for part in fifths:
            mine, other = (
                statistics.fmean(losses[which, seed][step] for step in part for seed in seeds)
                for which in (name, COMPARED_WITH)
            )
            ratios.append(f"{mine / other:.3f}")
        print(f"| {name} | {' | '.join(ratios)} |")


def plot(path: Path, evaluations: dict, losses: dict) -> None:
    """Draws accuracy and loss against steps: a thin line for each run, a thick one for each mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, values, label in zip(axes, (evaluations, losses), ("accuracy in %", "loss in nats a token"), strict=True):
        for number, name in enumerate(FORMATS):
            runs = [found for (which, _), found in values.items() if which == name]
            for found in runs:
                axis.plot(list(found), list(found.values()), color=f"C{number}", linewidth=0.5, alpha=0.4)
            means = [statistics.fmean(found[step] for found in runs) for step in runs[0]]
            axis.plot(list(runs[0]), means, color=f"C{number}", label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
