"""SPACE.yaml: what it means, and that every mistake in it is refused before a trial, with a fix."""

from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.describe import sections
from megatron_paint.config.load import load_settings, settings_of
from megatron_paint.search.space import read_space, trial_tree
from tests.search.spaces import ROOT, SETTINGS, SMALL, given, space, write_space


def refusal(folder: Path, *overrides: str, **replaced: object) -> str:
    """The message about a space, without the name of its file."""
    with pytest.raises(UserError) as error:
        space(folder, *overrides, **replaced)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{folder / 'space.yaml'}: ") or number for number, line in enumerate(lines)), lines
    return "\n".join(lines).replace(f"{folder / 'space.yaml'}: ", "")


def test_a_space_is_read(tmp_path):
    read = space(tmp_path)
    assert [parameter.key for parameter in read.parameters] == list(SMALL["parameters"])
    assert [parameter.text for parameter in read.parameters] == [
        "0.0001 to 0.01 logarithmically",
        "0 to 1 in steps of 0.1",
        "one of null, 0.05, 1",
        "one of entry, token; if objective.loss.clip is 0.05 or 1",
    ]
    # Trial 0 is the given settings: without a clip, there is no rule of it.
    assert read.default == {"optimizer.lr": 1e-3, "objective.reveal.minimum": 0.3, "objective.loss.clip": None}
    clipped = space(tmp_path, "objective.loss.clip=0.05", "objective.loss.clip_rule=token")
    assert clipped.default["objective.loss.clip_rule"] == "token"


def test_a_trial_has_the_chosen_settings_and_those_of_the_search(tmp_path):
    tree = trial_tree(space(tmp_path), {"optimizer.lr": 2e-3, "objective.loss.clip": 1.0}, run_dir="x/0007")
    settings = settings_of(tree)
    assert (settings.optimizer.lr, settings.objective.loss.clip) == (2e-3, 1.0)
    run, evaluation = settings.run, settings.evaluation
    assert (run.dir, run.steps, run.evaluate_every, run.save_every, run.keep_last) == ("x/0007", 4, 2, 2, 1)
    assert (run.resume, run.seed) == ("auto", given().run.seed)
    assert (evaluation.problems, evaluation.limit, evaluation.samples) == (SMALL["validation"]["problems"], 12, 2)
    unchanged = trial_tree(space(tmp_path), {}, run_dir="x/0000")
    differing = {key for key, value in unchanged.items() if value != given_tree()[key]}
    assert differing == {"run", "evaluation"}


def given_tree() -> dict:
    from megatron_paint.config.tree import settings_tree

    return settings_tree(given())


def with_parameter(key: str, values: object) -> dict:
    return {"parameters": {key: values}}


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("optimizer.lrr", {"low": 1, "high": 2}, "unknown setting optimizer.lrr: did you mean optimizer.lr?"),
        ("optimizer", {"choices": [1, 2]}, "optimizer is a section; name one of its settings"),
        (
            "domains.code.grader",
            {"choices": ["exact", "math"]},
            "a search does not vary settings below a name of yours (domains.NAME.grader)",
        ),
        ("run.seed", {"choices": [1, 2]}, "a search does not vary the section run"),
        ("data.seed", {"choices": [1, 2]}, "data.seed: the best of several seeds is only luck: leave it out"),
        ("evaluation.samples", {"choices": [1, 2]}, "a search does not vary the section evaluation"),
        ("model.lora.rank", {"choices": [1, 2]}, "the settings have no section model.lora, which is null there"),
        ("optimizer.lr", {"low": 1e-4}, "parameters.optimizer.lr: a range needs both low and high"),
        ("optimizer.lr", {}, "parameters.optimizer.lr: give either low and high, or choices"),
        ("optimizer.lr", {"low": 1e-4, "high": 1e-2, "choices": [1]}, "give either low and high, or choices"),
        ("optimizer.lr", {"low": 1e-2, "high": 1e-4}, "low=0.01 must be below high=0.0001"),
        ("optimizer.lr", {"low": 0.0, "high": 1e-2, "log": True}, "log=true needs low above 0, got 0"),
        ("optimizer.lr", {"low": 1e-4, "high": 1e-2, "log": True, "step": 1e-4}, "log and step exclude each other"),
        ("objective.reveal.minimum", {"low": 0.0, "high": 1.0, "step": 0.3}, "step=0.3 does not divide the range"),
        ("objective.loss.divergence", {"low": 0.0, "high": 1.0}, "is no number (choice): give choices"),
        ("optimizer.warmup_steps", {"low": 0.5, "high": 10}, "is an integer: low, high and step must be integers"),
        ("optimizer.lr", {"choices": [1e-3]}, "choices needs two values or more"),
        ("optimizer.lr", {"choices": [1e-3, 1e-3]}, "choices needs two values or more, each once"),
        ("objective.loss.weight", {"choices": [0, 0.0, 0.1]}, "choices needs two values or more, each once"),
        ("optimizer.lr", {"low": 1e-4, "high": 1e-2, "when": {"run.steps": []}}, "when: run.steps has no value: give"),
        ("optimizer.lr", {"low": 1e-4, "high": 1e-2, "when": {"optimizer.lrr": 1}}, "unknown setting optimizer.lrr"),
        (
            "optimizer.lr",
            {"low": "a", "high": 1e-2},
            "parameters.optimizer.lr.low (smallest value of a range): got 'a'",
        ),
        ("optimizer.lr", {"lo": 1}, "unknown setting parameters.optimizer.lr.lo: did you mean"),
        # The setting's own bounds, and settings that exclude each other.
        ("objective.reveal.minimum", {"low": 0.0, "high": 1.5}, "got 1.5; it must be less than or equal to 1"),
        ("objective.loss.divergence", {"choices": ["forward_kl", "kl"]}, "got 'kl'; it must be 'forward_kl'"),
        ("objective.loss.positions", {"choices": ["top_fraction", "threshold"]}, "threshold_nats is not set"),
        # Trial 0 is the given settings.
        ("optimizer.lr", {"low": 1e-5, "high": 1e-4}, "the settings have 0.001, which is not 1e-05 to 0.0001."),
        (
            "objective.loss.weight",
            {"low": 0.0, "high": 0.6, "step": 0.3},
            "the settings have 0.1, which is not 0 to 0.6",
        ),
        ("objective.loss.clip", {"choices": [0.1, 0.2]}, "the settings have null, which is not one of 0.1, 0.2."),
    ],
)
def test_refused(tmp_path, key, values, message):
    assert message in refusal(tmp_path, **with_parameter(key, values))


