"""Graders by domain, and a user's function: verdicts, rewards, errors, hangs, ended processes, and mistakes."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.domains import DomainSettings
from megatron_paint.grading.grade import Grade, GradingPool, Rules
from megatron_paint.grading.graders import Graders, failure_warning
from megatron_paint.records import Problem
from tests.support.processes import is_alive

ROOT = Path(__file__).parents[2]
PROBLEM = Problem(id="p", problem="Q?", solution="It is 7.", answer="7", source="f:1", domain="own")
MODULE = """
import os, signal, subprocess, sys, time

CALLS = []

def check(response, answer, problem):
    CALLS.append(response)
    print("printed", response)
    match response.partition(" ")[0]:
        case "right": return True
        case "wrong": return False
        case "numpy":
            import numpy
            return numpy.bool_(response.endswith("True")) if "." not in response else numpy.float32(response[6:])
        case "score": return float(response.split()[1])
        case "whole": return int(response.split()[1])
        case "huge": return 10**400
        case "raise": raise ValueError("no verdict on this")
        case "silent": raise KeyError
        case "exit": sys.exit(3)
        case "none": return None
        case "text": return "yes"
        case "hang": time.sleep(600)
        case "loop":
            while True: pass
        case "die": os._exit(1)
        case "memory": raise MemoryError
        case "count": return len(CALLS) / 100
        case "child": 
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(response.split()[1], "w").write(str(child.pid))
            time.sleep(600)
        case "fork":
            if not (child := os.fork()): return False
            os.waitpid(child, 0)
            return True
        case "stdin": return sys.stdin.read() == "" and subprocess.run(["cat"], capture_output=True).stdout == b""
        case "problem": return [answer, *map(problem.get, ("id", "answer", "choices"))] == ["7", "p", "7", ["a", "b"]]
        case "where": return os.getcwd() == response.split()[1]
        case "torch": return "torch" not in sys.modules and "megatron" not in sys.modules
        case "long": return len(response) > 1_000_000
        case _: return answer in response

def two(response, answer): return True
def named(response, answer, problem, *, option): return True
def slow(response, answer, problem): time.sleep(600)
def outside(response, answer, problem): return 1.5
def nothing(response, answer, problem): pass
def broken(response, answer, problem): return undefined_name
async def later(response, answer, problem): return True
number = 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "verdicts.py").write_text(MODULE)
    (folder / "fails_at_import.py").write_text("import not_a_module_of_anyone\n")
    (folder / "exits.py").write_text("raise SystemExit(0)\n")
    (folder / "json.py").write_text("raise RuntimeError('a module of the user with a name of the library')\n")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def graders(name="verdicts:check", **options):
    return Graders({"own": DomainSettings(grader=name)}, **{"workers": 1, "seconds": 20.0, **options})


@pytest.fixture(scope="module")
def shared(folder):
    before = os.getcwd()
    os.chdir(folder)
    with graders() as found:
        yield found
    os.chdir(before)


def outcome(found, *responses, problem=PROBLEM):
    return [(grade.outcome, grade.reward) for grade in found.grade([(text, problem) for text in responses])]


def wait_for_end(pid):
    for _ in range(200):
        if not is_alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still running")


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


OWNER = """
import sys
from megatron_paint.config.domains import DomainSettings
from megatron_paint.grading.graders import Graders
from megatron_paint.records import Problem
problem = Problem(id="p", problem="", solution="", answer="7", domain="own")
Graders({"own": DomainSettings(grader="verdicts:check")}, workers=1, seconds=60.0).grade([(sys.argv[1], problem)])
"""


