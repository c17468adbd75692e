"""A finished run of the quickstart, made by hand: no model is trained."""

from pathlib import Path

from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.records import Graded
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.checksums import checksums_of, write_checksums
from megatron_paint.runtime.files import NewFolder

ROOT = Path(__file__).parents[2]
SETTINGS = "examples/quickstart/paint.yaml"  # its paths are relative to ROOT
STEPS = 2


def quickstart(run_dir: Path, *overrides: str) -> Settings:
    """Settings of the run."""
    return load_settings(ROOT / SETTINGS, [f"run.dir={run_dir}", f"run.steps={STEPS}", *overrides])


def make_finished_run(run_dir: Path) -> RunFolder:
    """Its folder, with everything that is due after the last step."""
    folder = RunFolder(run_dir)
    folder.prepare(quickstart(run_dir))
    for step in range(1, STEPS + 1):
        folder.append_metrics({"step": step, "loss": 1 / step, "tokens_per_second": 10.0})
        folder.write_samples(step, [sample(step)])
    for step, outcome in ((0, "wrong"), (STEPS, "right")):
        answers = [
            Graded(
                problem_id=f"p{number}",
                sample_index=0,
                response_text="7",
                num_tokens=1,
                finished=True,
                outcome=outcome if number else "right",
                extracted="7",
            )
            for number in range(4)
        ]
        folder.write_eval(build_report(step, "held_out", answers))
    checkpoint = NewFolder(folder.checkpoint_folder(STEPS))
    checkpoint.begin()
    for name in ("__0_0.distcp", "run_state.json"):
        (checkpoint.unfinished / name).write_text(f"contents of {name}")
    write_checksums(checkpoint.unfinished, checksums_of(sorted(checkpoint.unfinished.iterdir())))
    checkpoint.finish(mark=True)
    folder.hf_folder(STEPS).mkdir(parents=True)
    return folder


def sample(step: int) -> dict:
    """A line of the samples of a step. Its ids are tokens of the quickstart's model."""
    return {
        "id": "a",
        "step": step,
        "response_ids": [3, 4, 5],
        "response_text": "",
        "overlap": None,
        "anchors": [],
        "reveal": None,
        "loss": 0.25,
        "selected": [1],
    }