@pytest.mark.parametrize(
    ("sections_", "message"),
    [
        ({"parameters": {}}, "parameters is empty"),
        ({"budget": {"steps": 4, "evaluate_every": 5}}, "budget.evaluate_every=5 is above budget.steps=4"),
        ({"budget": {"steps": 4}}, "budget.evaluate_every is not set"),
        ({"pruner": {"rule": "medium"}}, "pruner.rule"),
        ({"prunner": {}}, "unknown setting prunner: did you mean pruner?"),
    ],
)
def test_refused_sections(tmp_path, sections_, message):
    assert message in refusal(tmp_path, **sections_)


def test_conditions(tmp_path):
    rule = {"choices": ["entry", "token"], "when": {"objective.loss.clip": 0.3}}
    clip = {"choices": [None, 0.05]}
    found = refusal(tmp_path, parameters={"objective.loss.clip": clip, "objective.loss.clip_rule": rule})
    assert "objective.loss.clip never is 0.3; it is one of null, 0.05" in found
    later = {"objective.loss.clip_rule": rule | {"when": {"objective.loss.clip": None}}, "objective.loss.clip": clip}
    assert "name objective.loss.clip above objective.loss.clip_rule" in refusal(tmp_path, parameters=later)
    later["objective.loss.clip_rule"] = rule | {"when": {"objective.loss.clip": 0.05}}  # not the given value
    assert "name objective.loss.clip above objective.loss.clip_rule" in refusal(tmp_path, parameters=later)
    # The condition may be a setting that is not varied: then it holds for all trials or for none.
    fixed = {"objective.loss.clip_rule": rule | {"when": {"objective.name": "opsd"}}, "objective.loss.clip": clip}
    read = space(tmp_path, parameters=fixed)
    assert (read.unused, [p.key for p in read.parameters]) == (("objective.loss.clip_rule",), ["objective.loss.clip"])
    fixed["objective.loss.clip_rule"]["when"] = {"objective.name": ["opsd", "paint"]}
    assert len(space(tmp_path, parameters=fixed).parameters) == 2


def test_a_combination_that_settings_refuse(tmp_path):
    """Each value alone is allowed, so only the trial is refused."""
    parameters = {
        "objective.loss.clip": {"choices": [None, 0.05]},
        "objective.loss.divergence": {"choices": ["forward_kl", "jsd"]},
    }
    read = space(tmp_path, parameters=parameters)
    with pytest.raises(UserError, match="clip_rule=entry belongs to divergence=forward_kl"):
        trial_tree(read, {"objective.loss.clip": 0.05, "objective.loss.divergence": "jsd"}, run_dir="x")


SHIPPED = {"paint": "examples/qwen3_base/paint.yaml", "quickstart": "examples/search/one_process.yaml"}
if any(setting.key == "objective.loss.support" for section in sections() for setting in section.settings):
    SHIPPED |= {"support": "examples/qwen3_base/paint.yaml"}
NEEDED = ["model.hf_path=x", "data.train=x", "run.dir=x"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces(name):
    settings = load_settings(ROOT / SHIPPED[name], NEEDED)
    read = read_space(ROOT / "examples/search" / f"{name}.yaml", settings)
    keys = {parameter.key for parameter in read.parameters}
    assert keys >= {
        "optimizer.lr",
        "objective.reveal.minimum",
        "objective.loss.weight",
        "objective.loss.fraction",
        "objective.loss.clip",
    }
    assert read.unused == ()


def test_every_preset_is_in_the_shipped_space():
    for path in sorted((ROOT / "examples").glob("qwen3_*/paint.yaml")):
        read_space(ROOT / "examples/search/paint.yaml", load_settings(path, NEEDED))


def test_base(tmp_path):
    """`base:` works as in a settings file."""
    write_space(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: space.yaml\nbudget: {steps: 40}\n")
    read = read_space(tmp_path / "mine.yaml", load_settings(SETTINGS))
    assert (read.settings.budget.steps, read.settings.budget.evaluate_every) == (40, 2)
