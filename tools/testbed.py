"""Measures the effect of each part of PAINT on small models, in hundreds of training runs: `make testbed`.

examples/testbed/README.md describes the design. The tool warms up models, trains each run in one process of
`megatron-paint train` and writes a report from the run folders. It keeps finished models and runs, so the same command
resumes an interrupted testbed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from testbed_report import BASELINE, commit_file, is_done, present_commit, write_report
from testbed_variants import VARIANTS
from warm_up_rows import draw_problems, write_problems

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "testbed"
METHODS = ("sft", "grpo", "opsd", "paint", "mask_only", "support_005", "paint_support")
FURTHER = ("interpolation_only",)
ON_EVERY_VARIANT = (*METHODS, "hidden_050")  # also without --full
CONTROLS = tuple(sorted(path.stem for path in (EXAMPLES / "controls").glob("*.yaml")))
ALL_METHODS = (*METHODS, *FURTHER, *CONTROLS)
CONTROLS_ON = "own"
# What is judged beside the support where a shown solution spoils the teacher, and where it does so and hiding costs.
BEYOND = (
    *("support_001", "support_020", "support_student", "partner_initial", "weight_position", "weight_divergence"),
    *("shortest_correct", "peer_rollout", "other_example", "adastar"),
)
BEYOND_ON = ("leaky", "leaky_weak")
WARM_UPS = (11, 12, 13)
SEEDS, FULL_SEEDS, CONTROL_SEEDS = (1, 2), (1, 2, 3, 4), (1,)  # for each warm-up
TEST_PROBLEMS, VALIDATION_PROBLEMS, PROBLEM_SEED = 400, 200, 8
STEPS = 60
TUNED, TUNED_ON = ("sft", "grpo", "opsd", "paint", "support_005"), "own"
TUNING_RATES = (1.0e-4, 2.0e-4, 5.0e-4, 1.0e-3)
TUNING_SEED = 9
SCORES = "validation Avg@8"  # key of learning_rates.json


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: its settings file, model, seed and folder."""

    variant: str
    method: str
    warm_up: int
    seed: int
    folder: Path
    lr: float
    problems: str = "test"
    steps: int = STEPS

    def command(self, models: Path) -> list[str]:
        model = models / f"{self.variant}-{self.warm_up}"
        file = EXAMPLES / f"{self.method}.yaml"
        if not file.exists():
            file = EXAMPLES / "controls" / f"{self.method}.yaml"
        return [
            *(sys.executable, "-m", "megatron_paint", "train", str(file), "--processes", "1", "--quiet"),
            f"model.hf_path={model / 'model'}",
            f"data.train={model / 'train.jsonl'}",
            f"evaluation.problems={model / self.problems}.jsonl",
            f"optimizer.lr={self.lr!r}",
            f"run.dir={self.folder}",
            f"run.steps={self.steps}",
            f"run.evaluate_every={self.steps // 3}",
            f"run.seed={self.seed}",
            f"data.seed={self.seed}",
            *VARIANTS[self.variant].settings,
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/testbed"), help="models, runs, report (runs/testbed)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel processes with one thread each (default 2)")
    parser.add_argument("--full", action="store_true", help="more seeds, and the controls on every variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="list with commas; default: all")
    parser.add_argument("--methods", help="list with commas; default: all of this size")
    parser.add_argument("--warm-ups", default=",".join(map(str, WARM_UPS)), help="seeds of the models, with commas")
    parser.add_argument("--seeds", help="seeds of each warm-up, with commas; default: those of this size")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a run; another number makes other runs (60)")
    parser.add_argument("--report-only", action="store_true", help="only write the report from the finished runs")
    parser.add_argument("--baseline", default=BASELINE, help=f"method that the others are paired with ({BASELINE})")
    options = parser.parse_args()
    if options.baseline not in ALL_METHODS:
        parser.error(f"--baseline={options.baseline} is not one of {', '.join(ALL_METHODS)}")
    options.out = options.out.resolve()
    warm_ups = [int(seed) for seed in options.warm_ups.split(",")]
    variants = options.variants.split(",")
    if not options.report_only:
        make_models(options.out / "models", warm_ups, variants, jobs=options.jobs)
        rates = tune(options.out, warm_ups[0], set(map(tuned_as, methods_of(options))), jobs=options.jobs)
        runs = planned(options, variants, warm_ups, rates)
        carry_out(runs, options.out / "models", jobs=options.jobs)
    name = runs_name(options.steps)
    write_report(options.out, METHODS + FURTHER, CONTROLS, name=name, baseline=options.baseline)


def runs_name(steps: int) -> str:
    """Returns the name of the folder with all runs of this number of steps."""
    return "runs" if steps == STEPS else f"runs_of_{steps}_steps"


def methods_of(options: argparse.Namespace) -> list[str]:
    """Returns the methods that were asked for, else all."""
    return options.methods.split(",") if options.methods else list(ALL_METHODS)


def planned(
    options: argparse.Namespace, variants: Sequence[str], warm_ups: Sequence[int], rates: dict[str, float]
) -> list[Run]:
    """Returns all runs. Runs that every table needs are the first."""
    seeds = FULL_SEEDS if options.full else SEEDS
    if options.seeds:
        seeds = tuple(map(int, options.seeds.split(",")))
    methods, found = methods_of(options), []
    for seed in seeds:
        for warm_up in warm_ups:
            for variant in variants:
                for method in methods:
                    main_run = method in ON_EVERY_VARIANT or options.full
                    judged_here = variant == CONTROLS_ON or (method in BEYOND and variant in BEYOND_ON)
                    control = judged_here and seed in CONTROL_SEEDS
                    if main_run or control or options.methods:
                        lr = rates[tuned_as(method)]
                        runs = options.out / runs_name(options.steps)
                        found.append(
                            Run(
                                variant=variant,
                                method=method,
                                warm_up=warm_up,
                                seed=seed,
                                folder=runs / variant / method / f"{warm_up}-{seed}",
                                lr=lr,
                                steps=options.steps,
                            )
                        )
    return found


def tuned_as(method: str) -> str:
    """Returns the method whose learning rate this method takes."""
    if method in TUNED:
        return method
    return "support_005" if method.startswith("support_") else "paint"


def make_models(models: Path, warm_ups: Sequence[int], variants: Sequence[str], *, jobs: int) -> None:
    """Makes the model and problems of every warm-up and variant, and first those that they start from."""

    def make(warm_up: int, variant: str) -> None:
        folder, kind = models / f"{variant}-{warm_up}", VARIANTS[variant]
        if (folder / "test.jsonl").exists():
            return
        command = [sys.executable, str(ROOT / "tools" / "make_quickstart_model.py"), str(folder), f"--seed={warm_up}"]
        command += ["--variant", variant]
        if kind.start is not None:
            command += ["--start", str(models / f"{kind.start}-{warm_up}" / "model")]
        run_logged(command, models / f"{variant}-{warm_up}.log")
        drawn = draw_problems(TEST_PROBLEMS + VALIDATION_PROBLEMS, held_out=True, seed=PROBLEM_SEED, variant=kind)
        write_problems(folder / "validation.jsonl", drawn[TEST_PROBLEMS:], **kind.columns)
        write_problems(folder / "test.jsonl", drawn[:TEST_PROBLEMS], **kind.columns)

    models.mkdir(parents=True, exist_ok=True)
    starts = {VARIANTS[variant].start or variant for variant in [*variants, TUNED_ON]}
    with ThreadPoolExecutor(jobs) as pool:
        for wave in (sorted(starts), [variant for variant in variants if variant not in starts]):
            pairs = [(warm_up, variant) for variant in wave for warm_up in warm_ups]
            list(pool.map(lambda pair: make(*pair), pairs))


def tune(out: Path, warm_up: int, methods: Collection[str], *, jobs: int) -> dict[str, float]:
    """Returns the learning rates of these methods of TUNED: the best of four, on problems and a seed of no table.

    Methods that `learning_rates.json` already has keep their rates.
    """
    file = out / "learning_rates.json"
    table = json.loads(file.read_text()) if file.exists() else {"chosen": {}, SCORES: {}}
    missing = [method for method in TUNED if method in methods and method not in table["chosen"]]
    if not missing:
        return table["chosen"]
    runs = [
        Run(
            variant=TUNED_ON,
            method=method,
            warm_up=warm_up,
            seed=TUNING_SEED,
            folder=out / "tuning" / method / f"{lr:g}",
            lr=lr,
            problems="validation",
        )
        for method in missing
        for lr in TUNING_RATES
    ]
    carry_out(runs, out / "models", jobs=jobs)
    for method in missing:
        found = {run.lr: final_accuracy(run.folder) for run in runs if run.method == method}
        table["chosen"][method] = max(found, key=found.__getitem__)
        table[SCORES][method] = found
    file.write_text(json.dumps(table, indent=1) + "\n")
    return table["chosen"]


def final_accuracy(folder: Path) -> float:
    last = max((folder / "eval").glob("step_*.json"))
    return json.loads(last.read_text())["metrics"]["avg"]


def carry_out(runs: Sequence[Run], models: Path, *, jobs: int) -> None:
    """Trains the unfinished runs, `jobs` at a time. Failed runs are reported at the end, after all others."""
    unfinished = [run for run in runs if not is_done(run.folder)]
    failed: list[Path] = []

    def one(numbered: tuple[int, Run]) -> None:
        number, run = numbered
        log = run.folder.parent / f"{run.folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            commit_file(run.folder).write_text(present_commit() + "\n")
            run_logged(run.command(models), log)
            # Text and newline in one write, because other threads print too.
            accuracy = 100 * final_accuracy(run.folder)
            print(f"{number}/{len(unfinished)} {run.folder}: {accuracy:.1f} %\n", end="", flush=True)
        except subprocess.CalledProcessError:
            failed.append(log)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, enumerate(unfinished, start=1)))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; see {', '.join(map(str, failed[:3]))}")


def run_logged(command: Sequence[str], log: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