class TestFunctions:
    def test_verdicts_and_rewards(self, shared):
        found = outcome(shared, "right", "wrong", "score 0.25", "score 1.0", "whole 1", "whole 0", "it is 7", "it is 8")
        assert found == [
            *(("right", 1.0), ("wrong", 0.0), ("wrong", 0.25), ("right", 1.0)),
            *(("right", 1.0), ("wrong", 0.0), ("right", 1.0), ("wrong", 0.0)),
        ]

    def test_a_fork_that_returns_gives_no_verdict(self, shared):
        found = outcome(shared, "fork", "right", "fork", "wrong")
        assert found == [("right", 1.0), ("right", 1.0), ("right", 1.0), ("wrong", 0.0)]

    def test_scalars_of_numpy(self, shared):
        found = outcome(shared, "numpy True", "numpy False", "numpy 0.25", "numpy 1.0")
        assert found == [("right", 1.0), ("wrong", 0.0), ("wrong", 0.25), ("right", 1.0)]

    @pytest.mark.parametrize(
        ("response", "reason"),
        [
            ("raise", r"^ValueError: no verdict on this \(.*verdicts\.py:\d+\)$"),
            ("silent", r"^KeyError \("),
            ("exit", r"^SystemExit: 3 "),
            ("none", r"^it returned builtins\.NoneType; it must return True, False or a number from 0 to 1$"),
            ("text", r"^it returned builtins\.str; "),
            ("score 1.01", r"^it returned 1\.01; it must return True, False or a number from 0 to 1$"),
            ("score -0.5", r"^it returned -0\.5; "),
            ("score nan", r"^it returned nan; "),
            ("score inf", r"^it returned inf; "),
            ("huge", r"^it returned an integer of 1329 bits; it must return True, False or a number from 0 to 1$"),
            ("memory", r"^MemoryError"),
            ("die", r"^the process that called it ended"),
        ],
    )
    def test_errors_are_no_verdicts(self, shared, response, reason):
        after, error, before = shared.grade([(text, PROBLEM) for text in ("right", response, "right")])
        assert (before.outcome, after.outcome) == ("right", "right")
        assert (error.outcome, error.correct, error.reward, error.score) == ("error", False, 0.0, None)
        assert re.search(reason, error.error), error.error

    def test_an_error_of_a_call_keeps_the_process_and_an_ended_one_is_replaced(self, shared):
        shared.grade([("right", PROBLEM)])
        (worker,) = shared._pools["own"]._pool._workers
        shared.grade([("raise", PROBLEM)])
        assert shared._pools["own"]._pool._workers == [worker]
        assert outcome(shared, "memory", "right")[1] == ("right", 1.0)
        assert shared._pools["own"]._pool._workers != [worker]

    @pytest.mark.parametrize("response", ["hang", "loop"])
    def test_a_hang_is_a_time_out(self, here, response):
        with graders(seconds=3.0) as found:
            started = time.monotonic()
            assert outcome(found, "right", response, "right") == [("right", 1.0), ("timeout", 0.0), ("right", 1.0)]
            assert time.monotonic() - started < 100

    def test_what_a_call_has_started_ends_with_it(self, here, tmp_path):
        with graders(seconds=5.0) as found:
            assert outcome(found, f"child {tmp_path}/pid") == [("timeout", 0.0)]
        wait_for_end(int((tmp_path / "pid").read_text()))

    def test_what_a_call_has_started_ends_with_the_killed_owner_of_the_pool(self, here, tmp_path):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        owner = subprocess.Popen([sys.executable, "-P", "-c", OWNER, f"child {tmp_path}/pid"], env=environment)
        pid = tmp_path / "pid"
        for _ in range(600):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.05)
        child = int(pid.read_text())
        worker = parent(child)
        assert parent(worker) == owner.pid
        owner.kill()
        owner.wait()
        wait_for_end(child)
        wait_for_end(worker)

    def test_what_a_call_sees(self, shared, folder):
        problem = replace(PROBLEM, choices=("a", "b"))
        assert outcome(shared, "problem", problem=problem) == [("right", 1.0)]
        assert outcome(shared, f"where {folder}", "torch", "stdin") == [("right", 1.0)] * 3

    def test_responses_larger_than_a_pipe(self, shared):
        text = "long " + "x\ud800\n" * 700_000
        assert outcome(shared, text, "wrong", text) == [("right", 1.0), ("wrong", 0.0), ("right", 1.0)]

    def test_a_process_that_reads_nothing_costs_its_time_limit(self, here):
        with graders(seconds=3.0) as found:
            assert outcome(found, "right") == [("right", 1.0)]
            (worker,) = found._pools["own"]._pool._workers
            os.kill(worker.process.pid, 19)  # SIGSTOP
            assert outcome(found, "x" * 10_000_000) == [("timeout", 0.0)]
            assert outcome(found, "right") == [("right", 1.0)]

    def test_the_module_may_be_on_the_path(self, tmp_path, monkeypatch):
        (tmp_path / "library").mkdir()
        (tmp_path / "library" / "elsewhere.py").write_text(MODULE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", "library")
        with graders("elsewhere:check") as found:
            assert outcome(found, "right") == [("right", 1.0)]

    def test_a_path_without_the_current_folder(self, tmp_path, monkeypatch):
        """PYTHONSAFEPATH: `python -m` adds no entry to the path, so the first one is of PYTHONPATH and must stay."""
        (tmp_path / "library").mkdir()
        (tmp_path / "library" / "elsewhere.py").write_text(MODULE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
        monkeypatch.setenv("PYTHONPATH", f"library:{ROOT}")
        with graders("elsewhere:check") as found:
            assert outcome(found, "right") == [("right", 1.0)]

    def test_it_is_not_imported_here(self, shared):
        assert outcome(shared, "right") == [("right", 1.0)]
        assert "verdicts" not in sys.modules

    def test_a_pool_that_was_closed_starts_again(self, here):
        with graders() as found:
            assert outcome(found, "right") == [("right", 1.0)]
            found.close()
            assert outcome(found, "wrong") == [("wrong", 0.0)]


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "no_module_at_all:check",
                r"cannot be imported from .* or PYTHONPATH: ModuleNotFoundError: No module named",
            ),
            ("fails_at_import:check", r"ModuleNotFoundError: .*not_a_module_of_anyone.*fails_at_import\.py:1"),
            ("exits:check", r"cannot be imported .*: SystemExit: 0"),
            ("verdicts:no_function", r"cannot be imported .*: AttributeError: .*no_function"),
            ("verdicts:number", r"it is int, no function; it is called as function\(response: str, answer: str"),
            ("verdicts:two", r"its arguments do not fit \(too many positional arguments\); it is called as"),
            ("verdicts:named", r"its arguments do not fit \(missing a required .*option"),
            ("verdicts:outside", r"failed on problem 'p' \(f:1\), with its solution as the response: it returned 1\.5"),
            ("verdicts:nothing", r"failed on problem 'p' .*it returned builtins\.NoneType; it must return True, False"),
            ("verdicts:broken", r"failed on problem 'p' .*NameError: name 'undefined_name' .*verdicts\.py"),
            ("verdicts:later", r"failed on problem 'p' .*it returned builtins\.coroutine"),
        ],
    )
    def test_one_clear_error_before_the_start(self, here, name, message):
        with graders(name) as found, pytest.raises(UserError, match=f"^domains.own.grader={name} .*{message}") as error:
            found.check([PROBLEM])
        assert "\n" not in str(error.value)

    def test_a_hang(self, here):
        message = r"^domains\.own\.grader=verdicts:slow .*did not return within evaluation\.grading_seconds=2"
        with graders("verdicts:slow", seconds=2.0) as found, pytest.raises(UserError, match=message):
            found.check([PROBLEM])

    def test_a_good_function_and_graders_of_the_package(self, shared):
        shared.check([PROBLEM, replace(PROBLEM, domain="math"), PROBLEM])


