"""The model card of an export: its head, its facts, its table of evaluations, and what it leaves out."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard

import megatron_paint
from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.config.tree import settings_tree
from megatron_paint.report.model_card import card_of_checkpoint, card_of_run, data_name, model_card, model_name
from megatron_paint.run.folder import RunFolder
from tests.support.finished import ROOT, STEPS, make_finished_run, quickstart

SECRET = "/home/someone/private"


def tree(*overrides, preset="paint"):
    changes = [f"model.hf_path={SECRET}/Qwen3-8B", f"data.train={SECRET}/problems.jsonl", f"run.dir={SECRET}/runs/x"]
    return settings_tree(load_settings(ROOT / "examples" / "qwen3_8b" / f"{preset}.yaml", [*changes, *overrides]))


def rows(card, title):
    """The cells of the rows of the table in a section."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_head_is_what_the_hub_reads():
    card = ModelCard(model_card(tree(), step=25, license={"license": "apache-2.0"}), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron_paint", "paint", "self-distillation", "lora"],
        "license": "apache-2.0",
    }
    assert card.text.lstrip().startswith("# Qwen3-8B, PAINT, step 25\n")


def local_base(folder, name_or_path):
    """The card of an adapter whose base is a folder with this `_name_or_path`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": name_or_path}))
    return model_card(tree(f"model.hf_path={folder}"), step=25, adapter=True)


def test_a_base_on_the_hub_is_in_the_head():
    card = model_card(tree("model.hf_path=Qwen/Qwen3-8B"), step=25, adapter=True)
    assert ModelCard(card, ignore_metadata_errors=False).data.base_model == "Qwen/Qwen3-8B"
    assert "local folder" not in card
    assert 'from_pretrained("Qwen/Qwen3-8B")\n' in card


def test_a_local_base_whose_config_has_a_name_on_the_hub(tmp_path):
    card = local_base(tmp_path / "mine", "Qwen/Qwen3-8B")
    assert ModelCard(card, ignore_metadata_errors=False).data.base_model == "Qwen/Qwen3-8B"
    assert "* Base: a local folder with the name `mine`. Its config.json names `Qwen/Qwen3-8B`.\n" in card
    assert 'from_pretrained("Qwen/Qwen3-8B")\n' in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name_or_path", ["", None, "/models/Qwen3-8B", "Qwen3-8B", "../x", ["Qwen/Qwen3-8B"]])
def test_a_local_base_without_a_name_on_the_hub(name_or_path, tmp_path):
    card = local_base(tmp_path / "mine", name_or_path)
    assert "base_model" not in ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    assert "* Base: a local folder with the name `mine`.\n" in card
    assert 'from_pretrained("BASE")  # the folder of the base, or its name on the hub\n' in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("config", ["[", "[]", '{"model_type": "qwen3"}'])
def test_a_local_base_with_another_config(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    card = model_card(tree(f"model.hf_path={tmp_path}"), step=25)
    assert "base_model" not in ModelCard(card).data.to_dict()


@pytest.mark.parametrize(
    ("preset", "overrides", "adapter", "says"),
    [
        (
            "paint",
            [],
            False,
            ["[PAINT](https://arxiv.org/abs/2604.26573)", "rank 64 were trained; the adapters are mer"],
        ),
        ("opsd", [], True, ["[OPSD](https://arxiv.org/abs/2601.18734)", "this folder holds the adapters alone"]),
        ("grpo", ["model.lora=null"], False, ["[GRPO](https://arxiv.org/abs/2402.03300)", "all weights were trained"]),
        ("sft", [], False, ["with supervised fine-tuning by", "Training problems: `problems.jsonl`, 32 a step."]),
    ],
)
def test_what_was_trained(preset, overrides, adapter, says):
    card = model_card(tree(*overrides, preset=preset), step=25, adapter=adapter)
    for text in (*says, "* Steps: 25 of ", f"by megatron_paint {megatron_paint.__version__}."):
        assert text in card
    assert ("PeftModel" in card) == adapter


def test_no_folder_and_no_secret_of_the_user():
    changes = [
        f"evaluation.problems={SECRET}/held_out.jsonl",
        f"prompts.student_template={SECRET}/student.jinja",
        f"model.adapter_path={SECRET}/start",
        "rollout.engine=vllm",
        f"rollout.vllm.environment={{API_KEY: {SECRET}}}",
    ]
    made = tree(*changes)
    made["rollout"]["vllm"]["urls"] = ["http://node7.private:8000"]
    card = model_card(made, step=25, adapter=True)
    assert SECRET in json.dumps(made)
    assert "/home" not in card
    assert "private" not in card
    for name in ("held_out.jsonl", "student.jinja", "`start`", "problems.jsonl"):
        assert name in card


def test_settings_are_those_that_differ():
    found = {
        key.strip("`"): (value, default) for key, value, default in rows(model_card(tree(), step=25), r"Settings[^\n]*")
    }
    assert found["objective.loss.clip"] == ("`0.06`", "`null`")
    assert found["megatron.tensor_model_parallel_size"] == ("`2`", "`1`")
    assert found["model.hf_path"] == ("`Qwen3-8B`", "")
    assert "optimizer.lr" not in found  # the preset's is the default
    assert not [key for key in found if key.startswith("run.dir")]


def test_a_finished_run(tmp_path):
    folder = make_finished_run(tmp_path / "run")
    card = card_of_run(folder, quickstart(tmp_path / "run"), STEPS)
    before, after = folder.read_eval(0), folder.read_eval(STEPS)
    for cells, report in zip(rows(card, "Evaluation"), (before, after), strict=True):
        metrics = report.metrics
        assert cells[:4] == [str(report.step), "held\\_out", str(report.num_problems), f"{100 * metrics['avg']:.1f}"]
        assert cells[4] == f"{100 * metrics['avg/low']:.1f} to {100 * metrics['avg/high']:.1f}"
        assert cells[-1] == str(report.samples_per_problem)
    assert before.metrics["avg"] < after.metrics["avg"] == 1.0
    assert len(rows(card_of_run(folder, quickstart(tmp_path / "run"), STEPS - 1), "Evaluation")) == 1
    assert str(tmp_path) not in card


def test_only_the_first_and_the_last_evaluation_are_shown(tmp_path):
    folder = make_finished_run(tmp_path / "run")
    for step in (3, 4):
        folder.write_eval(dataclasses.replace(folder.read_eval(STEPS), step=step))
    assert [cells[0] for cells in rows(card_of_run(folder, quickstart(tmp_path / "run"), 4), "Evaluation")] == [
        "0",
        "4",
    ]


def test_a_damaged_evaluation_is_said(tmp_path):
    folder = make_finished_run(tmp_path / "run")
    (folder.path / "eval" / "step_000000.json").write_text("{")
    card = card_of_run(folder, quickstart(tmp_path / "run"), STEPS)
    assert "The evaluation at step 0 could not be read." in card
    assert len(rows(card, "Evaluation")) == 1


def test_no_evaluation(tmp_path):
    assert "This run did no evaluation before this export." in model_card(tree(), step=25)


def test_the_license_of_the_base_stays(tmp_path):
    base = tmp_path / "Base"
    base.mkdir()
    head = "license: other\nlicense_name: qwen\nlicense_link: [1]\nlanguage: en"
    (base / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    card = card_of_run(RunFolder(tmp_path / "run"), tree(f"model.hf_path={base}"), 25)
    data = ModelCard(card).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "qwen")
    assert "license_link" not in data
    (base / "README.md").write_text("---\nlicense: mit\ndate: 2024-13-45\n---\n")  # no such month
    card = card_of_run(RunFolder(tmp_path / "run"), tree(f"model.hf_path={base}"), 25)
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    for damaged in ("---\n[\n---\n", "no head", "---\n- a\n---\n"):
        (base / "README.md").write_text(damaged)
        card = card_of_run(RunFolder(tmp_path / "run"), tree(f"model.hf_path={base}"), 25)
        assert "license" not in ModelCard(card).data.to_dict()


def test_a_checkpoint_has_the_settings(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    make_finished_run(tmp_path / "run")
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "run_state.json").write_text(json.dumps({"step": 2, "settings": settings_tree(quickstart("x"))}))
    card = card_of_checkpoint(checkpoint, tmp_path / "Other", adapter=False)
    assert "# Other, PAINT, step 2" in card
    assert len(rows(card, "Evaluation")) == 2
    (checkpoint / "run_state.json").write_text("[]")
    with pytest.raises(UserError, match=r"run_state\.json is damaged"):
        card_of_checkpoint(checkpoint, tmp_path, adapter=False)
    (checkpoint / "run_state.json").write_text('{"step": 2}')
    assert card_of_checkpoint(checkpoint, tmp_path, adapter=False) is None
    (checkpoint / "run_state.json").unlink()
    assert card_of_checkpoint(checkpoint, tmp_path, adapter=False) is None


def test_an_objective_of_the_user_has_its_own_name():
    made = tree()
    made["objective"]["name"] = "mine"
    card = model_card(made, step=1)
    assert ", mine, step 1" in card
    assert "was trained with mine by" in card


def test_hostile_names_stay_text():
    made = tree("data.train='`x`|<script>\n# y.jsonl'")
    made["evaluation"]["problems"] = "a|b.jsonl"
    card = model_card(made, step=1)
    assert "problems: `'x'|<script> # y.jsonl`" in card
    assert "| `data.train` | `'x'\\|<script> # y.jsonl` |  |" in card
    assert "\n# y" not in card
    assert "| `evaluation.problems` | `a\\|b.jsonl` | `null` |" in card


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/models/Qwen3-8B/", "Qwen3-8B"),
        ("/c/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd", "Qwen/Qwen3-8B"),
        ("examples/quickstart", "quickstart"),
    ],
)
def test_names_of_models(path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("team/problems", "team/problems"),
        ("data/train.jsonl", "train.jsonl"),
        ("data/train.parquet.gz", "train.parquet.gz"),
        ("/a/b/train", "train"),
        ("gsm8k", "gsm8k"),
    ],
)
def test_names_of_data(source, name):
    assert data_name(source) == name


def test_a_checkpoint_of_an_earlier_version_lacks_settings(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    settings = settings_tree(quickstart("x"))
    del settings["model"]["lora"], settings["evaluation"], settings["run"]["loggers"]
    (checkpoint / "run_state.json").write_text(json.dumps({"step": 2, "settings": settings}))
    card = card_of_checkpoint(checkpoint, tmp_path / "Base", adapter=False)
    assert "* Weights: all weights were trained." in card
