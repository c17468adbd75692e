"""A run that is killed and resumed equals the unbroken run: to the bit at the same layout, in its data at any other.

`tests/end_to_end/test_resume.py` and `test_soak.py` kill at any moment; here it is the numbers that count: weights, the
optimiser's state, metrics and samples, in both types and over tensor and pipeline parallelism.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_paint.__main__ import run
from tests.data.naive_order import NaiveOrder, first_order
from tests.support import forked_ranks, tiny
from tests.support.exports import same, weights_of_step
from tests.support.marks import long_if_in
from tests.support.results import SAMPLER, events, metrics

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 4, 2  # a checkpoint after every second step; the run is killed in the one after that
SHORT = (
    *("run.resume=auto", f"run.steps={STEPS}", f"run.save_every={SAVED}", "run.export_every=1"),
    *("run.tensorboard=false", "evaluation.problems=null"),
    "objective.loss.positions=random",  # drawn from the sample's key, which the lines of samples thus show
)
TP = ("megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true")
PP = ("megatron.pipeline_model_parallel_size=2",)
CHUNKS = (*PP, "megatron.pipeline_model_parallel_layout=E|t|t|L")  # two on each stage, one of them without a layer
BF16 = ("model.dtype=bfloat16",)
GRPO = ("megatron.pipeline_model_parallel_size=1", "data.problems_per_step=4", "objective.grpo.updates_per_batch=2")
SUPPORT = ("objective.loss.support=initial", "objective.loss.token_weight=divergence", "objective.teacher.weights=ema")
DP = (
    *("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false"),
    "megatron.pipeline_model_parallel_size=1",
)
ADASTAR = ("data.order=adastar", "evaluation.grading_seconds=60")
QUICKSTART = ROOT / "examples" / "quickstart"
CASES = {
    "paint-float32-tp2": TP,
    "paint-float32-pp2": PP,
    "paint-float32-chunks": CHUNKS,
    "paint-bfloat16-tp2": TP + BF16,
    "support-float32-tp2": TP + SUPPORT,
    "paint-bfloat16-pp2": PP + BF16,
    "grpo-bfloat16-tp2": GRPO + BF16,  # killed between the two updates of a step
    "paint-adastar-dp2": (*DP, *ADASTAR, "data.problems_per_step=12"),
    "grpo-adastar-dp2": (*GRPO, *DP, *ADASTAR),
}
# `make test` leaves out cases whose parts the others have: both objectives, types, orders and kinds of parallelism.
LONG = ("paint-float32-pp2", "paint-bfloat16-tp2", "paint-bfloat16-pp2", "support-float32-tp2", "grpo-adastar-dp2")
MARKED = long_if_in(LONG, CASES)
MARKED_ADASTAR = [param for case, param in zip(CASES, MARKED, strict=True) if "adastar" in case]
OTHERS = {"pp2": (2, PP), "chunks": (2, CHUNKS), "one-rank": (1, ()), "dp2": (2, ())}


def killed_after_an_update() -> None:
    """The command line, all of whose ranks die after their N-th update, when what they save stands; N is the last
    argument."""
    from megatron_paint.mcore.policy import MegatronPolicy

    last, done, whole = int(sys.argv.pop()), 0, MegatronPolicy.update

    def update(self, samples, loss, *, lr):
        nonlocal done
        report = whole(self, samples, loss, lr=lr)
        done += 1
        if done == last:
            self.finish_save(wait=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    MegatronPolicy.update = update
    run()


@dataclass(frozen=True)
class Runs:
    """Folders of an unbroken run, of one as a kill left it, and of that one when it had gone on to the end."""

    settings: Path
    unbroken: Path
    killed: Path
    resumed: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], Runs]:
    """The runs of a case, made once."""
    made: dict[str, Runs] = {}
    folder = tmp_path_factory.mktemp("runs")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    paint = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl")

    def of(case: str) -> Runs:
        if case not in made:
            name, example = case.partition("-")[0], case.startswith("grpo") or "adastar" in case
            settings = QUICKSTART / f"{name}.yaml" if example else paint
            made[case] = make_runs(folder / case, settings, (*SHORT, *CASES[case]))
        return made[case]

    return of


def make_runs(folder: Path, settings: Path, arguments: tuple[str, ...]) -> Runs:
    found = Runs(settings, *(folder / name for name in ("unbroken", "killed", "resumed")))
    folder.mkdir()
    # Its checkpoints are written while it waits, the others' while weights change.
    ended = forked_ranks.train(folder, settings, f"run.dir={found.unbroken}", *arguments, "run.async_save=false")
    assert ended.statuses == [0, 0], ended
    a_step = int(metrics(found.unbroken)[0].get("updates", 1))
    command = ("train", settings, f"run.dir={found.killed}", *arguments, "--json", SAVED * a_step + 1)
    ended = forked_ranks.run(folder, *command, target="tests.reliability.test_exactness:killed_after_an_update")
    assert -signal.SIGKILL in ended.statuses, ended
    shutil.copytree(found.killed, found.resumed)
    ended = forked_ranks.train(folder, settings, f"run.dir={found.resumed}", *arguments)
    assert ended.statuses == [0, 0], ended
    assert events(ended, "step") == [("step", step) for step in range(SAVED + 1, STEPS + 1)]
    return found


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 by the file's name."""
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", MARKED)
def test_a_killed_run_has_the_weights_and_the_optimiser_of_an_unbroken_one(case, runs):
    """Exports are the same bytes, and so are a checkpoint's .distcp files, which hold the optimiser's state too.

    Megatron-Core 0.16 writes what all ranks share into common.pt, 0.19 into a .distcp file.
    """
    found = runs(case)
    for step in range(1, STEPS + 1):
        exported = [
            digests(run / "hf" / f"step_{step:06d}", "*.safetensors") for run in (found.resumed, found.unbroken)
        ]
        assert exported[0] == exported[1], step
        assert exported[0]
    for step in (SAVED, STEPS):
        saved = [
            digests(run / "checkpoints" / f"step_{step:06d}", "*.distcp", "common.pt")
            for run in (found.resumed, found.unbroken)
        ]
        assert saved[0] == saved[1], step
        assert {"__0_0.distcp", "__1_0.distcp"} <= saved[0].keys()
    before, after = (weights_of_step(found.unbroken, step) for step in (SAVED, STEPS))
    assert not same(before, after)


