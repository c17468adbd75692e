"""Steps, evaluations and loggers for tests."""

from types import SimpleNamespace

from megatron_paint.evaluation.statistics import build_report
from megatron_paint.records import Graded, Problem, StepReport
from megatron_paint.run.loggers.interface import RunInfo

SETTINGS = {"optimizer": {"lr": 5.0e-6, "name": "adam"}, "model": {"lora": None}, "run": {"loggers": ["wandb"]}}


def info(path, **changes):
    known = {"name": "first", "project": "tests", "folder": path, "settings": SETTINGS}
    return RunInfo(**{**known, **changes})


def report(step, text="a | <b>bold</b>\n# two", **metrics):
    problem = Problem(id="p1", problem="1 + 1?", solution="2", answer="2")
    sample = SimpleNamespace(problem=problem, reveal=None, response_ids=(5, 6, 7))
    made = StepReport(step=step, metrics={"step": step, "loss": 0.5, **metrics}, samples=(sample,), scores=(None,))
    line = {"id": "p1", "sample": 0, "domain": "math", "finished": True, "overlap": None, "reveal": None, "loss": 0.5}
    return made, [{**line, "advantage": None, "response_text": text}]


def evaluation(step):
    answer = Graded(
        problem_id="a",
        sample_index=0,
        response_text="",
        num_tokens=10,
        finished=True,
        outcome="right",
        extracted=None,
    )
    return build_report(step, "tiny", [answer])


class Recorded:
    """A logger that keeps what it gets, and fails where it is asked to."""

    fix = "repair it"

    def __init__(self, name="mine", *, fails=(), in_background=False, temporary=False):
        self.name, self.in_background = name, in_background
        self.fails, self.temporary = dict(fails), temporary  # fails: by method, the errors of its next calls
        self.calls = []

    def _note(self, *call):
        waiting = self.fails.get(call[0], [])
        if waiting:
            raise waiting.pop(0)
        self.calls.append(call)

    def open(self):
        self._note("open")
        return "logging to http://me:secret@host/1"

    def metrics(self, step, values):
        self._note("metrics", step, values)

    def samples(self, step, table):
        self._note("samples", step, table)

    def close(self, outcome):
        self._note("close", outcome)

    def is_temporary(self, error):
        return self.temporary
