"""The loop with a policy that only takes notes: what is done after which step, by whom, and after a resume."""

import itertools
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.data.order import AdaStarOrder, ShuffledOrder
from megatron_paint.data.problems import ProblemSet
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.mcore import ranks as ranks_module
from megatron_paint.records import Graded, Problem, Rollout, SamplerGap, SampleScore, StepResult
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.loggers.loggers import Loggers
from megatron_paint.runtime.files import NewFolder
from megatron_paint.runtime.pace import Pace
from megatron_paint.training import start
from megatron_paint.training.loop import Run
from megatron_paint.training.recorder import Recorder
from megatron_paint.training.self_check import self_check
from tests.run.loggers.stand_ins import Recorded

ANSWER = Graded(
    problem_id="a", sample_index=0, response_text="", num_tokens=1, finished=True, outcome="right", extracted=None
)


class Notes(list):
    """A policy, an objective with its rollouts, and an evaluator that note what they are asked for."""

    begun = None  # a checkpoint's folder

    def save(self, folder, state):
        self.append(("save", state["step"]))
        self.state = state
        self.begun = folder

    def finish_save(self, *, wait):
        begun, self.begun = self.begun, None
        if begun is not None:
            self._write(begun, mark=True)
        return begun is not None

    def state_dict(self, *, wait):
        return {"waited": wait}

    def export(self, folder, *, card):
        self.card = card
        self.append(("export", int(folder.name[-6:])))
        self._write(folder, mark=False)

    def step(self, policy, problems, *, step, lr, timer):
        self.append(("step", step))
        return StepResult(samples=(), scores=(), updates=())

    def sample(self, sampler):
        return "answers"

    def sync_weights(self, step):
        self.synced, self.released = step, False

    def release_memory(self):
        self.released = True

    def metrics(self):
        return {}

    def report(self, answers, *, step, benchmark, graders):
        assert self.synced == step + 1  # it samples with the weights after this step
        assert self.released
        self.append(("evaluate", step))
        return build_report(step, benchmark, [ANSWER])

    def _write(self, folder, *, mark):
        made = NewFolder(folder)
        made.begin()
        made.finish(mark=mark)


def settings(path, **run):
    changes = {"steps": 5, "save_every": 2, "export_every": 3, "evaluate_every": 2, "resume": "auto", **run}
    return settings_of({"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": str(path), **changes}})


def attempt(
    path,
    *,
    on_rank_zero=lambda act: act(),
    stop_reason=lambda seconds: None,
    notes=None,
    pace=None,
    order=None,
    loggers=(),
    **run,
) -> Notes:
    """One attempt of a run; what it did."""
    made, notes = settings(path, **run), Notes() if notes is None else notes
    folder, progress = RunFolder(path), Progress("silent", steps=made.run.steps)
    prompts = SimpleNamespace(response_text=str)
    Run(
        settings=made,
        folder=folder,
        policy=notes,
        problems=None,
        order=order or ShuffledOrder(SimpleNamespace(batch=lambda step: [])),
        objective=notes,
        rollouts=notes,
        sampler=notes,
        evaluator=notes,
        recorder=Recorder(
            settings=made,
            folder=folder,
            progress=progress,
            prompts=prompts,
            graders=None,
            loggers=Loggers(loggers, samples_every=2),
        ),
        progress=progress,
        start=folder.prepare(made),
        on_rank_zero=on_rank_zero,
        stop_reason=stop_reason,
        pace=pace or Pace(),
    ).train()
    return notes


