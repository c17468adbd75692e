"""What users get wrong: each mistake ends with exit status 2 and one clear line, before any model loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.data.problems import load_problems
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock import locked
from megatron_paint.runtime.files import NewFolder
from tests.support import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder in which everything is right."""
    folder = tmp_path_factory.mktemp("good")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    return folder


@pytest.fixture
def setup(good, tmp_path):
    """(settings file, model folder, problem file) of this test alone."""
    shutil.copytree(good / "model", tmp_path / "model")
    problems = shutil.copy(good / "problems.jsonl", tmp_path / "problems.jsonl")
    return tiny.make_settings(tmp_path, tmp_path / "model", problems), tmp_path / "model", tmp_path / "problems.jsonl"


def contents(folder):
    """Every file below a folder with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys, settings, *arguments, processes=1):
    """The line that the mistake is answered with, in earnest and in a dry run; nothing beside the settings changes."""
    before, told = contents(settings.parent), []
    for mode in ([], ["--dry-run"]):
        status = main(["train", str(settings), *arguments, "--processes", str(processes), *mode])
        printed = capsys.readouterr()
        assert status == 2, printed
        assert contents(settings.parent) == before
        assert "Traceback" not in printed.err
        told.append(printed.err.strip().splitlines())
    assert len(told[0]) == 1, told
    assert told[0] == told[1]
    assert told[0][0].startswith("megatron-paint: error: ")
    return told[0][0]


def test_nothing_wrong(capsys, setup):
    assert main(["train", str(setup[0]), "--processes", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "8 training problems, 3 held-out problems" in printed
    assert "27,072 weights" in printed


OVERRIDES = {
    "misspelt key": ("optimizer.lrr=1e-5", "did you mean optimizer.lr?"),
    "misspelt loss key": ("objective.loss.fracton=0.1", "did you mean objective.loss.fraction?"),
    "unknown section": ("modle.hf_path=x", "did you mean model?"),
    "not key=value": ("optimizer.lr", "not key=value"),
    "wrong type": ("data.problems_per_step=four", "data.problems_per_step"),
    "text for a number": ("optimizer.lr=fast", "optimizer.lr"),
    "negative number": ("optimizer.lr=-1e-5", "greater than 0"),
    "negative count": ("run.steps=-1", "nearest valid value is 1"),
    "not a number": ("optimizer.lr=.nan", "finite"),
    "infinite": ("optimizer.clip_grad=.inf", "finite"),
    "zero problems": ("data.problems_per_step=0", "nearest valid value is 1"),
    "unknown order": ("data.order=sorted", "'shuffled' or 'adastar'"),
    "unknown objective": ("objective.name=ppo", "'paint', 'opsd', 'grpo' or 'sft'"),
    "unknown engine": ("rollout.engine=sglang", "'megatron', 'replay' or 'vllm'"),
    "unknown reveal rule": ("objective.reveal.rule=half", "objective.reveal.rule"),
    "unknown divergence": ("objective.loss.divergence=kl", "forward_kl"),
    "clip with jsd": ("objective.loss={divergence: jsd, clip: 0.05}", "objective.loss.clip"),
    "beta 0": ("objective.loss={divergence: jsd, jsd_beta: 0.0}", "objective.loss.jsd_beta"),
    "beta 1": ("objective.loss={divergence: jsd, jsd_beta: 1.0}", "objective.loss.jsd_beta"),
    "fraction above 1": ("objective.loss.fraction=1.2", "objective.loss.fraction"),
    "fixed without a share": ("objective.reveal.rule=fixed", "objective.reveal.share"),
    "replay without a file": ("rollout.engine=replay", "rollout.path"),
    "path without replay": ("rollout.path=x.jsonl", "rollout.path"),
    "minimum above peak": ("optimizer.min_lr=1.0", "optimizer.min_lr"),
    "opsd that masks": ("objective={name: opsd, reveal: {rule: overlap}}", "opsd"),
    "more problems per step than problems": ("data.problems_per_step=9", "data.problems_per_step"),
    "missing file": ("data.train=nowhere.jsonl", "nowhere.jsonl"),
    "missing column": ("data.columns.solution=worked", "worked"),
    "no model folder": ("model.hf_path=nowhere", "nowhere"),
    "no room for a prompt": ("rollout.max_new_tokens=2000", "rollout.max_new_tokens to at most"),
    "a limit below a response": ("data.max_tokens=5", "leaves no token for the prompt: raise max_tokens"),
    "a limit below a prompt": ("data.max_tokens=40", "and data.max_tokens is 40"),
    "prompt longer than the context": ("rollout.max_new_tokens=1000", "problems.jsonl:8), and the model has 1024"),
    "prompt of an evaluation longer than the context": (
        "evaluation.max_new_tokens=1000",
        "problems.jsonl:1), and the model has 1024 positions; set evaluation.max_new_tokens to at most 913",
    ),
    "FP8 without Transformer Engine": ("megatron={fp8: hybrid}", "megatron.fp8"),
    "Triton without a GPU": ("objective.kernel=triton", "no CUDA device"),
    "GPU setting without a GPU": ("megatron.transformer_impl=transformer_engine", "no CUDA device"),
    "sequence parallelism alone": ("megatron.sequence_parallel=true", "megatron.sequence_parallel"),
    "sgd with a sharded state": ("optimizer.name=sgd", "use_distributed_optimizer"),
    "nothing to resume": ("run.resume=required", "run.resume"),
    "Megatron checkpoint absent": ("model.megatron_path=nowhere", "model.megatron_path"),
    "a change of what is no setting": ("run.allow_changes=[optimizer.lrr]", "did you mean optimizer.lr?"),
    "a change of a section": ("run.allow_changes=[optimizer]", "name its settings, such as optimizer.lr"),
    "a change of what a checkpoint holds": ("run.allow_changes=[optimizer.beta2]", "its checkpoints hold it"),
    "a change that is no list": ("run.allow_changes=optimizer.lr", "run.allow_changes"),
    "a run folder that cannot be made": ("run.dir=/proc/none/run", "/proc/none/run"),
    "template absent": ("prompts.teacher_template=nowhere.jinja", "prompts.teacher_template"),
}


@pytest.mark.parametrize("mistake", OVERRIDES)
def test_setting(capsys, setup, mistake):
    override, says = OVERRIDES[mistake]
    extra = ["model.dtype=bfloat16"] if "fp8" in override else []
    assert says in refused(capsys, setup[0], override, *extra)


LAYOUTS = {
    "TP does not divide the groups": (4, "tensor_model_parallel_size=4", "key-value groups, 2"),
    "PP does not divide the layers": (3, "pipeline_model_parallel_size=3", "number of layers, 2"),
    "world size does not fit": (3, "tensor_model_parallel_size=2", "must be a multiple of 2"),
    "no process": (0, "tensor_model_parallel_size=1", "--processes"),
}


@pytest.mark.parametrize("mistake", LAYOUTS)
def test_layout(capsys, setup, mistake):
    processes, override, says = LAYOUTS[mistake]
    assert says in refused(capsys, setup[0], f"megatron.{override}", processes=processes)


SIZES = {
    "TP does not divide the heads": ({"num_attention_heads": 6}, 4, "attention heads, 6"),
    "TP does not divide the feed-forward size": ({"intermediate_size": 63}, 2, "feed-forward size, 63"),
}


@pytest.mark.parametrize("mistake", SIZES)
def test_layout_of_other_sizes(capsys, setup, mistake):
    settings, model, _ = setup
    values, tp, says = SIZES[mistake]
    _change_config(model, **values)
    line = refused(capsys, settings, f"megatron.tensor_model_parallel_size={tp}", processes=tp)
    assert f"tensor_model_parallel_size={tp} does not divide the {says}" in line


def test_a_vocabulary_that_tp_does_not_divide_is_padded(capsys, setup):
    settings, model, _ = setup
    tiny.make_model(model, rows=265)
    arguments = ["megatron.tensor_model_parallel_size=2", "--processes", "2", "--dry-run"]
    assert main(["train", str(settings), *arguments]) == 0
    assert "133 vocabulary rows a rank" in capsys.readouterr().out


def test_the_start_of_a_run_does_not_fit(capsys, setup, tmp_path):
    """A Megatron checkpoint or an adapter is compared with the model before any rank starts."""
    settings, model, _ = setup
    checkpoint = tmp_path / "checkpoint"
    assert main(["convert", "to-megatron", str(model), str(checkpoint), "--quiet"]) == 0
    pieces = next(checkpoint.glob("__0_*.distcp"))
    pieces.write_bytes(pieces.read_bytes()[:-2000])
    line = refused(capsys, settings, f"model.megatron_path={checkpoint}")
    assert f"model.megatron_path: {pieces} is truncated" in line
    adapter = tmp_path / "adapter"
    write_adapter(adapter, base=model, rank=2)
    capsys.readouterr()
    line = refused(capsys, settings, f"model.adapter_path={adapter}", "model.lora={rank: 4, alpha: 8}")
    assert f"model.adapter_path: {adapter} has rank 2 and scale 2" in line
    assert "set model.lora.rank=2 model.lora.alpha=4, or leave model.lora out" in line
    (adapter / "adapter_model.safetensors").unlink()
    assert "copy the adapter again" in refused(capsys, settings, f"model.hf_path={adapter}")
    shutil.rmtree(model)
    line = refused(capsys, settings, f"model.hf_path={adapter}")
    assert f"model.hf_path: {adapter} is a PEFT adapter of {model}, which does not exist here" in line


def write_adapter(folder, *, base, rank):
    """An adapter of the query projections as PEFT saves it."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder)


