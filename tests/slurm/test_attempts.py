"""What follows an attempt, decided from run folders made by hand."""

from itertools import count

import pytest

from megatron_paint.launch.slurm.attempts import begin, end, idle_attempts, main, record_launch
from megatron_paint.run.folder import RunFolder


class Run:
    """A run folder and the attempts of its jobs."""

    def __init__(self, path) -> None:
        self.path = path
        self.folder = RunFolder(path)
        self.restarts = count()
        path.mkdir()

    def configure(self, *, steps=100, problems="null"):
        self.folder.config_file.write_text(
            f"model: {{hf_path: m}}\ndata: {{train: t}}\nevaluation: {{problems: {problems}}}\n"
            f"run: {{dir: r, steps: {steps}, save_every: 25}}\n"
        )

    def write(self, kind, step):
        place = self.path / kind / f"step_{step:06d}"
        place.mkdir(parents=True)
        if kind == "checkpoints":
            (place / "complete").touch()

    def attempt(self, status, *, checkpoint=None, ends=True, bad_nodes=()):
        """One attempt of a job; the words of its begin and its end."""
        environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(next(self.restarts)), "SLURM_JOB_NODELIST": "n[1-2]"}
        first = begin(self.path, environ)[0]
        if checkpoint is not None:
            self.write("checkpoints", checkpoint)
        return first, (end(self.path, status, environ, bad_nodes=bad_nodes)[0] if ends else None)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_done_is_the_last_checkpoint_and_all_that_is_due(run):
    run.configure(problems="held_out.jsonl")
    assert run.attempt(0, checkpoint=100) == ("go", "next")
    run.write("hf", 100)
    (run.path / "eval").mkdir()
    assert end(run.path, 0, {})[0] == "next"
    (run.path / "eval" / "step_000100.json").write_text("{}")
    assert end(run.path, 0, {}) == ("done", "all 100 steps, and everything that was due after them")
    assert begin(run.path, {})[0] == "done"


def test_an_incomplete_checkpoint_is_none(run):
    run.configure()
    run.write("hf", 100)
    (run.path / "checkpoints" / "step_000100").mkdir(parents=True)
    assert run.attempt(0) == ("go", "next")
    assert RunFolder(run.path).read_attempts()[-1]["checkpoint"] == 0


@pytest.mark.parametrize("status", [0, 1, 75, 143])
def test_a_run_with_progress_continues_whatever_the_status(run, status):
    run.configure()
    for step in (25, 50, 75):
        assert run.attempt(status, checkpoint=step) == ("go", "next")


def test_two_attempts_without_progress_stop(run):
    run.configure()
    words = [
        run.attempt(1, checkpoint=25),
        run.attempt(1),
        run.attempt(1, checkpoint=50),
        run.attempt(1),
        run.attempt(0),
    ]
    assert [last for _, last in words] == ["next", "next", "next", "next", "stop"]
    reason = (run.path / "STOPPED").read_text()
    assert reason == (
        "2 attempts in a row ended without a checkpoint newer than step 50, the last one with exit status 0\n"
    )
    assert begin(run.path, {}) == ("stop", reason.strip())


def test_attempts_that_never_ended_count(run):
    """For example if a node dies, or training exceeds its time limit."""
    assert run.attempt(1, ends=False) == ("go", None)
    assert run.attempt(1, ends=False) == ("go", None)
    word, reason = begin(run.path, {})
    assert (word, reason) == ("stop", "2 attempts in a row ended without a checkpoint newer than step 0")


def test_attempts_that_name_new_bad_nodes_are_not_idle(run):
    """But they do not cancel earlier idle attempts either."""
    named = [["n1"], ["n2", "n1"], [], ["n3"], ["n1", "n2"]]
    words = [run.attempt(3, bad_nodes=nodes)[1] for nodes in named]
    assert words == ["next", "next", "next", "next", "stop"]
    record_launch(run.path, steps=100)
    assert [run.attempt(3, bad_nodes=nodes)[1] for nodes in (["n1"], ["n1"], ["n1"])] == ["next", "next", "stop"]


