"""The reveal: its direction and limits, every rule over a complete step, and the limit on what is hidden."""

import dataclasses
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key
from megatron_paint.config.domains import DomainSettings
from megatron_paint.config.objective import RevealSettings
from megatron_paint.masker.overlap import MaskerPool, measure_overlap
from megatron_paint.masker.reveal import (
    Peer,
    check_extractors,
    inverted_share,
    limit_hidden,
    reveal_share,
    reveal_step,
)
from megatron_paint.records import Overlap, Problem, Reveal
from tests.masker.cutting import PIECES, characters, cut, words


class TestShare:
    def test_values(self):
        # r = r_min + (1 - r_min) (1 - o)
        assert reveal_share(0.0, minimum=0.3) == 1.0
        assert reveal_share(1.0, minimum=0.3) == 0.3
        assert reveal_share(0.5, minimum=0.3) == pytest.approx(0.65, abs=1e-15)
        assert inverted_share(0.0, minimum=0.3) == 0.3
        assert inverted_share(1.0, minimum=0.3) == 1.0
        assert inverted_share(0.5, minimum=0.3) == pytest.approx(0.65, abs=1e-15)

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_a_higher_overlap_hides_more(self, one, other, minimum):
        low, high = sorted((one, other))
        assert reveal_share(high, minimum=minimum) <= reveal_share(low, minimum=minimum)
        assert inverted_share(high, minimum=minimum) >= inverted_share(low, minimum=minimum)
        for share in (reveal_share(one, minimum=minimum), inverted_share(one, minimum=minimum)):
            assert minimum <= share <= 1

    @given(st.floats(0, 1))
    def test_ends_are_exact(self, minimum):
        assert reveal_share(0, minimum=minimum) == inverted_share(1, minimum=minimum) == 1.0
        assert reveal_share(1, minimum=minimum) == inverted_share(0, minimum=minimum) == minimum


def step_of(count, samples=1):
    problems = [
        Problem(
            id=f"p{index}",
            problem=f"Problem {index}",
            solution=f"First we find $a_{index} = {index + 30}$ here. Then $b_{index} = {index + 60}$."
            f" So \\boxed{{{index + 90}}}.",
            answer=str(index + 90),
        )
        for index in range(count)
        for _ in range(samples)
    ]
    # The n-th rollout reproduces 0, 2, 4 or all 5 of: a box, two formulas, two numbers.
    anchors = [
        [f"a_{i} = {i + 30}", f"b_{i} = {i + 60}", f"\\boxed{{{i + 90}}}"] for i in (int(p.id[1:]) for p in problems)
    ]
    rollouts = ["; ".join(parts[: index % 4]) for index, parts in enumerate(anchors)]
    keys = [derive_key(1, 5, problem.id, index % samples) for index, problem in enumerate(problems)]
    return problems, rollouts, keys


def run(problems, rollouts, keys, pool=None, peers=None, **options):
    return reveal_step(
        problems, rollouts, settings=RevealSettings(**options), keys=keys, token_offsets=words, peers=peers, pool=pool
    )


