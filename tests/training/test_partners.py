"""Room for prompts with another problem's text, and for a shown response, before a run starts."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.objective import ObjectiveSettings, RevealSettings
from megatron_paint.config.settings import PromptSettings
from megatron_paint.data.problems import ProblemSet
from megatron_paint.data.prompt_limit import PromptLimit
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.masker.reveal import Peer, reveal_step
from megatron_paint.objectives.paint import PEER_SEAMS, Paint
from megatron_paint.records import Problem
from megatron_paint.training.partners import check_partners
from tests.data.tokenizer_cases import write_byte_tokenizer


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return Prompts(PromptSettings(), load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))))


def problem_of(name, problem, solution="s"):
    return Problem(id=name, problem=problem, solution=solution, answer="1", source=f"file:{name}")


LONG = problem_of("long", "x" * 50)
WORKED = problem_of("worked", "y", "z" * 80)
PROBLEMS = (problem_of("a", "xx", "ss"), LONG, problem_of("b", "xxx", "s" * 40), WORKED)


def check(
    prompts,
    *,
    positions,
    problems=PROBLEMS,
    solution="other_example",
    per_step=2,
    steps=5,
    order="shuffled",
    is_set=False,
):
    chosen = ObjectiveSettings(reveal=RevealSettings(solution=solution))
    limit = PromptLimit(
        length=lambda problem: Paint.longest_prompt(problem, prompts, chosen, response=100),
        positions=1_000_000 if is_set else positions,
        max_tokens=positions if is_set else None,
        response=100,
        setting="rollout.max_new_tokens",
    )
    found = ProblemSet(problems, per_step, seed=1)
    check_partners(found, solution, prompts=prompts, limit=limit, steps=steps, order=order)


def test_problems_with_the_same_text_may_meet_in_the_order_of_adastar(prompts):
    """Which problems meet depends on verdicts, so there must be more in a step than have the same text."""
    twins = (*PROBLEMS, problem_of("c", "xx"))
    check(prompts, positions=10_000, problems=twins, per_step=3, order="adastar")
    with pytest.raises(UserError, match=r"any problems may meet: 2 have the same text; set .* to at least 3, or leave"):
        check(prompts, positions=10_000, problems=twins, per_step=2, order="adastar")


def longest_pair(prompts):
    """Over all pairs, as no draw can be longer."""
    return max(
        len(prompts.example_prompt(one, example=other.problem, solution=other.solution))
        for one in PROBLEMS
        for other in PROBLEMS
        if one is not other
    )


def test_the_longest_pair_decides(prompts):
    length = longest_pair(prompts)
    assert length == len(prompts.example_prompt(LONG, example=WORKED.problem, solution=WORKED.solution))
    check(prompts, positions=length + 100)
    with pytest.raises(UserError) as refused:
        check(prompts, positions=length + 99)
    assert str(refused.value) == (
        f"objective.reveal.solution=other_example can make a prompt of {length} tokens before the 100 of "
        f"rollout.max_new_tokens, and the model has {length + 99} positions: set rollout.max_new_tokens to at most 99, "
        "or leave the longest problems or solutions out"
    )
    with pytest.raises(UserError, match=rf", and the model has {length} positions: leave the longest"):
        check(prompts, positions=length)


def test_a_limit_of_the_settings_can_be_raised(prompts):
    length = longest_pair(prompts)
    raised = rf"data\.max_tokens to at least {length + 100}, or leave"
    with pytest.raises(UserError, match=rf"and data\.max_tokens is {length + 99}: set rollout\..* 99, set {raised}"):
        check(prompts, positions=length + 99, is_set=True)
    with pytest.raises(UserError, match=rf"and data\.max_tokens is {length}: set {raised}"):
        check(prompts, positions=length, is_set=True)


def test_a_wrong_solution_is_another_problem_s_view(prompts):
    """The reference that counts is the view."""
    views = tuple(
        Problem(id=str(i), problem="x", solution="s", view="v" * size, answer="1") for i, size in enumerate((3, 90))
    )
    length = prompts.longest_prompt(views[1])
    check(prompts, positions=length + 100, problems=views, solution="wrong")
    with pytest.raises(UserError, match=rf"solution=wrong can make a prompt of {length} tokens"):
        check(prompts, positions=length + 99, problems=views, solution="wrong")


@pytest.mark.parametrize(
    ("texts", "per_step", "steps", "refused"),
    [
        (("a", "b", "c"), 1, 1, True),
        (("a", "b"), 2, 9, False),
        (("a", "a  ", "b", "c"), 2, 40, True),  # the same text, except for white space, in one step of some epoch
        (("a", "a", "b", "c"), 3, 40, False),
        (("a", "a"), 2, 1, True),
    ],
)
def test_every_step_needs_two_different_problems(prompts, texts, per_step, steps, refused):
    problems = tuple(problem_of(str(number), text) for number, text in enumerate(texts))
    given = {"positions": 2000, "problems": problems, "per_step": per_step, "steps": steps}
    if not refused:
        return check(prompts, **given)
    with pytest.raises(UserError, match=r"another problem of the same step, and step \d+ has only file:\d; set"):
        check(prompts, **given)


@pytest.mark.parametrize("text", ["x", "a longer response\n\n with lines \\boxed{7}", "7" * 60])
@pytest.mark.parametrize("rule", ["full", "overlap"])
def test_a_shown_response_fits_into_what_was_planned(prompts, text, rule):
    """The prompt with a response of n tokens has at most n tokens more than the length without it."""
    settings = RevealSettings(solution="peer_rollout", rule=rule)
    objective = ObjectiveSettings(reveal=settings)
    planned = Paint.longest_prompt(PROBLEMS[0], prompts, objective, response=100)
    (reveal,) = reveal_step(
        [PROBLEMS[0]],
        [text],
        settings=settings,
        keys=[1],
        token_offsets=prompts.solution_offsets,
        peers=[Peer(text, 3)],
    )
    prompt = prompts.teacher_prompt(PROBLEMS[0], reveal)
    unused = planned + len(prompts.solution_ids(text)) - len(prompt)
    assert unused >= 0
    if rule == "full":  # what is planned and not needed: the line that the rest is hidden, and the seams
        line = len(prompts.solution_ids("[The rest of this solution is not shown.]\n"))
        assert line <= unused <= line + PEER_SEAMS


def test_room_for_a_shown_response():
    limit = PromptLimit(
        length=lambda problem: 40, positions=100, response=31, setting="rollout.max_new_tokens", shown=1
    )
    assert (limit.most, limit.longest_response(40), limit.longest_response(99)) == (38, 30, 0)
    assert limit.message(40, source="p.jsonl", where="p.jsonl:1") == (
        "rollout.max_new_tokens=31 is too large: the longest prompt of p.jsonl has 40 tokens (p.jsonl:1), without the "
        "response that it shows, and the model has 100 positions; set rollout.max_new_tokens to at most 30"
    )