def test_a_logger_gets_steps_and_evaluations_and_one_that_fails_ends_no_run(tmp_path):
    kept, broken = Recorded(), Recorded("broken", fails={"metrics": [OSError("no route")]})
    notes = attempt(tmp_path, loggers=[broken, kept])
    assert [step for kind, step in notes if kind == "step"] == [1, 2, 3, 4, 5]
    calls = [call[:2] for call in kept.calls]
    assert calls == [
        *[("metrics", 0), ("metrics", 1), ("samples", 1)],
        *[("metrics", 2), ("samples", 2), ("metrics", 2)],  # of the step and of the evaluation after it
        *[("metrics", 3), ("metrics", 4), ("samples", 4), ("metrics", 4)],
        *[("metrics", 5), ("metrics", 5), ("close", "finished")],
    ]
    assert kept.calls[1][2]["loss"] == 0.0
    assert broken.calls == []


def evaluated_steps(card):
    """The steps in the table of evaluations of a model card."""
    return [int(line.split("|")[1]) for line in card.splitlines() if line.startswith(("| 0 |", "| 4 |", "| 5 |"))]


def test_the_model_card_has_the_evaluation_of_its_step(tmp_path):
    """The export comes before the evaluation of the same step, which is added to the card afterwards."""
    notes = attempt(tmp_path)
    folder = RunFolder(tmp_path)
    assert "# m, PAINT, step 5\n" in notes.card
    assert evaluated_steps(notes.card) == [0, 4]
    assert evaluated_steps((folder.hf_folder(5) / "README.md").read_text()) == [0, 5]
    assert not (folder.hf_folder(3) / "README.md").exists()  # this policy writes none, and no evaluation came after it


def test_what_follows_which_step(tmp_path):
    notes = attempt(tmp_path)
    assert notes == [
        *[("evaluate", 0), ("step", 1)],
        *[("step", 2), ("save", 2), ("evaluate", 2)],
        *[("step", 3), ("export", 3)],
        *[("step", 4), ("save", 4), ("evaluate", 4)],
        *[("step", 5), ("save", 5), ("export", 5), ("evaluate", 5)],
    ]
    assert notes.state["settings"]["run"]["save_every"] == 2
    assert notes.state["ahead"] == {"waited": True}
    assert attempt(tmp_path) == []


@pytest.mark.parametrize(
    ("missing", "done"),
    [
        (["eval/step_000005.json"], [("evaluate", 5)]),
        (["hf/step_000005", "eval/step_000005.json"], [("export", 5), ("evaluate", 5)]),
        (
            ["checkpoints/step_000005", "hf/step_000005", "eval/step_000005.json", "eval/step_000004.json"],
            [("evaluate", 4), ("step", 5), ("save", 5), ("export", 5), ("evaluate", 5)],
        ),
        (["checkpoints/step_000005"], [("step", 5), ("save", 5), ("export", 5), ("evaluate", 5)]),
        (["hf/step_000003"], []),  # due after a step that is no checkpoint's
    ],
)
def test_a_resumed_run_does_what_is_due_and_missing(tmp_path, missing, done):
    attempt(tmp_path)
    for name in missing:
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name.replace('/', '-')}")
    assert attempt(tmp_path) == done


