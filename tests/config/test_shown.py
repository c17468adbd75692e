"""What the teacher is shown and which responses are kept: contradictions, needs, and one name for a group's size."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.config.tree import settings_tree

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}


def settings(objective=None, rollout=None, **data):
    tree = {**SMALLEST, "data": {"train": "p.jsonl", **data}}
    return settings_of({**tree, "objective": objective or {}, "rollout": rollout or {}})


EXAMPLE = {"rule": "full", "solution": "other_example"}
PEERS = {"solution": "peer_rollout"}
VIEWS = {"views": {"gist": "gist_text"}}


@pytest.mark.parametrize(
    ("objective", "rollout", "data", "says"),
    [
        ({"reveal": {"solution": "other_example"}}, {}, {}, r"reveal.rule=overlap hides .* set .*rule to full"),
        ({"reveal": {**EXAMPLE, "hide_answer": True}}, {}, {}, r"hide_answer .* shown completely: set it to false"),
        ({"reveal": {**EXAMPLE, "hidden_nats": 1.0}}, {}, {}, r"hidden_nats=1.0 .* set it to null"),
        ({"reveal": PEERS}, {}, {}, r"samples_per_problem is 1: set it to 2 or more"),
        ({"reveal": PEERS}, {"samples_per_problem": 1}, {}, r"samples_per_problem is 1: set it to 2 or more"),
        (
            {"reveal": {**PEERS, "view": "answer"}},
            {"samples_per_problem": 4},
            {},
            r"reveal.view=answer .* leave the view out",
        ),
        ({"reveal": {**PEERS, "rule": "shuffled"}}, {"samples_per_problem": 4}, {}, r"rule=shuffled .* another rule"),
        ({"reveal": {"solution": "none", "hide_answer": True}}, {}, {}, r"hide_answer .*=none shows no reference"),
        ({"reveal": {"solution": "none", "hidden_nats": 1.0}}, {}, {}, r"hidden_nats .*=none shows no reference"),
        ({"reveal": {"view": "answer", "hide_answer": True}}, {}, {}, r"hide_answer hides the box"),
        ({"reveal": {"view": "gist"}}, {}, {}, r"view=gist is no view: known are full, answer; name .*views.gist"),
        ({"reveal": {"view": "gits"}}, {}, {"columns": VIEWS}, r"view=gits is no view: known are full, answer, gist;"),
        ({}, {}, {"columns": {"views": {"answer": "a"}}}, r"columns.views.answer cannot be set"),
        ({}, {}, {"columns": {"views": {"full": "a"}}}, r"columns.views.full cannot be set"),
        ({}, {}, {"columns": {"views": {"gist": 5}}}, r"data.columns.views.gist: got 5; it must be a text"),
        ({"reveal": {"solution": "wrong"}}, {}, {"problems_per_step": 1}, r"solution=wrong .* set it to 2 or more"),
        ({"reveal": EXAMPLE}, {}, {"problems_per_step": 1}, r"solution=other_example .* set it to 2 or more"),
        ({"reveal": {"rule": "shuffled"}}, {}, {"problems_per_step": 1}, r"rule=shuffled .* set it to 2 or more"),
        ({"loss": {"elsewhere": "skip", "positions": "none"}}, {}, {}, r"positions=none none is selected"),
        ({"loss": {"elsewhere": "skip", "fraction": 0.0}}, {}, {}, r"fraction=0 none is selected"),
        ({"name": "opsd", "loss": {"elsewhere": "skip"}}, {}, {}, r"positions=none none is selected"),
        ({"loss": {"partner": "full_teacher", "weight": 0.0}}, {}, {}, r"full_teacher costs a pass .* no effect"),
        ({"name": "opsd", "loss": {"partner": "full_teacher"}}, {}, {}, r"full_teacher costs a pass .* no effect"),
        (
            {"loss": {"partner": "full_teacher"}, "reveal": {"rule": "full"}},
            {},
            {},
            r"full_teacher .*rule=full nothing is hidden",
        ),
        (
            {"loss": {"partner": "full_teacher"}, "reveal": {"solution": "none"}},
            {},
            {},
            r"full_teacher .*solution=none nothing is hidden",
        ),
        ({}, {"samples_per_problem": 2, "temperature": 0}, {}, r"temperature=0 makes all 2 responses"),
        ({"name": "grpo"}, {"keep": "correct"}, {}, r"keep=correct belongs to .*paint and opsd, .*name=grpo"),
        ({"name": "sft"}, {"keep": "correct"}, {}, r"keep=correct belongs to .*paint and opsd, .*name=sft"),
        ({}, {"samples_per_problem": 0}, {}, "nearest valid value is 1"),
        ({}, {"keep": "longest"}, {}, "rollout.keep"),
        ({"name": "grpo"}, {"samples_per_problem": 1}, {}, r"samples_per_problem=1 leaves nothing to compare"),
        (
            {"name": "grpo", "grpo": {"samples_per_problem": 4}},
            {"samples_per_problem": 6},
            {},
            r"samples_per_problem=6 and objective.grpo.samples_per_problem=4 are the same setting",
        ),
    ],
)
def test_settings_that_cannot_be(objective, rollout, data, says):
    with pytest.raises(UserError, match=says):
        settings(objective, rollout, **data)


def test_an_evaluation_has_no_views():
    with pytest.raises(UserError, match=r"evaluation.columns.views has no use"):
        settings_of({**SMALLEST, "evaluation": {"columns": VIEWS}})


def test_what_shows_nothing_may_be_set_for_other_objectives():
    """A base file of PAINT may set them."""
    for name in ("grpo", "sft"):
        assert settings({"name": name, "reveal": {"solution": "other_example", "view": "gist"}}).objective.name == name


@pytest.mark.parametrize(
    ("objective", "rollout", "samples", "graders", "solutions"),
    [
        ({}, {}, 1, False, True),
        ({"name": "opsd"}, {"samples_per_problem": 4}, 4, False, True),
        ({}, {"samples_per_problem": 4, "keep": "correct"}, 4, True, True),
        ({}, {"keep": "shortest_correct"}, 1, True, True),
        ({"name": "opsd"}, {"grade": True}, 1, True, True),
        ({"reveal": PEERS}, {"samples_per_problem": 4}, 4, True, False),
        ({"reveal": {"view": "answer"}}, {}, 1, False, False),
        ({"name": "opsd", "reveal": {"solution": "other_example"}}, {}, 1, False, True),
        ({"name": "grpo"}, {}, 8, True, False),
        ({"name": "grpo"}, {"samples_per_problem": 4}, 4, True, False),
        ({"name": "sft"}, {"samples_per_problem": 4, "grade": True}, 0, False, True),
    ],
)
def test_needs(objective, rollout, samples, graders, solutions):
    needs = settings(objective, rollout).needs
    assert (needs.samples_per_problem, needs.graders, needs.solutions) == (samples, graders, solutions)
    assert needs.shown_responses == (objective.get("reveal") == PEERS)


def test_a_group_s_size_has_one_value_under_both_names():
    old = settings({"name": "grpo", "grpo": {"samples_per_problem": 4}})
    new = settings({"name": "grpo"}, {"samples_per_problem": 4})
    both = settings({"name": "grpo", "grpo": {"samples_per_problem": 4}}, {"samples_per_problem": 4})
    assert old == new == both
    assert settings_of(settings_tree(new)) == new  # as config.yaml of its run folder is read


def test_runs_of_earlier_versions_resume():
    """Their settings have none of these keys."""
    now = settings_tree(settings())
    before = settings_tree(settings())
    for section, names in (
        (before["objective"]["reveal"], ("view",)),
        (before["rollout"], ("keep", "samples_per_problem")),
        (before["data"]["columns"], ("views",)),
        (before["prompts"], ("example_template",)),
    ):
        for name in names:
            del section[name]
    assert forbidden_changes(old=before, new=now) == []
    one = settings_tree(settings(rollout={"samples_per_problem": 1}))
    assert forbidden_changes(old=before, new=one) == []
    assert forbidden_changes(old=before, new=settings_tree(settings(rollout={"samples_per_problem": 2}))) == [
        "rollout.samples_per_problem: None -> 2"
    ]


def test_a_view_s_column_is_a_setting_of_its_own():
    plain, gist = settings(), settings({"reveal": {"view": "gist"}}, columns=VIEWS)
    assert forbidden_changes(old=settings_tree(plain), new=settings_tree(gist)) == [
        "objective.reveal.view: 'full' -> 'gist'",
        "data.columns.views.gist: '(absent)' -> 'gist_text'",
    ]
    allowed = settings_tree(gist)
    allowed["run"]["allow_changes"] = ["data.columns.views", "objective.reveal.view"]
    assert forbidden_changes(old=settings_tree(plain), new=allowed) == []


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": {"partner": "full_teacher"}, "reveal": {"rule": "full", "hide_answer": True}},
        {"loss": {"partner": "full_teacher"}, "reveal": {"rule": "fixed", "share": 0.5}},
        {"loss": {"elsewhere": "skip", "positions": "threshold", "threshold_nats": 0.1}},
        {"name": "grpo", "loss": {"elsewhere": "skip", "positions": "none"}, "reveal": {"rule": "shuffled"}},
    ],
)
def test_settings_under_which_something_is_learned_or_that_are_not_used(objective):
    assert settings(objective, problems_per_step=1).objective.loss.elsewhere