class TestStep:
    def test_overlap_rule(self):
        problems, rollouts, keys = step_of(8)
        for problem, rollout, reveal in zip(problems, rollouts, run(problems, rollouts, keys), strict=True):
            overlap = measure_overlap(problem=problem.problem, solution=problem.solution, rollout=rollout)
            assert reveal.overlap == overlap
            assert reveal.share == 0.3 + 0.7 * (1 - overlap.score) or overlap.score == 0
            assert reveal.reference == problem.solution
            assert reveal.shown_text == cut(problem.solution, reveal.share, words)
            assert reveal.total_tokens == problem.solution.count(" ") + 1
            assert reveal.shown_tokens == reveal.shown_text.count(" ") + 1

    def test_the_better_a_rollout_the_less_is_shown(self):
        problems, rollouts, keys = step_of(4)
        reveals = sorted(run(problems, rollouts, keys), key=lambda reveal: reveal.overlap.score)
        shown = [reveal.shown_tokens for reveal in reveals]
        assert [round(reveal.overlap.score, 2) for reveal in reveals] == [0, 0.4, 0.8, 1]
        assert shown == sorted(shown, reverse=True)
        assert len(set(shown)) == 4

    def test_everything_is_shown_to_a_rollout_without_overlap(self):
        problems, _, keys = step_of(3)
        for reveal, problem in zip(run(problems, ["", "no", "?"], keys), problems, strict=True):
            assert reveal.share == 1.0
            assert reveal.shown_text == problem.solution
            assert reveal.shown_tokens == reveal.total_tokens

    def test_full(self):
        problems, rollouts, keys = step_of(5)
        reveals = run(problems, rollouts, keys, rule="full")
        assert [reveal.shown_text for reveal in reveals] == [problem.solution for problem in problems]
        assert {reveal.share for reveal in reveals} == {1.0}
        assert [r.overlap for r in reveals] == [r.overlap for r in run(problems, rollouts, keys)]

    def test_fixed(self):
        problems, rollouts, keys = step_of(5)
        assert {reveal.share for reveal in run(problems, rollouts, keys, rule="fixed", share=0.4)} == {0.4}
        with pytest.raises(UserError, match=r"objective\.reveal\.share is null"):
            run(problems, rollouts, keys, rule="fixed")

    def test_inverted(self):
        problems, rollouts, keys = step_of(4)
        for reveal in run(problems, rollouts, keys, rule="inverted"):
            assert reveal.share == inverted_share(reveal.overlap.score, minimum=0.3)

    def test_random_is_keyed_and_uniform(self):
        problems, rollouts, keys = step_of(400)
        shares = [reveal.share for reveal in run(problems, rollouts, keys, rule="random", minimum=0.2)]
        alone = run(problems[7:8], rollouts[7:8], keys[7:8], rule="random", minimum=0.2)
        assert alone[0].share == shares[7]
        assert 0.2 <= min(shares) < 0.21
        assert 0.99 < max(shares) < 1
        assert abs(sum(shares) / 400 - 0.6) < 0.05  # four standard errors of 0.8 * sqrt(1 / 12 / 400)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_shuffled_has_the_same_shares_at_other_problems(self, samples):
        problems, rollouts, keys = step_of(7, samples)
        own = [reveal.share for reveal in run(problems, rollouts, keys)]
        marked = [f"{rollout} {index}" for index, rollout in enumerate(rollouts)]
        shuffled = [reveal.share for reveal in run(problems, marked, keys, rule="shuffled")]
        assert sorted(shuffled) == sorted(own)
        assert shuffled != own

    def test_shuffled_never_takes_the_problems_own(self):
        # One rollout with overlap, so its share marks where it goes.
        problems, _, keys = step_of(6)
        for index in range(6):
            rollouts = [problem.solution if place == index else "" for place, problem in enumerate(problems)]
            reveals = run(problems, rollouts, keys, rule="shuffled")
            marked = [place for place, reveal in enumerate(reveals) if reveal.share != 1.0]
            assert len(marked) == 1
            assert marked != [index]

    def test_pairs_do_not_depend_on_the_order_of_the_step(self):
        problems, rollouts, keys = step_of(9)
        for options in ({"rule": "shuffled"}, {"solution": "wrong"}, {"rule": "full", "solution": "other_example"}):
            forward = run(problems, rollouts, keys, **options)
            backward = run(problems[::-1], rollouts[::-1], keys[::-1], **options)
            assert forward == backward[::-1]
            other_key = run(problems, rollouts, [key + 1 for key in keys], **options)
            assert forward != other_key

    def test_wrong_shows_and_measures_another_problems_solution(self):
        problems, rollouts, keys = step_of(6)
        reveals = run(problems, rollouts, keys, solution="wrong")
        assert sorted(reveal.reference for reveal in reveals) == sorted(problem.solution for problem in problems)
        for problem, rollout, reveal in zip(problems, rollouts, reveals, strict=True):
            assert reveal.reference != problem.solution
            assert reveal.overlap == measure_overlap(
                problem=problem.problem, solution=reveal.reference, rollout=rollout
            )
            assert reveal.reference.startswith(reveal.shown_text)

    def test_none_shows_nothing_but_measures(self):
        problems, rollouts, keys = step_of(4)
        reveals = run(problems, rollouts, keys, solution="none")
        assert {(r.share, r.shown_tokens, r.total_tokens, r.shown_text, r.reference) for r in reveals} == {
            (0.0, 0, 0, "", "")
        }
        assert [r.overlap for r in reveals] == [r.overlap for r in run(problems, rollouts, keys)]

    @pytest.mark.parametrize(
        "options", [{"rule": "shuffled"}, {"solution": "wrong"}, {"rule": "full", "solution": "other_example"}]
    )
    def test_one_problem_has_no_partner(self, options):
        problems, rollouts, keys = step_of(1, samples=4)
        with pytest.raises(
            UserError, match=r"another problem of the same step, and this step has 1.*problems_per_step"
        ):
            run(problems, rollouts, keys, **options)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_a_worked_example_is_another_problem_with_its_complete_solution(self, samples):
        problems, rollouts, keys = step_of(6, samples)
        reveals = run(problems, rollouts, keys, rule="full", solution="other_example")
        by_id = {problem.id: problem for problem in problems}
        for problem, reveal in zip(problems, reveals, strict=True):
            other = by_id[reveal.of]
            assert other.id != problem.id
            assert (reveal.example, reveal.shown_text, reveal.reference) == (other.problem, *[other.solution] * 2)
            assert (reveal.share, reveal.shown_tokens) == (1.0, reveal.total_tokens)
        # Each problem is an example once for each sample, and all samples of a problem have the same one.
        assert sorted(reveal.of for reveal in reveals) == sorted(problem.id for problem in problems)
        pairs = {(problem.id, reveal.of) for problem, reveal in zip(problems, reveals, strict=True)}
        assert len(pairs) == 6
        # Nothing of the problem's own solution is shown, and the overlap is measured with it.
        assert [r.overlap for r in reveals] == [r.overlap for r in run(problems, rollouts, keys)]

    def test_an_example_never_has_the_problem_s_own_text(self):
        """Two ids with one text: the example of either would be its own solution."""
        problems, rollouts, keys = step_of(3)
        twin = dataclasses.replace(problems[0], id="twin", problem=" Problem   0 ")
        for salt in range(8):
            salted = [key + salt for key in [*keys, derive_key(1, 5, "twin", 0)]]
            reveals = run([*problems, twin], [*rollouts, ""], salted, rule="full", solution="other_example")
            assert {reveals[0].of, reveals[3].of} <= {"p1", "p2"}

    def test_reference_free_shows_nothing_but_measures(self):
        problems, rollouts, keys = step_of(4)
        free, none = (run(problems, rollouts, keys, solution=name) for name in ("reference_free", "none"))
        assert [dataclasses.replace(reveal, solution="none") for reveal in free] == none
        assert {reveal.solution for reveal in free} == {"reference_free"}

    def test_a_peer_takes_the_place_of_the_solution(self):
        problems, rollouts, keys = step_of(3)
        bare = [dataclasses.replace(problem, solution="") for problem in problems]
        peers = [Peer(problem.solution, 5 + index) for index, problem in enumerate(problems)]
        reveals = run(bare, rollouts, keys, peers=peers, solution="peer_rollout")
        assert [reveal.peer for reveal in reveals] == [5, 6, 7]
        own = run(problems, rollouts, keys)
        assert [dataclasses.replace(reveal, peer=None, solution="own") for reveal in reveals] == own
        with pytest.raises(ValueError, match="peers: got None"):
            run(problems, rollouts, keys, solution="peer_rollout")

    @pytest.mark.parametrize("solution", ["own", "wrong"])
    def test_a_view_takes_the_place_of_the_solution(self, solution):
        problems, rollouts, keys = step_of(4)
        viewed = [dataclasses.replace(one, solution="", view=one.solution) for one in problems]
        reveals = run(viewed, rollouts, keys, solution=solution, view="gist")
        assert {reveal.view for reveal in reveals} == {"gist"}
        plain = run(problems, rollouts, keys, solution=solution)
        assert [dataclasses.replace(reveal, view="full") for reveal in reveals] == plain

    def test_lengths_must_agree(self):
        problems, rollouts, keys = step_of(3)
        with pytest.raises(ValueError, match="zip"):
            run(problems, rollouts[:2], keys)

    @pytest.mark.parametrize("options", [{}, {"rule": "shuffled"}, {"solution": "wrong", "unit": "segment"}])
    def test_pool_equals_serial(self, options):
        problems, rollouts, keys = step_of(24)
        with MaskerPool(2, from_characters=0) as pool:
            assert run(problems, rollouts, keys, pool, **options) == run(problems, rollouts, keys, **options)