@pytest.mark.parametrize("case", MARKED)
def test_a_killed_run_has_the_metrics_and_the_samples_of_an_unbroken_one(case, runs):
    found = runs(case)
    assert metrics(found.resumed) == metrics(found.unbroken)
    names = [f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)]
    assert sorted(digests(found.unbroken / "samples", "*")) == names
    assert digests(found.resumed / "samples", "*") == digests(found.unbroken / "samples", "*")


@pytest.mark.parametrize("layout", OTHERS)
def test_a_run_goes_on_at_another_layout_with_the_same_data(layout, runs, tmp_path):
    """Problems, their order and all keys stay; so do the responses to the weights of the checkpoint.

    From then on rounding may part them: another layout adds in another order, so that weights differ in their last
    digits, and now and then a token does, whose random number lies between the two sums. In bfloat16, with its three
    digits, the first responses part already.
    """
    found, run = runs("paint-float32-tp2"), tmp_path / "run"
    shutil.copytree(found.killed, run)
    processes, arguments = OTHERS[layout]
    ended = forked_ranks.train(tmp_path, found.settings, f"run.dir={run}", *SHORT, *arguments, processes=processes)
    assert ended.statuses == [0] * processes, ended
    assert events(ended, "step") == [("step", step) for step in range(SAVED + 1, STEPS + 1)]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        ours, theirs = samples(run, step), samples(found.unbroken, step)
        keys = ("id", "step", "sample", "student_prompt_ids")
        if step <= SAVED + 1:
            keys += ("response_ids", "finished", "teacher_prompt_ids", "reveal", "selected")
        assert [[line[key] for key in keys] for line in ours] == [[line[key] for key in keys] for line in theirs], step
        assert any(line["selected"] for line in ours)
    first = SAVED + 1
    assert metrics(run)[first - 1]["loss"] == pytest.approx(metrics(found.unbroken)[first - 1]["loss"], rel=1e-6)
    ours, theirs = weights_of_step(run, first), weights_of_step(found.unbroken, first)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6  # a step moves them by 1e-3