def test_an_attempt_that_another_one_has_followed_decides_nothing(run):
    """The node was cut off, so its script still runs, while Slurm has restarted the job on other nodes."""
    lost = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    begin(run.path, lost)
    begin(run.path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    word, reason = end(run.path, 2, lost)
    assert (word, "restart 1 of job 7 began in the meantime" in reason) == ("next", True)
    assert not (run.path / "STOPPED").exists()


def test_a_mistake_stops_at_once(run):
    run.configure()
    assert run.attempt(2, checkpoint=25) == ("go", "stop")
    assert (run.path / "STOPPED").read_text().startswith("exit status 2: a mistake in the settings or the data")


def test_a_launch_restarts_the_count(run):
    run.configure()
    assert [run.attempt(1)[1], run.attempt(1)[1]] == ["next", "stop"]
    record_launch(run.path, steps=100)
    assert not (run.path / "STOPPED").exists()
    assert [run.attempt(1), run.attempt(1)] == [("go", "next"), ("go", "stop")]


def test_a_launch_with_more_steps_is_not_done_before_it_trained(run):
    """config.yaml is of the earlier launch until training writes it again."""
    run.configure(steps=100)
    run.write("hf", 100)
    assert run.attempt(0, checkpoint=100) == ("go", "done")
    record_launch(run.path, steps=200)
    assert run.attempt(3) == ("go", "next")
    run.configure(steps=200)
    run.write("hf", 200)
    assert run.attempt(0, checkpoint=200) == ("go", "done")


@pytest.mark.parametrize(
    ("starts", "now", "idle"), [([], 0, 0), ([0], 0, 1), ([0], 25, 0), ([0, 25, 25], 25, 2), ([0, 0, 25], 50, 0)]
)
def test_idle_attempts(starts, now, idle):
    assert idle_attempts([{"event": "begin", "checkpoint": step} for step in starts], now) == idle


def test_records_and_a_line_cut_short(run):
    run.attempt(75, checkpoint=25)
    with open(run.path / "attempts.jsonl", "a") as file:
        file.write('{"event": "beg')
    first, last = RunFolder(run.path).read_attempts()
    assert (first["event"], first["job"], first["restart"], first["nodes"], first["checkpoint"]) == (
        *("begin", "7", 0, "n[1-2]", 0),
    )
    assert (last["event"], last["status"], last["decision"], last["checkpoint"]) == ("end", 75, "next", 25)
    assert first["time"] <= last["time"]


def test_a_line_cut_short_does_not_swallow_the_next_begin(run):
    run.attempt(75, checkpoint=25)
    with open(run.path / "attempts.jsonl", "a") as file:
        file.write('{"event": "beg')
    assert run.attempt(75, checkpoint=50) == ("go", "next")
    assert "in the meantime" not in RunFolder(run.path).read_attempts()[-1]["reason"]
    assert [record["event"] for record in RunFolder(run.path).read_attempts()] == ["begin", "end", "begin", "end"]


def test_a_launch_that_is_undone(run):
    """The stop, and the steps of the earlier launch, are valid again."""
    run.configure(steps=100)
    record_launch(run.path, steps=100)
    assert run.attempt(2) == ("go", "stop")
    reason = (run.path / "STOPPED").read_text()
    undo = record_launch(run.path, steps=200)
    assert not (run.path / "STOPPED").exists()
    undo()
    assert (run.path / "STOPPED").read_text() == reason
    run.write("checkpoints", 100)
    run.write("hf", 100)
    assert end(run.path, 0, {})[0] == "done"


def test_the_commands_print_one_line(run, capsys):
    assert main(["begin", str(run.path)]) == 0
    assert main(["end", str(run.path), "--status", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "go from step 0",
        "next exit status 1, step 0: no newer checkpoint yet",
    ]
    assert main(["begin", str(run.path / "missing")]) == 2
    assert capsys.readouterr().err.startswith("attempt: error: Cannot write ")


def test_training_may_begin_in_a_folder_that_holds_records_alone(run):
    record_launch(run.path, steps=3)
    run.attempt(1)
    assert run.folder.check({"run": {"resume": "never", "steps": 3}}) == 0
