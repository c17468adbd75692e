r"""Grading: public grader cases, hostile inputs, and worker processes that hang or die."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.grading import pool as pool_module
from megatron_paint.grading.boxes import last_box
from megatron_paint.grading.grade import GradingPool, Rules, answers_agree, grade
from megatron_paint.grading.normal_form import normal_form, same_text

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1, seconds=20.0) as shared:
        yield shared


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_neighbouring_boxes_are_one_answer():
    assert grade(r"\boxed{1}, \boxed{2}", answer="1,2").outcome == "right"
    assert grade(r"\boxed{1}, \boxed{2}", answer="2").outcome == "right"  # the last box alone
    assert grade(r"\boxed{1}, \boxed{2}", answer="1").outcome == "wrong"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\dfrac{1}{2}", r" \frac{1}{2}. ", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("$12$", "12", True),
        (r"12{,}345", "12345", True),
        (r"12\,345", "12345", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("(B)", r"\text{B}", True),
        ("x", "X", False),  # a variable is not a word
        ("1 2", "12", False),
        ("1  2", "12", False),
        (r"1 \quad 2", "12", False),
        (r"1 ~ 2", r"1 \; 2", True),
        (r"\leftarrow", "arrow", False),
        ("12", "-12", False),
        ("", "", False),
    ],
)
def test_same_text(a, b, same):
    assert same_text(a, b) is same


def test_normal_form_is_stable():
    text = r"\left(\dfrac{1}{2} ,\; \text{ cm } \right)."
    assert normal_form(text) == normal_form(normal_form(text)) == r"(\frac{1}{2},cm)"


def test_outcomes(pool):
    texts = [r"\boxed{0.5}", r"\boxed{0.6}", "half", r"\boxed{012}", r"\boxed{13}"]
    answers = [r"\frac{1}{2}", r"\frac{1}{2}", r"\frac{1}{2}", "12", "12"]
    grades = pool.grade(zip(texts, answers, strict=True))
    assert [g.outcome for g in grades] == ["right", "wrong", "no_answer", "right", "wrong"]
    assert [g.correct for g in grades] == [True, False, False, True, False]
    assert [g.extracted for g in grades] == ["0.5", "0.6", None, "012", "13"]


def test_text_and_integers_need_no_worker():
    with GradingPool(workers=1) as fresh:
        grades = fresh.grade([(r"\boxed{\dfrac12}", r"\frac12"), (r"\boxed{137}", "42"), ("none", "42")])
        assert [g.outcome for g in grades] == ["right", "wrong", "no_answer"]
        assert fresh._pool._workers == []


def test_answers_agree():
    assert answers_agree("2^{10}", "1024")
    assert answers_agree(r"\$18.90", "18.9")
    assert not answers_agree("(3,5)", "(3,6)")
    assert not answers_agree("", "5")


@needs_data
def test_public_grader_cases(pool):
    """Takes all rows that are neither a matter of policy nor suspect, with the options of their upstream tests."""
    rows = [row for row in read("grader_cases.jsonl") if not row["policy_dependent"] and not row["suspect"]]
    assert len(rows) == 186
    wrong = []
    for row in rows:
        rules = Rules(
            require_box=False,
            kinds=tuple(row["match_types"]),
            precision=row["precision"],
            strict=row["strict"],
            set_relation=row["allow_set_relation_comp"],
        )
        if pool.grade([(row["pred"], row["gold"])], rules=rules)[0].correct != row["expected"]:
            wrong.append(row["id"])
    assert wrong == []


@needs_data
def test_public_grader_cases_with_a_box_under_the_rules_of_evaluation(pool):
    rows = [row for row in read("grader_cases.jsonl") if not row["policy_dependent"] and not row["suspect"]]
    rows = [row for row in rows if last_box(row["pred"]) is not None]
    assert len(rows) == 66
    grades = pool.grade([(row["pred"], row["gold"]) for row in rows])
    assert [row["id"] for row, g in zip(rows, grades, strict=True) if g.correct != row["expected"]] == []


@needs_data
@pytest.mark.parametrize("name", ["math_train.jsonl", "math500.jsonl", "aime2024.jsonl"])
def test_solutions_agree_with_their_answers(pool, name):
    rows = read(name)
    agree = pool.agree([(last_box(row["solution"]) or "", row["answer"]) for row in rows])
    assert [row["id"] for row, same in zip(rows, agree, strict=True) if not same] == []


@needs_data
def test_real_rollouts_are_graded_as_upstream_graded_them(pool):
    rows = read("rollouts_qwen25math_math100x8.jsonl")
    grades = pool.grade([(row["rollout"], row["answer"]) for row in rows])
    differ = [(row["answer"], g.extracted) for row, g in zip(rows, grades, strict=True) if g.correct != row["correct"]]
    assert differ == [("10{,}000", "10000")]  # they are equal; upstream counts the answer as wrong


HOSTILE = [
    r"\boxed{9^9^9^9}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{" + "9" * 1_000_000 + "}",
    r"\boxed{" + "(" * 1900 + "}",
    r"\boxed{" + "{" * 900 + "}" * 900 + "}",
    r"\boxed{" * 100_000,
    "{" * 1_000_000 + r"\boxed{x+1}",
    "\\boxed{\x00\x01}",
    "\\boxed{\ud800 + 1}",
    "\\boxed" + " " * 1_000_000,
    r"\boxed{\frac{1}{}}",
    r'\boxed{__import__("os").abort()}',
]


def test_hostile_answers_neither_hang_nor_crash():
    with GradingPool(workers=2, seconds=0.5) as hostile:
        grades = hostile.grade([(text, "x+2") for text in HOSTILE])
    assert not any(g.correct for g in grades)
    assert grades[1].outcome == "timeout"
    assert grades[5].outcome == grades[9].outcome == "no_answer"


def test_hostile_gold_answer():
    assert grade(r"\boxed{2}", answer="9^{9^{9^9}}", seconds=0.5).outcome in ("timeout", "wrong")


def test_a_stuck_item_costs_only_itself_and_order_is_kept():
    stuck = (r"\boxed{9^{9^{9^9}}}", "9^{9^{9}}")
    pairs = [(r"\boxed{1+1}", "2"), stuck, (r"\boxed{1+1}", "3"), (r"\boxed{2+2}", "4")]
    with GradingPool(workers=1, seconds=10.0) as one:
        assert [g.outcome for g in one.grade(pairs)] == ["right", "timeout", "wrong", "right"]


def test_a_killed_worker_is_replaced():
    with GradingPool(workers=1) as one:
        assert one.grade([(r"\boxed{1+1}", "2")])[0].correct
        worker = one._pool._workers[0]
        worker.process.kill()
        worker.process.wait()
        assert one.grade([(r"\boxed{1+2}", "3")])[0].correct
        assert one._pool._workers[0] is not worker


def test_a_worker_survives_the_stop_signals_of_a_run():
    with GradingPool(workers=1) as one:
        assert one.grade([(r"\boxed{1+1}", "2")])[0].correct
        worker = one._pool._workers[0]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            worker.process.send_signal(number)
        assert one.grade([(r"\boxed{1+2}", "3")])[0].correct
        assert one._pool._workers[0] is worker


def test_threads_may_share_a_pool(pool):
    results = {}

    def work(number):
        results[number] = pool.grade([(rf"\boxed{{{number}+1}}", str(number + 1))])[0].outcome

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), "right")


def test_workers_import_neither_torch_nor_megatron():
    program = (
        "import sys; from megatron_paint.grading import grade, worker; "
        "light = {'torch', 'megatron', 'math_verify', 'sympy', 'numpy'} & set(sys.modules); "
        "worker.parse_values('1', ['latex', 'expr']); heavy = {'torch', 'megatron'} & set(sys.modules); "
        "print(sorted(light), sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_worker_ends_with_its_parent():
    worker = pool_module.Worker()
    worker.process.stdin.close()
    assert worker.process.wait(timeout=600) == 0
    worker.process.stdout.close()


def test_a_worker_that_cannot_start_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr4 is not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GradingPool(workers=1) as broken, pytest.raises(UserError, match=r"antlr4 is not installed.*pip install"):
        broken.grade([(r"\boxed{1+1}", "2")])


class DiesAtStart(pool_module.Worker):
    """The first worker ends before it is ready, as it does when memory is short."""

    made = 0

    def __init__(self, *program):
        super().__init__(*program)
        DiesAtStart.made += 1
        if DiesAtStart.made == 1:
            self.process.kill()


def test_workers_that_never_become_ready_make_a_smaller_pool(monkeypatch):
    monkeypatch.setattr(pool_module, "Worker", DiesAtStart)
    with GradingPool(workers=2, seconds=60.0) as some:
        pairs = [(rf"\boxed{{{number}+1}}", str(number + 1)) for number in range(4)]
        assert [g.outcome for g in some.grade(pairs)] == ["right"] * 4
        assert len(some._pool._workers) == 1
        DiesAtStart.made = 0
    with GradingPool(workers=1) as alone, pytest.raises(UserError, match="it ended, or it was not ready"):
        alone.grade(pairs)