def check_order(run: Path, case: str) -> list[list[str]]:
    """Checks the batches and the saved visits of a run against the naive rule. Returns the batches.

    The verdicts are read from the text of the responses: the quickstart's answers are whole numbers in a box.
    """
    answers = {row["id"]: row["answer"] for row in map(json.loads, (QUICKSTART / "train.jsonl").open())}
    naive = NaiveOrder(first_order(list(answers)), 12 if case.startswith("paint") else 4)
    batches, lines = [], metrics(run)
    for step in range(1, STEPS + 1):
        verdicts: dict[str, list[bool]] = {}
        for line in samples(run, step):
            boxes = re.findall(r"\\boxed\{(.*?)\}", line["response_text"])
            verdicts.setdefault(line["id"], []).append(boxes[-1:] == [answers[line["id"]]])
        assert list(verdicts) == naive.batch(), step
        batches.append(list(verdicts))
        assert lines[step - 1]["order/promoted"] == naive.record(step, verdicts)
        votes = [vote for of_problem in verdicts.values() for vote in of_problem]
        assert lines[step - 1]["order/accuracy"] == lines[step - 1]["reward/mean"] == sum(votes) / len(votes)
        if step % SAVED == 0:
            state = json.loads((run / "checkpoints" / f"step_{step:06d}" / "run_state.json").read_text())
            assert state["order"] == {"rule": "adastar", "visits": naive.visited}
    return batches


@pytest.mark.parametrize("case", MARKED_ADASTAR)
def test_the_order_of_the_problems_follows_the_verdicts(case, runs):
    """A part of each batch comes again in the next one."""
    found = runs(case)
    batches = check_order(found.unbroken, case)
    assert check_order(found.resumed, case) == batches
    repeated = [len({*before} & {*after}) for before, after in itertools.pairwise(batches)]
    assert all(0 < count < len(batches[0]) for count in repeated), repeated


@pytest.mark.parametrize("case", MARKED_ADASTAR)
def test_the_order_continues_at_another_layout(case, runs, tmp_path):
    """The batch after the checkpoint is that of the unbroken run. Later ones follow this run's own verdicts."""
    found, run = runs(case), tmp_path / "run"
    shutil.copytree(found.killed, run)
    arguments = (*SHORT, *CASES[case], "megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true")
    ended = forked_ranks.train(tmp_path, found.settings, f"run.dir={run}", *arguments)
    assert ended.statuses == [0, 0], ended
    first = SAVED + 1
    assert check_order(run, case)[:first] == check_order(found.unbroken, case)[:first]


def test_replayed_rollouts_give_the_same_order(runs, tmp_path):
    found, run = runs("paint-adastar-dp2"), tmp_path / "run"
    replay = ("rollout.engine=replay", f"rollout.path={found.unbroken / 'samples'}")
    arguments = (f"run.dir={run}", *SHORT, *CASES["paint-adastar-dp2"])
    ended = forked_ranks.train(tmp_path, found.settings, *arguments, *replay)
    assert ended.statuses == [0, 0], ended
    assert metrics(run, without=SAMPLER) == metrics(found.unbroken, without=SAMPLER)
    rest = shutil.copytree(found.unbroken / "samples", tmp_path / "rest", ignore=lambda *_: ["step_000003.jsonl"])
    replay = ("rollout.engine=replay", f"rollout.path={rest}")
    message = forked_ranks.train(tmp_path, found.settings, *arguments, *replay, f"run.dir={tmp_path / 'other'}").message
    assert "has no rollout for step 3, problem " in message