class TestLimitHidden:
    TEXT = "abcdefghij"

    def limited(self, surprise, limit, *, shown=4, text=TEXT, reveal=None, **options):
        reveal = Reveal(
            overlap=Overlap(score=1.0, anchors=()),
            share=shown / len(text),
            shown_tokens=shown,
            total_tokens=len(text),
            shown_text=text[:shown],
            reference=text,
            **(reveal or {}),
        )
        made = RevealSettings(hidden_nats=limit, **options)
        return limit_hidden(reveal, surprise, settings=made, offsets=characters(text))

    def test_within_the_limit_nothing_changes(self):
        surprise = [9.0] * 4 + [0.0, 0.25, 0.0, 0.25, 0.0, 0.0]
        reveal = self.limited(surprise, 0.5)
        assert (reveal.shown_text, reveal.share, reveal.hidden_nats) == ("abcd", 0.4, 0.5)

    @pytest.mark.parametrize(
        ("limit", "shown"), [(0.49, "abcdef"), (0.25, "abcdef"), (0.2, "abcdefgh"), (1e-9, "abcdefgh"), (0.5, "abcd")]
    )
    def test_more_is_shown_up_to_what_surprises(self, limit, shown):
        """f and h have 0.25 nats each. Hiding both hides 0.5."""
        reveal = self.limited([9.0] * 4 + [0.0, 0.25, 0.0, 0.25, 0.0, 0.0], limit)
        assert reveal.shown_text == shown
        assert reveal.share == len(shown) / 10
        assert reveal.hidden_nats == 0.5

    def test_a_teacher_that_knows_nothing_is_shown_everything(self):
        reveal = self.limited([5.0] * 10, 0.5, shown=3)
        assert (reveal.shown_text, reveal.shown_tokens, reveal.share) == (self.TEXT, 10, 1.0)

    def test_the_new_cut_backs_off_as_usual(self):
        text = "We say ab. And so"
        reveal = self.limited([0.0] * 9 + [1.0] + [0.0] * 7, 0.5, text=text)
        assert reveal.shown_text == "We say ab."
        assert reveal.share == 10 / 17

    def test_what_the_reference_is_stays_known(self):
        given = {"solution": "wrong", "view": "gist", "of": "p7", "peer": 2}
        reveal = self.limited([5.0] * 10, 0.5, shown=3, reveal=given)
        assert {name: getattr(reveal, name) for name in given} == given
        assert reveal.shown_text == self.TEXT

    @pytest.mark.parametrize(
        ("text", "surprising", "shown"),
        [
            ("Adding them gives $a+b=17$. So the answer is it.", "17", "Adding them gives $a+b=17$"),
            ("Adding them gives it. So it is \\boxed{17}.", "17", "Adding them gives it. So it is \\boxed{17}"),
            ("We say ab. And so", " ", "We say ab. A"),
        ],
    )
    def test_the_limit_holds_for_what_is_shown_in_the_end(self, text, surprising, shown):
        """The cut must not back off to before the surprising part and hide it again."""
        at = text.rindex(surprising, 0, text.index("A", 1) if surprising == " " else None)
        reveal = self.limited([0.0] * at + [5.0] + [0.0] * (len(text) - at - 1), 0.5, text=text)
        assert reveal.shown_text == shown
        assert reveal.shown_tokens > at

    @settings(max_examples=300, deadline=None)
    @given(st.lists(PIECES, min_size=1, max_size=40).map("".join), st.data())
    def test_any_text_shows_the_least_that_keeps_the_limit(self, text, data):
        surprise = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=len(text), max_size=len(text)))
        cuts = [cut(text, kept / len(text)) for kept in range(1, len(text) + 1)]
        enough = [shown for shown in cuts if sum(surprise[len(shown) :]) <= 0.5]
        reveal = self.limited(surprise, 0.5, text=text, shown=0)
        assert reveal.shown_text == ("" if sum(surprise) <= 0.5 else enough[0])

    def test_a_hidden_answer_stays_hidden(self):
        text = "So it is \\boxed{17}."
        reveal = self.limited([5.0] * len(text), 0.5, text=text, hide_answer=True)
        assert reveal.shown_text == "So it is"

    def test_as_many_values_as_tokens(self):
        with pytest.raises(ValueError, match="got 3 values for a reference of 10 tokens"):
            self.limited([1.0] * 3, 0.5)


