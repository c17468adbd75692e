"""Repeated and leaked problems: counts that a dictionary of texts gives too, first ids, and the memory."""

import random
import tracemalloc

import pytest

from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.data.problems import load_held_out
from megatron_paint.data.repeats import COMPARISON, leaks, repeats
from megatron_paint.data.statistics import oddities
from megatron_paint.records import Problem
from tests.data.problem_files import load, row, write


def problem(id, text, answer="1", solution="It is \\boxed{1}."):
    return Problem(id=str(id), problem=text, solution=solution, answer=answer)


class TestRepeats:
    def test_white_space_does_not_count(self):
        texts = ["What is 2 + 2?", " What  is\n2 + 2?\t", "What is 2+2?", "what is 2 + 2?", "What is 2\u00a0+ 2?"]
        assert repeats([problem(i, text) for i, text in enumerate(texts)], setting="data.train") == (
            "data.train: 2 of 5 problems repeat the text of an earlier one; 3 are different. The first is "
            f"'1', which repeats '0'. {COMPARISON}",
        )

    def test_other_answers_are_counted(self):
        found = repeats(
            [problem("a", "P"), problem("b", "Q", "4"), problem("c", "P", " 1 "), problem("d", "Q", "5")], setting="x"
        )
        assert "2 of 4 problems" in found[0]
        assert (
            "The first is 'c', which repeats 'a'. 1 of them has another answer: the first is 'd' with '5'" in found[0]
        )
        assert "and 'b' has '4'." in found[0]

    def test_no_repeats(self):
        assert repeats([problem(i, f"What is {i}?") for i in range(1000)], setting="data.train") == ()

    @pytest.mark.parametrize("seed", range(3))
    def test_the_counts_of_a_dictionary(self, seed):
        draw = random.Random(seed)
        problems = [problem(i, f"text {draw.randrange(700)}") for i in range(1000)]
        first = {}
        repeated = [one for one in problems if first.setdefault(one.problem, one) is not one]
        found = repeats(problems, setting="data.train")[0]
        assert f": {len(repeated):,} of 1,000 problems repeat" in found
        assert f"; {len(first):,} are different" in found
        assert f"The first is {repeated[0].id!r}, which repeats {first[repeated[0].problem].id!r}." in found

    def test_memory_of_many_problems(self):
        """Hashes of 8 bytes and their order, in place of 80 MB of texts."""
        problems = [problem(i, f"{i % 60_000} " + "x" * 800) for i in range(100_000)]
        tracemalloc.start()
        found = repeats(problems, setting="data.train")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found[0].startswith("data.train: 40,000 of 100,000 problems")
        assert peak < 100 * len(problems)

    def test_loading_warns_and_keeps_the_rows(self, tmp_path):
        rows = [row(number, id=...) for number in (1, 2, 3)] * 20
        problems = load(write(tmp_path / "train.jsonl", rows))
        assert len(problems) == 60
        assert problems.warnings[0].startswith("data.train: 57 of 60 problems repeat")
        assert "The first is 'train:4', which repeats 'train:1'." in problems.warnings[0]
        held_out = load_held_out(EvaluationSettings(problems=str(tmp_path / "train.jsonl"), limit=4))
        assert held_out.warnings[0].startswith("evaluation.problems: 1 of 4 problems repeats")


class TestLeaks:
    def test_held_out_problems_that_are_trained_on(self):
        train = [problem(i, f"What is {i}?") for i in range(50)]
        held_out = [problem("new", "What is pi?"), problem("h7", "What  is 7?\n"), problem("h3", "What is 3?")]
        assert leaks(train, held_out) == (
            "evaluation.problems: 2 of 3 held-out problems are also in data.train, so their accuracy is that of "
            f"trained problems. The first is 'h7', which is '7' in data.train. {COMPARISON}",
        )

    def test_none(self):
        assert leaks([problem(1, "a")], [problem(1, "b")]) == ()
        assert leaks([problem(1, "a")], []) == ()


class TestOddities:
    def test_one_answer_for_all(self):
        same = [problem(i, f"p{i}", "MATH") for i in range(8)]
        found = oddities(same, setting="data", solutions=False)
        assert found == (
            "data.columns.answer: all 8 problems have the same answer 'MATH'; name the column of the final answers",
        )
        assert oddities(same[:7], setting="data", solutions=False) == ()

    def test_worked_solutions_as_answers(self):
        problems = [problem("a", "p"), problem("b", "q", "x" * 201)]
        found = oddities(problems, setting="data", solutions=False)
        assert len(found) == 1
        assert found[0].startswith("data.columns.answer: 1 of 2 answers is longer than 200 characters")
        assert found[0].endswith("The first is 'b'")

    def test_solutions_that_show_nothing(self):
        problems = [problem("a", "p"), problem("b", "q", "70", " 70\n"), problem("c", "r", "4", "It is four.")]
        bare, boxless = oddities(problems, setting="data", solutions=True)
        assert bare.startswith("data.columns.solution: 1 of 3 solutions is nothing but the answer")
        assert bare.endswith("The first is 'b'")
        assert boxless.startswith("data.columns.solution: 1 of 3 solutions has no \\boxed{}, so")
        assert boxless.endswith("The first is 'c'")
        assert oddities(problems, setting="data", solutions=False) == ()
