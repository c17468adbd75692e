"""The overlap score, on worked cases, on any text, in worker processes and on real rollouts."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron_paint.base.errors import UserError
from megatron_paint.masker import overlap as overlap_module
from megatron_paint.masker.overlap import (
    EXTRACTORS,
    AnchorExtractor,
    MaskerPool,
    Pair,
    measure_overlap,
    measure_overlaps,
    register_extractor,
)
from tests.masker.latex_text import any_text, latex_text

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


def test_score_is_the_share_of_anchors_found():
    measured = measure_overlap(
        problem="Solve $3x = 36$.",
        solution="Divide: $x = 36/3$. So $x = 12$, that is \\boxed{12}, not 17.",
        rollout="We have x=36/3 and thus \\boxed{12}.",
    )
    # The problem contains the number 36; 12 is the box; 36/3 is a number, x=36/3 a formula.
    assert [(a.kind, a.text, a.found) for a in measured.anchors] == [
        ("boxed", "12", True),
        ("formula", "x=36/3", True),
        ("formula", "x=12", False),
        ("number", "36/3", True),
        ("number", "17", False),
    ]
    assert measured.score == 3 / 5


def test_no_anchor_is_score_zero():
    assert measure_overlap(problem="", solution="By symmetry.", rollout="By symmetry.").score == 0
    assert measure_overlap(problem="", solution="", rollout="").anchors == ()


def test_higher_overlap_means_more_of_the_solution_reproduced():
    solution = "First $a=b+17$. Then $c=d+18$. Then $e=f+19$. So \\boxed{20}."
    scores = [
        measure_overlap(problem="", solution=solution, rollout=solution[:length]).score
        for length in range(len(solution) + 1)
    ]
    assert scores == sorted(scores)
    assert scores[0] == 0
    assert scores[-1] == 1


@settings(max_examples=400, deadline=None)
@given(any_text | latex_text, any_text | latex_text, any_text | latex_text)
def test_never_raises_and_stays_in_range(problem, solution, rollout):
    measured = measure_overlap(problem=problem, solution=solution, rollout=rollout)
    assert 0 <= measured.score <= 1
    assert len({anchor.text for anchor in measured.anchors}) == len(measured.anchors)
    assert all(anchor.text for anchor in measured.anchors)


HOSTILE = {
    "unclosed boxes": "\\boxed{" * 14_000,
    "nested boxes": "\\boxed{1+" * 5_000 + "x" + "}" * 5_000,
    "open braces": "{" * 100_000,
    "dollars": "$" * 100_000,
    "display openers": "\\[" * 50_000,
    "row ends": "\\\\[" * 33_000,
    "unclosed alignments": "\\begin{align}" * 7_000,
    "nested alignments": "\\begin{equation}\\begin{aligned}a&=b\\\\" * 2_500 + "\\end{aligned}\\end{equation}" * 2_500,
    "backslashes": "\\" * 100_000,
    "digits": "1" * 100_000,
    "one fraction": "1/" * 50_000,
    "one thousand": "111," * 25_000,
    "paragraphs of lone dollars": "$x=1\n\n" * 14_000,
    "touching formulas": "$ax=1$" * 16_000,
    "no math": "word " * 20_000,
    "another script": "\u6211\u4eec\u5f97\u5230x=1\u3002" * 12_000,
    "lone surrogates": "\ud800$x=\ud801$" * 12_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_of_100k_characters(text):
    started = time.process_time()
    measured = measure_overlap(problem=text[:30_000], solution=text, rollout=text)
    assert 0 <= measured.score <= 1
    assert time.process_time() - started < 5


def test_time_is_linear_in_the_length():
    def seconds(repeats):
        unit = "We get $x_{%d} = %d + y$ and then \\[z = %d - a.\\] "
        text = "".join(unit % (7 * index, 11 * index, 13 * index) for index in range(repeats))
        best = []
        for attempt in range(5):
            started = time.process_time()
            measure_overlap(problem=str(attempt), solution=text, rollout=text)
            best.append(time.process_time() - started)
        return min(best)

    assert seconds(1600) < 4 * 8 * seconds(200)  # 8 times the text; a busy machine may make it 16, quadratic time 64


class TestPool:
    PAIRS = tuple(
        Pair("", f"$x_{index}={index}+y$ and \\boxed{{{index}}}", f"x_{index} = {index} + y" if index % 3 else "\ud800")
        for index in range(40)
    )

    def test_pool_equals_serial(self):
        serial = measure_overlaps(self.PAIRS)
        with MaskerPool(2, from_characters=0) as pool:
            assert measure_overlaps(self.PAIRS, pool=pool) == serial
            assert measure_overlaps(self.PAIRS[:1], pool=pool) == serial[:1]  # the workers are kept
        assert [overlap.score for overlap in serial[:2]] == [0.0, 1.0]

    def test_little_work_stays_in_the_process(self):
        pool = MaskerPool(2)
        assert measure_overlaps(self.PAIRS, pool=pool) == measure_overlaps(self.PAIRS)
        assert pool._executor is None

    def test_continues_alone_when_workers_die(self, monkeypatch):
        serial = measure_overlaps(self.PAIRS)
        with MaskerPool(1, from_characters=0) as pool:
            monkeypatch.setattr(overlap_module, "_chunks", lambda pairs, count: [pairs])
            monkeypatch.setattr(overlap_module, "ProcessPoolExecutor", _DeadExecutor)
            with pytest.warns(UserWarning, match="continues in one process"):
                assert measure_overlaps(self.PAIRS, pool=pool) == serial
            assert measure_overlaps(self.PAIRS, pool=pool) == serial

    def test_needs_a_worker(self):
        with pytest.raises(UserError, match="at least 1"):
            MaskerPool(0)


class _DeadExecutor:
    def __init__(self, *_, **__):
        pass

    def map(self, *_):
        raise overlap_module.BrokenProcessPool("a worker died")

    def shutdown(self, **_):
        pass


class TestExtractors:
    def test_another_domain_plugs_in_by_name(self, monkeypatch):
        monkeypatch.setattr(overlap_module, "EXTRACTORS", dict(EXTRACTORS))
        register_extractor("words", AnchorExtractor(_words, _find_words))
        measured = measure_overlap(problem="", solution="use sort then search", rollout="sort it", anchors="words")
        assert measured.score == 1 / 4

    def test_unknown_name(self):
        with pytest.raises(UserError, match=r"objective\.reveal\.anchors.*'maths'.*math"):
            measure_overlap(problem="", solution="", rollout="", anchors="maths")


class _Word(str):
    kind = "formula"

    @property
    def text(self):
        return str(self)


def _words(problem, solution):
    return tuple(map(_Word, solution.split()))


def _find_words(words, rollout):
    return tuple(word in rollout.split() for word in words)


@needs_data
class TestRealData:
    @pytest.fixture(scope="class")
    def rows(self):
        lines = (DATA / "rollouts_qwen25math_math100x8.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def test_a_solution_reproduces_itself(self, rows):
        lines = (DATA / "math_train.jsonl").read_text(encoding="utf-8").splitlines()[::7]
        for row in map(json.loads, lines):
            measured = measure_overlap(problem=row["problem"], solution=row["solution"], rollout=row["solution"])
            assert all(anchor.found for anchor in measured.anchors), (row["id"], measured)
            assert measured.score == 1

    def test_right_rollouts_overlap_more(self, rows):
        means = {}
        for correct in (True, False):
            scores = [
                measure_overlap(problem=row["problem"], solution=row["solution"], rollout=row["rollout"]).score
                for row in rows
                if row["correct"] is correct
            ]
            means[correct] = sum(scores) / len(scores)
        assert means[True] > means[False] + 0.15

    def test_a_rollout_of_another_problem_overlaps_little(self, rows):
        shifted = rows[8:] + rows[:8]
        scores = [
            measure_overlap(problem=row["problem"], solution=row["solution"], rollout=other["rollout"]).score
            for row, other in zip(rows, shifted, strict=True)
        ]
        assert sum(scores) / len(scores) < 0.15