def test_the_table_compares_with_the_evaluation_of_step_0(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(Progress, "end", lambda self, **values: ends.append(values))
    attempt(tmp_path)
    attempt(tmp_path)
    assert ends[0] == ends[1]
    assert [report.step for report in (*ends[1]["before"], *ends[1]["after"])] == [0, 5]


def test_a_longer_run_goes_on(tmp_path):
    attempt(tmp_path)
    assert attempt(tmp_path, steps=6) == [
        *[("step", 6), ("save", 6), ("export", 6), ("evaluate", 6)],
    ]


@pytest.mark.parametrize(
    ("asks", "done"),
    [
        (1, []),
        (2, [("evaluate", 0)]),
        (3, [("evaluate", 0), ("step", 1), ("save", 1)]),
        (5, [("evaluate", 0), ("step", 1), ("step", 2), ("save", 2), ("evaluate", 2)]),
    ],
)
def test_a_run_stops_where_it_is_asked_to(tmp_path, asks, done):
    """By the n-th time that it asks; then it has a checkpoint, and what is left is done by the next attempt."""
    times = itertools.count(1)
    notes = attempt(tmp_path, stop_reason=lambda seconds: "SIGUSR1" if next(times) == asks else None)
    assert notes == done
    assert RunFolder(tmp_path).checkpoints() == [step for what, step in done if what == "save"]
    if done[-1:] == [("save", 1)]:  # a checkpoint that only the stop asks for does not wait for rollouts
        assert notes.state["ahead"] == {"waited": False}
    assert [line["step"] for line in RunFolder(tmp_path).read_metrics()] == [s for what, s in done if what == "step"]
    assert attempt(tmp_path)[-3:] == [("save", 5), ("export", 5), ("evaluate", 5)]


def test_what_is_next_must_fit_into_the_time_that_is_left(tmp_path):
    """A step takes 2 s and an evaluation 20 s: after a step it is asked whether there is time for what is due."""
    now = [0.0]

    class Slow(Notes):
        def step(self, *_, **values):
            now[0] += 2.0
            return super().step(*_, **values)

        def report(self, *_, **values):
            now[0] += 20.0
            return super().report(*_, **values)

    asked = []
    attempt(tmp_path, stop_reason=asked.append, notes=Slow(), pace=Pace(clock=lambda: now[0]))
    # Before the evaluation of step 0 and after it, after step 1, and after step 2 and what is due there.
    assert asked[:5] == [0.0, 0.0, 2.0, 20.0, 2.0]


def test_a_running_save_is_finished_where_the_run_ends_by_an_error(tmp_path):
    class Breaking(Notes):
        def step(self, *_, step, **values):
            if step == 3:
                raise UserError("the third step")
            return super().step(*_, step=step, **values)

        def finish_save(self, *, wait):
            return super().finish_save(wait=wait) if wait else False

    with pytest.raises(UserError, match=r"^the third step$"):
        attempt(tmp_path, notes=Breaking())
    assert RunFolder(tmp_path).checkpoints() == [2]

    class Full(Breaking):
        def finish_save(self, *, wait):
            if wait and self.begun is not None:
                raise UserError("full")
            return False

    with pytest.raises(UserError, match=r"^the third step. And the checkpoint .* is not complete: full$"):
        attempt(tmp_path / "full", notes=Full())


def test_only_the_first_rank_writes(tmp_path):
    attempt(tmp_path / "first")
    notes = attempt(tmp_path / "other", on_rank_zero=lambda act: None)
    assert ("step", 5) in notes
    written = {path.name for kind in ("samples", "eval") for path in (tmp_path / "other" / kind).iterdir()}
    assert written == set()
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == ""
    assert len((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()) == 5


class AllRight(Notes):
    """Notes the problems of each step; all rollouts are right, and a step of `broken` has no finite loss."""

    def __init__(self, broken=()):
        self.broken = broken

    def step(self, policy, problems, *, step, lr, timer):
        ids = [problem.id for problem in problems]
        self.append((step, *ids))
        if step in self.broken:
            raise FloatingPointError("loss is not finite")
        return StepResult(samples=(), scores=(), updates=(), verdicts={name: (True, True) for name in ids})


def four_problems():
    return AdaStarOrder(ProblemSet(tuple(Problem(id=i, problem="", solution="", answer="") for i in "abcd"), 2, 1))


def test_a_skipped_step_is_not_counted_by_the_order(tmp_path):
    """Its problems come again, and the state has neither lost them nor counted them twice."""
    order, notes = four_problems(), AllRight(broken=(2, 3))
    attempt(tmp_path, notes=notes, order=order, max_skipped_steps=2, steps=5, save_every=0, export_every=0)
    batches = {entry[0]: entry[1:] for entry in notes if isinstance(entry[0], int)}
    assert batches[2] == batches[3] == batches[4] != batches[1]
    assert batches[5] == batches[1]
    assert {*batches[1], *batches[2]} == set("abcd")
    visits = notes.state["order"]["visits"]
    assert visits == {name: [step, 2, 2] for step in (4, 5) for name in batches[step]}
    lines = RunFolder(tmp_path).read_metrics()
    assert [line.get("order/promoted") for line in lines] == [2, None, None, 2, 2]
    assert [line.get("order/oldest_visit") for line in lines] == [0, None, None, 1, 4]
    assert [line.get("order/accuracy") for line in lines] == [1.0, None, None, 1.0, 1.0]


def test_shuffled_problems_have_no_state(tmp_path):
    assert "order" not in attempt(tmp_path).state


@pytest.mark.parametrize(
    ("ranks", "fails", "stops"), [(2, None, True), (2, UserError("full"), False), (1, UserError("full"), True)]
)
def test_groups_are_taken_down_where_nobody_can_be_waited_for(monkeypatch, ranks, fails, stops, tmp_path):
    stopped = []

    def prepare(*_, **__):
        if fails:
            raise fails
        recorder = SimpleNamespace(prompts=None)
        return SimpleNamespace(
            policy=None,
            sampler=SimpleNamespace(sync_weights=lambda step: None, release_memory=lambda: None),
            problems=None,
            recorder=recorder,
            progress=None,
            start=0,
            train=lambda: None,
        )

    monkeypatch.setattr(ranks_module, "start_ranks", lambda *_, **__: SimpleNamespace(size=ranks))
    monkeypatch.setattr(ranks_module, "stop_ranks", lambda: stopped.append(True))
    monkeypatch.setattr(start, "prepare", prepare)
    monkeypatch.setattr(start, "self_check", lambda *_: None)
    with pytest.raises(UserError) if fails else ExitStack():
        start.train(settings(tmp_path))
    assert stopped == ([True] if stops else [])


def check(tmp_path, evaluate_loss):
    problem = Problem(id="a", problem="", solution="", answer="")
    rollout = Rollout(
        problem_id="a", sample_index=0, prompt_ids=(1,), response_ids=(2, 3), logprobs=(0.0, 0.0), finished=True
    )
    policy = SimpleNamespace(evaluate_loss=evaluate_loss)
    sampler = SimpleNamespace(generate=lambda requests, sampling: [rollout] * len(requests))
    problems = SimpleNamespace(batch=lambda step: [problem] * 2)
    prompts = SimpleNamespace(student_prompt=lambda problem: (1,), tokenizer=SimpleNamespace(stop_ids=(3,)))
    self_check(settings(tmp_path), policy, sampler, problems, prompts, Progress("silent", steps=1))


def scores(loss=0.0, gap=0.0):
    differs = SamplerGap(largest=gap, position=0, total=gap, above=0)
    score = SampleScore(loss_sum=loss, num_tokens=2, loss_tokens=2, sampler_gap=differs)
    return lambda samples, *_, **__: [score] * len(samples)


def test_a_model_that_differs_from_itself_is_refused(tmp_path):
    check(tmp_path, scores(loss=0.1))
    for loss in (0.102, float("nan")):
        with pytest.raises(UserError, match=r"self-check: the model differs from itself .*self_check_limit=0\.05"):
            check(tmp_path, scores(loss=loss))


def test_a_sampler_that_differs_from_the_trainer_is_refused(tmp_path):
    check(tmp_path, scores(gap=1.0))
    for gap in (1.001, float("nan")):
        with pytest.raises(UserError, match=r"self-check: sampler and trainer differ .*sampler_gap_limit=1"):
            check(tmp_path, scores(gap=gap))


def test_weights_that_are_not_finite_are_a_user_error(tmp_path):
    def evaluate_loss(*_, **__):
        raise FloatingPointError("rank 0: loss is nan")

    with pytest.raises(UserError, match=r"self-check: rank 0: loss is nan\. The weights of m are damaged"):
        check(tmp_path, evaluate_loss)
