"""Settings: every shipped file is read, defaults are the documented ones, OPSD is PAINT's special case."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings, override_tree, settings_of
from megatron_paint.config.schedule import due_after, learning_rate
from megatron_paint.config.settings import OptimizerSettings, RunSettings, Settings
from megatron_paint.planning.memory import make_plan
from megatron_paint.planning.search.sizes import FOLDER
from tests.support import tiny

ROOT = Path(__file__).parents[2]
# The spaces of examples/search are no settings; tests/search reads them.
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "search")
SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_files_are_read(path):
    needed = ["model.hf_path=m", "run.dir=r"] if path.parent.name == "qwen3_base" else []
    assert isinstance(load_settings(path, needed), Settings)


QWEN3 = {  # hidden, feed-forward, layers, heads of the published models
    "1p7b": (2048, 6144, 28, 16),
    "4b": (2560, 9728, 36, 32),
    "8b": (4096, 12288, 36, 32),
    "14b": (5120, 17408, 40, 40),
    "32b": (5120, 25600, 64, 64),
}
TENSOR_PARALLEL = {"1p7b": 1, "4b": 1, "8b": 2, "14b": 2, "32b": 4}
CLIP = {"1p7b": 0.05, "4b": 0.05, "8b": 0.06, "14b": 0.06, "32b": 0.06}  # OPSD publishes the first three


@pytest.mark.parametrize("size", QWEN3)
@pytest.mark.parametrize("name", ["paint", "support", "opsd", "reference_free", "grpo", "sft"])
def test_presets_fit_their_model_and_its_gpus(name, size, tmp_path):
    hidden, ffn, layers, heads = QWEN3[size]
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "rope_theta": 1e6}
    config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 40960, "tie_word_embeddings": size in ("1p7b", "4b")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = ROOT / "examples" / f"qwen3_{size}"
    settings = load_settings(folder / f"{name}.yaml", [f"model.hf_path={tmp_path}"])
    plan = make_plan(settings, processes=8, gpu_memory=80e9)
    assert plan.memory.peak < 80e9
    assert plan.warnings() == []
    paint = load_settings(folder / "paint.yaml", [f"model.hf_path={tmp_path}"])
    assert settings.objective.name == {"support": "opsd", "reference_free": "opsd"}.get(name, name)
    alone = settings.objective.reveal.solution == "reference_free" and settings.prompts.teacher_thinking
    assert alone == (name == "reference_free")
    assert (settings.model, settings.optimizer, settings.megatron) == (paint.model, paint.optimizer, paint.megatron)
    assert settings.objective.loss.clip == paint.objective.loss.clip == CLIP[size]
    assert settings.megatron.tensor_model_parallel_size == TENSOR_PARALLEL[size]
    assert settings.megatron.sequence_parallel == (TENSOR_PARALLEL[size] > 1)
    assert settings.optimizer.lr == 5e-6
    responses = settings.data.problems_per_step * max(settings.needs.samples_per_problem, 1)
    assert responses == 32
    assert settings.run.dir == f"runs/qwen3_{size}/{name}"


MIXTURES = {  # GPUs, tensor, pipeline and expert parallel
    "qwen3_30b_a3b": (8, 2, 1, 4),
    "qwen3_235b_a22b": (16, 4, 2, 8),
}


@pytest.mark.parametrize("size", MIXTURES)
@pytest.mark.parametrize("name", ["paint", "support", "opsd", "grpo", "sft"])
def test_presets_of_mixtures_fit_their_gpus(name, size):
    """The config.json of a size is that of the planner, whose numbers of weights tests/planning/search compares."""
    gpus, tp, pp, ep = MIXTURES[size]
    folder = ROOT / "examples" / size
    model = [f"model.hf_path={FOLDER / size}"]
    settings = load_settings(folder / f"{name}.yaml", model)
    plan = make_plan(settings, processes=gpus, gpu_memory=80e9, on_gpu_nodes=True, ranks_per_node=8)
    assert plan.memory.peak < 80e9
    assert plan.warnings() == []
    assert (plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel) == (tp, pp, gpus // (tp * pp))
    assert (settings.megatron.expert_model_parallel_size, settings.megatron.expert_tensor_parallel_size) == (ep, 1)
    paint = load_settings(folder / "paint.yaml", model)
    assert settings.objective.name == {"support": "opsd"}.get(name, name)
    assert (settings.model, settings.optimizer, settings.megatron) == (paint.model, paint.optimizer, paint.megatron)
    assert settings.model.lora.rank == 64
    assert settings.data.problems_per_step * max(settings.needs.samples_per_problem, 1) == 32
    assert settings.run.dir == f"runs/{size}/{name}"


def test_a_file_lies_over_its_base(tmp_path):
    (tmp_path / "low.yaml").write_text(
        "model: {hf_path: m, lora: {rank: 4, alpha: 8}}\ndata: {train: p}\nrun: {dir: r}\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mid.yaml").write_text("base: ../low.yaml\nmodel: {lora: {rank: 16}}\n")
    (tmp_path / "top.yaml").write_text("base: sub/mid.yaml\nrun: {steps: 7}\n")
    settings = load_settings(tmp_path / "top.yaml", ["run.seed=5"])
    assert (settings.model.lora.rank, settings.model.lora.alpha) == (16, 8)
    assert (settings.run.dir, settings.run.steps, settings.run.seed) == ("r", 7, 5)
    (tmp_path / "top.yaml").write_text("base: sub/mid.yaml\nmodel: {lora: null}\n")
    assert load_settings(tmp_path / "top.yaml").model.lora is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: b.yaml\n", r"a.yaml is its own base, by way of .*b.yaml"),
        ("base: c.yaml\n", r"c.yaml does not exist"),
        ("base: [b.yaml]\n", r"base is \['b.yaml'\]; it must be the path"),
    ],
)
def test_a_base_that_cannot_be(text, says, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=says):
        load_settings(tmp_path / "a.yaml")


def test_documented_defaults():
    settings = settings_of(SMALLEST)
    loss, reveal, rollout = settings.objective.loss, settings.objective.reveal, settings.rollout
    assert (loss.temperature, loss.weight, loss.fraction, loss.clip) == (1.1, 0.1, 0.10, None)
    assert (reveal.rule, reveal.minimum) == ("overlap", 0.3)
    assert (rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k) == (1024, 1.1, 0.95, 20)
    assert (settings.optimizer.lr, settings.optimizer.clip_grad) == (5e-6, 0.1)
    assert settings.objective.teacher.weights == "initial"
    assert settings.model.lora is None


def test_opsd_is_paint_that_shows_all_and_mixes_nothing():
    opsd = settings_of(SMALLEST | {"objective": {"name": "opsd"}}).objective
    paint = settings_of(
        SMALLEST | {"objective": {"name": "paint", "reveal": {"rule": "full"}, "loss": {"positions": "none"}}}
    ).objective
    assert dataclasses.replace(opsd, name="paint") == paint


def test_overrides_take_yaml_values(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: {hf_path: m}\ndata: {train: p}\nrun: {dir: r}\n")
    settings = load_settings(path, ["optimizer.lr=5e-6", "model.lora={rank: 8, alpha: 16}", "objective.loss.clip=0.05"])
    assert settings.optimizer.lr == 5e-6
    assert settings.model.lora.rank == 8
    assert settings.objective.loss.clip == 0.05
    assert load_settings(path, ["model.lora=null"]).model.lora is None


def test_several_mistakes_are_told_together():
    with pytest.raises(UserError) as error:
        settings_of(SMALLEST | {"optimizer": {"lr": -1.0, "eps": 0.0}})
    assert len(str(error.value).splitlines()) == 2


def test_learning_rate_by_hand():
    linear = OptimizerSettings(lr=1.0, min_lr=0.2, decay="linear", warmup_steps=2)
    assert [learning_rate(s, steps=6, settings=linear) for s in (1, 2, 4, 6)] == pytest.approx([0.5, 1.0, 0.6, 0.2])
    cosine = OptimizerSettings(lr=1.0, decay="cosine")
    assert [learning_rate(s, steps=4, settings=cosine) for s in (2, 4)] == pytest.approx([0.5, 0.0])
    assert learning_rate(99, steps=100, settings=OptimizerSettings(lr=3.0)) == 3.0


def test_a_decay_ends_where_it_is_told_to():
    linear = OptimizerSettings(lr=1.0, min_lr=0.2, decay="linear", warmup_steps=2, decay_steps=6)
    rates = [learning_rate(step, steps=100, settings=linear) for step in (1, 2, 4, 6, 7, 100)]
    assert rates == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2, 0.2])
    cosine = OptimizerSettings(lr=1.0, min_lr=0.2, decay="cosine", decay_steps=4)
    rates = [learning_rate(step, steps=3, settings=cosine) for step in (2, 3)]
    assert rates == pytest.approx([0.6, 0.2 + 0.4 * (1 - 0.5**0.5)])


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"decay_steps": 10}, "optimizer.decay=constant; leave decay_steps out"),
        ({"decay_steps": 10, "decay": "linear", "warmup_steps": 10}, "must lie after optimizer.warmup_steps=10"),
        ({"decay_steps": 0, "decay": "linear"}, "nearest valid value is 1"),
    ],
)
def test_a_decay_that_cannot_be(optimizer, says):
    with pytest.raises(UserError, match=says):
        settings_of(SMALLEST | {"optimizer": optimizer})


def test_what_is_due_after_a_step():
    run = RunSettings(dir="r", steps=7, save_every=2, export_every=3, evaluate_every=0)
    due = [due_after(step, run) for step in range(8)]
    everything = ["checkpoint", "export", "evaluation"]
    assert due == [
        *(["evaluation"], [], ["checkpoint"], ["export"], ["checkpoint"], [], ["checkpoint", "export"], everything)
    ]
    assert due_after(1, RunSettings(dir="r", steps=1, save_every=0, export_every=0, evaluate_every=0)) == everything


def test_plan_counts_weights(tmp_path):
    """The number of weights from the config is that of the model."""
    from transformers import Qwen3ForCausalLM

    for tied in (True, False):
        folder = tiny.make_model(tmp_path / str(tied), tied=tied)
        settings = settings_of(SMALLEST | {"model": {"hf_path": str(folder)}, "rollout": {"max_new_tokens": 8}})
        model = Qwen3ForCausalLM.from_pretrained(folder)
        assert make_plan(settings, processes=1).shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"teacher": {"ema_anchor": 0.5}}, "ema_anchor=0.5 belongs to weights=ema, but weights=initial"),
        ({"teacher": {"weights": "ema", "ema_anchor": 1.5}}, "nearest valid value is 1"),
        ({"reveal": {"hidden_nats": 1.0, "unit": "segment"}}, "hidden_nats=1.0 is counted over tokens"),
        ({"reveal": {"hidden_nats": 0.0}}, "greater than 0"),
        (
            {"loss": {"clip": 0.1, "clip_rule": "tokens"}},
            r"^objective.loss.clip_rule \(.+\): got 'tokens'; it must be 'entry' or 'token'$",
        ),
    ],
)
def test_further_options_that_cannot_be(objective, says):
    with pytest.raises(UserError, match=says):
        settings_of(SMALLEST | {"objective": objective})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hf_path=", r"^model.hf_path \(.+\): got nothing \(null\); it must be a text$"),
        ("run.steps=", r"^run.steps \(.+\): got nothing \(null\); it must be a valid integer$"),
        ("data.columns=", r"^data.columns is a section of settings, got nothing \(null\)$"),
    ],
)
def test_a_setting_without_a_value(override, says):
    tree = {key: dict(value) for key, value in SMALLEST.items()}
    with pytest.raises(UserError, match=says):
        settings_of(override_tree(tree, [override]))


@pytest.mark.parametrize("name", ["paint", "opsd", "grpo", "sft"])
def test_adastar_needs_rollouts_and_grades_them(name):
    """Only SFT has none."""
    tree = {**SMALLEST, "data": {"train": "p.jsonl", "order": "adastar"}, "objective": {"name": name}}
    if name == "sft":
        with pytest.raises(
            UserError, match=r"^data\.order=adastar .* objective\.name=sft .*: set data\.order=shuffled$"
        ):
            settings_of(tree)
    else:
        assert settings_of(tree).needs.graders
    shuffled = settings_of({**SMALLEST, "objective": {"name": name}})
    assert shuffled.data.order == "shuffled"
    assert shuffled.needs.graders == (name == "grpo")


@pytest.mark.parametrize("seconds", [0, 86_401, 1e12])
def test_a_time_limit_that_a_timer_cannot_hold(seconds):
    with pytest.raises(UserError, match=r"grading_seconds .* it must be (greater than 0|less than or equal to 86400)"):
        settings_of(SMALLEST | {"evaluation": {"grading_seconds": seconds}})