def test_settings_file_absent(capsys, tmp_path):
    assert "does not exist" in refused(capsys, tmp_path / "nowhere.yaml")


def test_settings_file_not_yaml(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {hf_path: x\ndata")
    assert "not valid YAML" in refused(capsys, tmp_path / "bad.yaml")


def test_key_twice(capsys, tmp_path):
    (tmp_path / "twice.yaml").write_text("run: {dir: a}\nrun: {dir: b}\n")
    assert "duplicate key" in refused(capsys, tmp_path / "twice.yaml")


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _spoil(path, change, row=2):
    rows = _rows(path)
    change(rows[row], rows)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


ROWS = {
    "duplicate id": (lambda row, rows: row.update(id=rows[0]["id"]), "p0"),
    "empty solution": (lambda row, rows: row.update(solution="  "), "solution"),
    "missing answer": (lambda row, rows: row.pop("answer"), "answer"),
    "answer is not the box": (lambda row, rows: row.update(answer="99"), "99"),
    "solution is a number": (lambda row, rows: row.update(solution=3), "solution"),
}


@pytest.mark.parametrize("mistake", ROWS)
def test_row(capsys, setup, mistake):
    settings, _, problems = setup
    change, says = ROWS[mistake]
    _spoil(problems, change)
    line = refused(capsys, settings, "evaluation.problems=null")
    assert "problems.jsonl:3" in line
    assert says in line


def test_bad_row_can_be_skipped(capsys, setup):
    settings, _, problems = setup
    _spoil(problems, ROWS["empty solution"][0])
    arguments = ["data.on_bad_row=skip", "evaluation.problems=null", "--processes", "1", "--dry-run"]
    assert main(["train", str(settings), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "7 training problems" in printed
    assert "problems.jsonl:3" in printed


def test_broken_json_line(capsys, setup):
    settings, _, problems = setup
    problems.write_text(problems.read_text() + '{"id": "x", \n')
    assert "problems.jsonl:9" in refused(capsys, settings, "evaluation.problems=null")


def test_broken_utf8(capsys, setup):
    settings, _, problems = setup
    problems.write_bytes(problems.read_bytes() + b'{"id": "\xff"}\n')
    assert "problems.jsonl:9" in refused(capsys, settings, "evaluation.problems=null")


def test_empty_file(capsys, setup):
    settings, _, problems = setup
    problems.write_text("")
    assert "problems.jsonl" in refused(capsys, settings, "evaluation.problems=null")


def _change_config(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


CONFIGS = {
    "not a Qwen3": ({"model_type": "llama"}, "'llama'"),
    "sliding window": ({"use_sliding_window": True}, "sliding-window"),
    "heads that no group divides": ({"num_attention_heads": 5}, "5 attention heads"),
    "a size of 0": ({"hidden_size": 0}, "hidden_size=0"),
    "a size that is text": ({"num_hidden_layers": "many"}, "not a Qwen3 config"),
    "a mixture of experts over a dense model's weights": (
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        "model.layers.0.mlp.up_proj.weight does not belong to the model of the config",
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "other sizes than the weights": ({"intermediate_size": 128}, "shape"),
    "one layer too many": ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_config(capsys, setup, mistake):
    settings, model, _ = setup
    values, says = CONFIGS[mistake]
    _change_config(model, **values)
    assert says in refused(capsys, settings)


def replace_by_index(model, file):
    """The single file goes, because it would be read before an index."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


FILES = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "no chat template": (lambda m: (m / "chat_template.jinja").unlink(), "chat template"),
    "truncated weights": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]),
        "truncated",
    ),
    "missing shard": (lambda m: replace_by_index(m, "gone.safetensors"), "gone.safetensors"),
    "index that leaves its folder": (lambda m: replace_by_index(m, "../x.safetensors"), "outside its folder"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_model_file(capsys, setup, mistake):
    settings, model, _ = setup
    spoil, says = FILES[mistake]
    spoil(model)
    assert says in refused(capsys, settings)


def test_run_folder_not_empty(capsys, setup):
    settings, model, _ = setup
    run = model.parent / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "not empty" in refused(capsys, settings)
    assert (run / "notes.txt").read_text() == "mine"


def test_run_folder_below_a_file(capsys, setup):
    settings, model, _ = setup
    assert "run.dir: Cannot write" in refused(capsys, settings, f"run.dir={model / 'config.json' / 'run'}")


def test_run_folder_of_another_run_that_lives(capsys, setup):
    """It is refused before anything is read or taken back, and by a dry run as well."""
    settings, model, _ = setup
    _begin(settings)
    with locked(model.parent / "run", say=print, on_lost=None):
        line = refused(capsys, settings, "run.resume=auto")
    assert f"{model.parent / 'run'} is in use: process {os.getpid()} on " in line
    assert "give another run.dir" in line
    assert main(["train", str(settings), "run.resume=auto", "--processes", "1", "--dry-run"]) == 0


@pytest.mark.parametrize("key", ["data.train", "evaluation.problems"])
def test_missing_data_is_the_only_line(capsys, setup, key):
    assert main(["train", str(setup[0]), f"{key}=nowhere.jsonl", "--processes", "1", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nowhere.jsonl" in printed.err


def test_run_folder_is_a_file(capsys, setup):
    settings, model, _ = setup
    (model.parent / "run").write_text("mine")
    assert "run.dir" in refused(capsys, settings)
    assert (model.parent / "run").read_text() == "mine"


def _replay(path, settings, *, steps, but=()):
    """Writes a rollout for each problem of the steps, leaving some (step, place in the batch) out."""
    batches = {step: load_problems(load_settings(settings).data).batch(step) for step in steps}
    rows = [
        {"id": problem.id, "step": step, "response_ids": [65, 258]}
        for step, batch in batches.items()
        for place, problem in enumerate(batch)
        if (step, place) not in but
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (f"rollout.path={path}", "rollout.engine=replay")


def test_replay_lacks_a_row_of_a_later_step(capsys, setup, tmp_path):
    settings, _, _ = setup
    rollouts = tmp_path / "rollouts.jsonl"
    replay = _replay(rollouts, settings, steps=(1, 2, 3, 4), but=[(3, 1)])
    missing = load_problems(load_settings(settings).data).batch(3)[1].id
    assert f"no rollout for step 3, problem {missing!r}, sample 0; it holds 15" in refused(capsys, settings, *replay)
    _replay(rollouts, settings, steps=(1, 2, 3, 4))
    assert main(["train", str(settings), *replay, "--processes", "1", "--dry-run"]) == 0


def test_replay_of_another_model(capsys, setup, tmp_path):
    settings, _, _ = setup
    rollouts = tmp_path / "rollouts.jsonl"
    replay = _replay(rollouts, settings, steps=(1, 2, 3, 4))
    whole = rollouts.read_text()
    rollouts.write_text(whole.replace("[65, 258]", f"[65, {tiny.ROWS}]", 1))
    assert f"rollouts.jsonl:1: response_ids holds {tiny.ROWS}" in refused(capsys, settings, *replay)
    rollouts.write_text(whole.replace("[65, 258]", f"[{', '.join(['65'] * 17)}]", 1))
    assert "17 tokens, more than rollout.max_new_tokens=8" in refused(capsys, settings, *replay)


def test_replay_needs_only_what_is_still_to_be_done(capsys, setup, tmp_path):
    settings, _, _ = setup
    replay = _replay(tmp_path / "rollouts.jsonl", settings, steps=(3, 4))
    _begin(settings, *replay)
    arguments = ["train", str(settings), *replay, "--processes", "1", "--dry-run"]
    assert main([*arguments, "run.resume=auto"]) == 0
    assert "no rollout for step 1" in refused(capsys, settings, *replay, f"run.dir={tmp_path / 'other'}")


ADASTAR_REPLAY = {
    "first step": (lambda row: row["step"] == 1, "no rollout for step 1, problem "),
    "id of a later step": (None, "response_ids holds 264"),
}


@pytest.mark.parametrize("mistake", ADASTAR_REPLAY)
def test_replay_in_an_order_that_depends_on_verdicts(capsys, setup, tmp_path, mistake):
    """The problems of the first step are known at the start, and each rollout of the file can be checked."""
    settings, _, _ = setup
    rollouts = tmp_path / "rollouts.jsonl"
    everything = [{"id": f"p{i}", "step": step, "response_ids": [65, 258]} for step in (1, 2, 3, 4) for i in range(8)]
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in everything))
    replay = (f"rollout.path={rollouts}", "rollout.engine=replay", "data.order=adastar")
    assert main(["train", str(settings), *replay, "--processes", "1", "--dry-run"]) == 0
    capsys.readouterr()
    drops, says = ADASTAR_REPLAY[mistake]
    rows = [row for row in everything if drops is None or not drops(row)]
    if drops is None:
        rows[-1]["response_ids"] = [tiny.ROWS]
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert says in refused(capsys, settings, *replay)


def _begin(settings, *overrides):
    """Leaves the run folder of a run that has come to step 2."""
    resolved = load_settings(settings, overrides)
    folder = RunFolder(resolved.run.dir)
    folder.prepare(resolved)
    checkpoint = NewFolder(folder.checkpoint_folder(2))
    checkpoint.begin()
    checkpoint.finish(mark=True)


RESUMED = {
    "with changed settings": ("optimizer.lr=2e-3", "optimizer.lr: 0.001 -> 0.002"),
    "with other problems a step": ("data.problems_per_step=2", "data.problems_per_step: 4 -> 2"),
    "with another order of problems": ("data.order=adastar", "data.order: 'shuffled' -> 'adastar'"),
    "from another model": ("model.hf_path={other}", "model.hf_path: "),
}


@pytest.mark.parametrize("mistake", RESUMED)
def test_resumed(capsys, setup, tmp_path, mistake):
    settings, model, _ = setup
    shutil.copytree(model, tmp_path / "other")
    _begin(settings)
    override, says = RESUMED[mistake]
    assert says in refused(capsys, settings, "run.resume=auto", override.format(other=tmp_path / "other"))
    assert main(["train", str(settings), "run.resume=auto", "--processes", "1", "--dry-run"]) == 0


@pytest.mark.parametrize("ranks", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["lone", "rank"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_apex_of_pypi(setup, tmp_path, command, ranks):
    """It is refused before Megatron imports it, which would run this file."""
    settings, _, _ = setup
    (tmp_path / "path" / "apex").mkdir(parents=True)
    (tmp_path / "path" / "apex" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_paint", command, str(settings)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"} | ranks,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-paint: error: the module `apex`")
    assert "pip uninstall apex" in line
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "run").exists()