class TestDomains:
    """Each problem has the extractor of its domain, and its solution is cut by the rules of this extractor."""

    CODE = "```python\nfirst = call(\n    alpha,\n    beta + 71,\n)\nsecond = first\n```\nDone."
    DOMAINS = MappingProxyType({"code": DomainSettings(anchors="code"), "prose": DomainSettings(anchors="text")})

    def problems(self):
        found = []
        for number in range(4):
            found += [
                Problem(id=f"m{number}", problem="", solution=f"It is $x = 3{number}$.", answer="1"),
                Problem(id=f"c{number}", problem="", solution=self.CODE, answer="1", domain="code"),
                Problem(id=f"t{number}", problem="", solution="They met Marie Curie.", answer="1", domain="prose"),
            ]
        return found

    def reveals(self, pool=None, **options):
        problems = self.problems()
        rollouts = ["x = 31", "```\nalpha = 71\n```", "Marie Curie"] * 4
        return reveal_step(
            problems,
            rollouts,
            settings=RevealSettings(**options),
            keys=list(range(len(problems))),
            token_offsets=characters,
            domains=self.DOMAINS,
            pool=pool,
        )

    def test_anchors_by_domain(self):
        mathematics, code, prose = self.reveals()[:3]
        assert {anchor.kind for anchor in mathematics.overlap.anchors} == {"formula", "number"}
        assert [(a.kind, a.text, a.found) for a in code.overlap.anchors] == [
            ("call", "call()", False),
            ("literal", "71", True),
            ("name", "first", False),
            ("name", "alpha", True),
            ("name", "beta", False),
            ("name", "second", False),
        ]
        assert [(a.kind, a.text, a.found) for a in prose.overlap.anchors] == [("name", "Marie Curie", True)]
        assert [reveal.anchors for reveal in (mathematics, code, prose)] == ["math", "code", "text"]

    def test_workers_change_nothing(self):
        with MaskerPool(2, from_characters=0) as pool:
            assert self.reveals(pool) == self.reveals()

    def test_another_problem_s_solution_has_the_anchors_of_its_own_domain(self):
        for problem, reveal in zip(self.problems(), self.reveals(solution="wrong"), strict=True):
            assert reveal.anchors == {"It": "math", "``": "code", "Th": "text"}[reveal.reference[:2]]
            assert problem.solution != reveal.reference or problem.domain != "math"

    def test_the_default_is_the_extractor_of_the_settings(self):
        assert self.reveals(anchors="text")[0].anchors == "text"
        assert self.reveals(anchors="text")[1].anchors == "code"

    @pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
    def test_a_limit_on_what_is_hidden_cuts_by_the_same_rules(self, share):
        reveal = self.reveals(rule="fixed", share=share)[1]
        made = RevealSettings(rule="fixed", share=share, hidden_nats=12.0)
        found = limit_hidden(reveal, [1.0] * len(self.CODE), settings=made, offsets=characters(self.CODE))
        assert found.total_tokens - found.shown_tokens <= 12
        assert found.shown_text == self.CODE[: found.shown_tokens].rstrip()
        assert found.shown_text == self.CODE[: self.CODE.index("\n```\nDone.")]

    def test_an_unknown_extractor_is_named_with_its_setting(self):
        check_extractors(self.problems(), self.DOMAINS, default="math")
        with pytest.raises(UserError, match=r"^objective\.reveal\.anchors: .* 'maths'.* code, math, text"):
            check_extractors(self.problems(), self.DOMAINS, default="maths")
        domains = {**self.DOMAINS, "code": DomainSettings(anchors="python")}
        with pytest.raises(UserError, match=r"^domains\.code\.anchors: .* 'python'"):
            check_extractors(self.problems(), domains, default="math")