DOMAINS = {
    "words": DomainSettings(grader="exact", ignore_case=True),
    "letters": DomainSettings(grader="choice"),
    "found": DomainSettings(grader="regex", pattern=r"result=(\w*)"),
    "slow": DomainSettings(grader="regex", pattern=r"((?:a+)+)b"),
}


class TestOtherGraders:
    @pytest.fixture(scope="class")
    def pool(self):
        with Graders(DOMAINS, workers=1, seconds=20.0) as found:
            yield found

    def grade(self, pool, domain, answer, text, choices=()):
        problem = Problem(id="p", problem="", solution="", answer=answer, domain=domain, choices=choices)
        (grade,) = pool.grade([(text, problem)])
        return grade.outcome, grade.extracted

    @pytest.mark.parametrize(
        ("domain", "answer", "text", "expected"),
        [
            ("words", "Abba", r"\boxed{abba}", ("right", "abba")),
            ("words", "abba", r"\boxed{ab ba}", ("wrong", "ab ba")),
            ("words", "1/2", r"\boxed{0.5}", ("wrong", "0.5")),  # no mathematics
            ("words", "abba", "Answer: ABBA", ("right", "ABBA")),
            ("words", "abba", "abba", ("no_answer", None)),
            ("words", "abba", r"<think>\boxed{abba}", ("no_answer", None)),
            ("letters", "B", "The answer is (b).", ("right", "b")),
            ("letters", "B", r"\boxed{C}", ("wrong", "C")),
            ("letters", "B", "I do not know.", ("no_answer", None)),
            ("found", "x1", "result=x0 result=x1", ("right", "x1")),
            ("found", "x1", "result=X1", ("wrong", "X1")),
            ("found", "x1", "result: x1", ("no_answer", None)),
            ("found", "x1", "<think>result=x1</think>nothing", ("no_answer", None)),
            ("found", "x1", "result=", ("wrong", "")),
            ("math", r"\frac12", r"\boxed{0.5}", ("right", "0.5")),
        ],
    )
    def test_verdicts(self, pool, domain, answer, text, expected):
        assert self.grade(pool, domain, answer, text) == expected

    def test_a_choice_by_its_text(self, pool):
        for answer in ("B", "blue"):
            assert self.grade(pool, "letters", answer, r"\boxed{Blue}", ("red", "blue")) == ("right", "Blue")
            assert self.grade(pool, "letters", answer, r"\boxed{B}", ("red", "blue")) == ("right", "B")
            assert self.grade(pool, "letters", answer, r"\boxed{red}", ("red", "blue")) == ("wrong", "red")

    def test_an_unknown_grader_made_in_python(self):
        problem = Problem(id="p", problem="", solution="", answer="7", domain="x")
        with (
            Graders({"x": DomainSettings(grader="maths")}, workers=1) as graders,
            pytest.raises(UserError, match=r"^domains\.x\.grader: 'maths' is not a grader"),
        ):
            graders.grade([(r"\boxed{7}", problem)])

    def test_a_pattern_that_never_ends(self):
        with Graders(DOMAINS, workers=1, seconds=2.0) as pool:
            assert self.grade(pool, "slow", "a", "a" * 40 + "!") == ("timeout", None)
            assert self.grade(pool, "slow", "aa", "aab") == ("right", "aa")

    def test_domains_are_graded_together_and_keep_their_order(self, pool):
        def problem(domain, answer):
            return Problem(id=domain, problem="", solution="", answer=answer, domain=domain)

        responses = [
            (r"\boxed{7}", problem("math", "7")),
            ("result=7", problem("found", "8")),
            (r"\boxed{a}", problem("words", "A")),
            (r"\boxed{1+1}", problem("math", "2")),
            ("result=8", problem("found", "8")),
        ]
        assert [grade.outcome for grade in pool.grade(responses)] == ["right", "wrong", "right", "right", "right"]
        assert pool.grade([]) == []

    def test_mathematics_is_graded_as_by_its_own_pool(self, pool):
        pairs = [(r"\boxed{1+1}", "2"), ("none", "2"), (r"<think>\boxed{2}", "2"), (r"\boxed{3}", "2")]
        problems = [Problem(id=str(i), problem="", solution="", answer=answer) for i, (_, answer) in enumerate(pairs)]
        responses = [(text, problem) for (text, _), problem in zip(pairs, problems, strict=True)]
        for policy in ("ignore", "count"):
            rules = Rules(box_in_thought=policy)
            with Graders(workers=1, rules=rules) as graders, GradingPool(1, rules=rules) as alone:
                assert graders.grade(responses) == alone.grade(pairs)


def test_the_warning_counts_failures_and_names_the_first():
    right = Grade(correct=True, extracted=None, outcome="right", score=1.0)
    failed = Grade(correct=False, extracted=None, outcome="error", error="ValueError: x (f.py:1)")
    assert failure_warning([("a", right), ("b", right)]) is None
    assert failure_warning([("a", right), ("b", failed), ("c", failed)]) == (
        "2 of 3 responses have no verdict and count as 0, because their grader failed. The first is of problem 'b': "
        "ValueError: x (f.py:1)"
    )
