"""`megatron-paint plan`: what it prints, what it writes, and one line for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.planning.search.sizes import find_model
from tests.planning.search.asked import only_tensor_and_pipeline

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("plan_qwen3_8b.txt")
SMALL = ["plan", "qwen3_8b", "--gpus", "16", "--gpu", "h100-80"]


def test_golden_output(monkeypatch, capsys):
    """A plan of 8B with LoRA on two nodes. `python -m tests.cli.test_plan` writes the file again."""
    only_tensor_and_pipeline(monkeypatch)
    assert main([*SMALL, "--lora", "64", "--top", "3", "--slurm"]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text()


def test_what_was_searched_is_printed(capsys):
    assert main([*SMALL, "--top", "1"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("searched")]
    assert "tensor, pipeline" in line
    assert "recomputation none, selective, full" in line
    assert "not searched: " in out
    assert "expert" in out[out.index("not searched") :].splitlines()[0]
    assert "The times come from a model and were not measured" in out


def test_json(capsys):
    assert main([*SMALL, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["gpu"], len(found["ranked"])) == (16, "h100-80", 2)
    best = found["ranked"][0]
    assert best["seconds"] == pytest.approx(sum(sum(parts.values()) for parts in best["phases"].values()))
    assert set(best["bytes"]) == {"sampling", "teacher", "student", "loss", "optimiser", "save"}
    assert max(best["bytes"].values()) <= found["usable_bytes"] == pytest.approx(80e9 * 0.92)
    ranked = len(found["ranked"]) + found["too_large"] + found["slower"]
    assert ranked + sum(found["refused"].values()) == found["layouts"]


def test_a_settings_file_over_a_preset(tmp_path, capsys):
    preset, file = ROOT / "examples/qwen3_14b/paint.yaml", tmp_path / "best.yaml"
    command = ["plan", "qwen3_14b", "--gpus", "32", "--gpu", "h200", "--config", str(preset), "--yaml", str(file)]
    assert main([*command, "--problems-per-step", "64", "--slurm"]) == 0
    assert f"megatron-paint launch slurm {file} --nodes 4 " in capsys.readouterr().out
    best, given = load_settings(file), load_settings(preset)
    assert best.data.problems_per_step == 64
    assert (best.rollout, best.optimizer, best.model) == (given.rollout, given.optimizer, given.model)
    text = file.read_text()
    assert text.startswith("base: ../")
    assert "tensor_model_parallel_size" in text


@pytest.mark.parametrize(
    ("given", "model", "kept"),
    [
        ("Qwen3-14B", "folder", False),
        ("Qwen3-1.7B", "qwen3_14b", False),
        ("Qwen3-14B", "qwen3_14b", True),
        ("/on/the/cluster/only", "qwen3_14b", True),
    ],
)
def test_the_model_of_the_command_replaces_that_of_a_settings_file(given, model, kept, tmp_path, monkeypatch, capsys):
    """A folder always does. The name of a size does where the file names another size."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_bytes(Path(find_model("qwen3_1p7b")[1].source).read_bytes())
    (tmp_path / "s.yaml").write_text(
        f"model: {{hf_path: {given}, lora: {{rank: 8, alpha: 16}}}}\ndata: {{train: p.jsonl}}\nrun: {{dir: r}}\n"
    )
    command = ["plan", model, "--gpus", "8", "--gpu", "h200", "--top", "1", "--config", "s.yaml", "--yaml", "best.yaml"]
    assert main([*command, "--slurm"]) == 0
    best = load_settings(tmp_path / "best.yaml").model
    assert (best.hf_path, best.lora.rank) == (given if kept else model, 8)
    assert "megatron-paint launch slurm best.yaml --nodes 1 " in capsys.readouterr().out


SERVED = [*SMALL, "--engine", "vllm", "--sampling-gpus", "2", "--top", "1"]


@pytest.mark.parametrize("slurm", [True, False])
def test_servers_are_named_in_the_settings(slurm, tmp_path, capsys):
    """Without an address the ranks would start servers on their own GPUs, which a run refuses."""
    file = tmp_path / "best.yaml"
    assert main([*SERVED, "--yaml", str(file), *(["--slurm"] if slurm else [])]) == 0
    vllm = load_settings(file).rollout.vllm
    assert vllm.urls == ("http://SERVER1:8000", "http://SERVER2:8000")
    assert vllm.transfer_folder == "/SHARED/weights"
    *before, servers, addresses, folder = capsys.readouterr().out.splitlines()
    assert servers.startswith("servers    2 of vLLM with --tensor-parallel-size 1, on 2 GPUs that no rank has: start ")
    assert "replace http://SERVER1:8000 and so on by their addresses" in addresses
    assert "replace /SHARED/weights by a folder" in folder
    assert before[-1].startswith("slurm " if slurm else "")


@pytest.mark.parametrize(
    ("vllm", "told"),
    [
        ("{urls: ['http://node7:8000'], transfer_folder: /shared}", ": start them on other nodes"),
        ("{servers: 2, devices: ['6', '7']}", "rollout.vllm says which ones the run starts"),
    ],
)
def test_servers_of_a_settings_file_stay(vllm, told, tmp_path, capsys):
    given, file = tmp_path / "s.yaml", tmp_path / "best.yaml"
    rollout = f"rollout: {{engine: vllm, vllm: {vllm}}}"
    given.write_text(f"model: {{hf_path: m}}\ndata: {{train: p.jsonl}}\nrun: {{dir: r}}\n{rollout}\n")
    assert main([*SERVED, "--config", str(given), "--yaml", str(file)]) == 0
    assert load_settings(file).rollout == load_settings(given).rollout
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("servers    2 of vLLM")
    assert told in line


def test_a_run_without_rollouts_has_no_servers(capsys):
    assert main([*SERVED, "--objective", "sft"]) == 0
    assert "servers    " not in capsys.readouterr().out


def test_a_settings_file_without_an_objective_and_with_stages(tmp_path, capsys):
    """The section has defaults. The file's stages are replaced, as its layout is."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: {hf_path: m, lora: {rank: 8, alpha: 16}}\ndata: {train: p.jsonl}\nrun: {dir: r}\n"
        'megatron: {pipeline_model_parallel_size: 2, pipeline_model_parallel_layout: "Et*14|t*14L"}\n'
    )
    command = ["plan", "qwen3_1p7b", "--gpus", "8", "--gpu", "h200", "--config", str(file), "--top", "1"]
    assert main([*command, "--json"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["ranked"]
    assert best["layout"]["pp"] == 1
    assert best["megatron"].get("pipeline_model_parallel_layout") is None


def test_offloading_of_a_settings_file(tmp_path, capsys):
    """Only layouts of one stage without recomputation are ranked; the others contradict the file."""
    file = tmp_path / "settings.yaml"
    megatron = "use_precision_aware_optimizer: true, optimizer_cpu_offload: true, "
    megatron += "cpu_offloading: true, cpu_offloading_num_layers: 4"
    file.write_text(f"model: {{hf_path: m}}\ndata: {{train: p.jsonl}}\nrun: {{dir: r}}\nmegatron: {{{megatron}}}\n")
    command = ["plan", "qwen3_1p7b", "--gpus", "8", "--gpu", "h200", "--config", str(file), "--top", "3"]
    assert main(command) == 0
    told = "offloaded  megatron.cpu_offloading: its memory counts, the time of its copies does not"
    assert told in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["ranked"]
    assert [(each["layout"]["pp"], each["layout"]["recompute"]) for each in ranked] == [(1, "none")] * 3
    assert main(["plan", "qwen3_1p7b", "--gpus", "8", "--gpu", "h200", "--top", "1"]) == 0
    assert "offloaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-new-tokens", "32768"], "a response is a micro-batch alone: memory counts 32,768 tokens"),
        (
            ["--objective", "sft"],
            "a solution that fills the model's positions is a micro-batch alone: memory counts 40,",
        ),
        (["--max-new-tokens", "16384"], None),
    ],
)
def test_a_response_above_a_micro_batch_is_told(options, told, capsys):
    assert main([*SMALL, "--lora", "8", "--top", "1", *options]) == 0
    out = capsys.readouterr().out
    assert told in out if told else "is a micro-batch alone" not in out


def test_a_limit_of_the_data(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("model: {hf_path: m}\ndata: {train: p.jsonl, max_tokens: 20000}\nrun: {dir: r}\n")
    command = [*SMALL, "--config", str(file), "--objective", "sft", "--lora", "8", "--top", "1"]
    assert main(command) == 0
    told = "a solution that fills data.max_tokens is a micro-batch alone: memory counts 20,000 tokens"
    assert told in capsys.readouterr().out
    assert main([*command, "--solution-tokens", "20000"]) == 2
    assert "need 20,200 positions, and data.max_tokens is 20,000: lower one of them" in capsys.readouterr().err


def test_a_low_speed_has_two_digits(capsys):
    """32 responses of 1,224 tokens in about 150 s on 1,024 GPUs: 0.26 tokens/s each."""
    assert main(["plan", "qwen3_235b_a22b", "--gpus", "1024", "--gpu", "h100-80", "--lora", "8", "--top", "1"]) == 0
    assert re.search(r"^time       of 1, 0\.\d\d trained tokens/s a GPU:$", capsys.readouterr().out, re.MULTILINE)


def test_fp8_of_a_settings_file(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("model: {hf_path: m}\ndata: {train: p.jsonl}\nrun: {dir: r}\nmegatron: {fp8: hybrid}\n")
    assert main(["plan", "qwen3_1p7b", "--gpus", "8", "--gpu", "a100-80", "--config", str(file)]) == 2
    assert "megatron.fp8=hybrid: a100-80 has no FP8 (fp8: null); set it to null" in capsys.readouterr().err


def test_mxfp8_needs_a_gpu_that_has_it(tmp_path, capsys):
    """An option over the recipe of a settings file is enough."""
    file = tmp_path / "settings.yaml"
    fp8 = "megatron: {fp8: e4m3, fp8_recipe: mxfp8}"
    file.write_text(f"model: {{hf_path: m}}\ndata: {{train: p.jsonl}}\nrun: {{dir: r}}\n{fp8}\n")
    command = ["plan", "qwen3_1p7b", "--gpus", "8", "--top", "1", "--config", str(file), "--gpu"]
    assert main([*command, "h200"]) == 2
    says = "megatron.fp8_recipe=mxfp8: h200 has no MXFP8 (mxfp8: false), which needs compute capability 10.0"
    assert says in capsys.readouterr().err
    assert main([*command, "h200", "--fp8", "blockwise"]) == 0
    assert main([*command, "b200"]) == 0


def test_a_gpu_of_a_file(tmp_path, capsys):
    file = tmp_path / "half.yaml"
    file.write_text(
        "memory: 40.0e9\nbf16: 300.0e12\nfp8: null\nhbm: 2.0e12\nnvlink: 300.0e9\nnetwork: 25.0e9\nhost: 32.0e9\n"
        "host_memory: 50.0e9\ngpus_per_node: 4\nsource: ours\n"
    )
    assert main(["plan", "qwen3_1p7b", "--gpus", "8", "--gpu", str(file), "--top", "1"]) == 0
    assert "8 x half on 2 nodes of 4; 40 GB a GPU" in capsys.readouterr().out


def test_known_gpus_have_sources(capsys):
    assert main(["plan", "--gpu-list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a100-80", "h100-80", "h200", "b200"]
    assert all("data sheet" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["plan", "qwen3_8b", "--gpus", "8", "--gpu", "h100"],
            "--gpu='h100' is unknown: did you mean h100-80? known are a100-80",
        ),
        (
            ["plan", "qwen3_8b", "--gpus", "8", "--gpu", "tpu"],
            "--gpu='tpu' is unknown: known are a100-80, h100-80, h200, b200; a YAML file",
        ),
        (["plan", "qwen3_8b", "--gpus", "0", "--gpu", "h200"], "--gpus=0: give the number of GPUs, 1 or more"),
        (["plan", "qwen3_8b", "--gpus", "7", "--gpu", "h200"], "a multiple of 8, or one of 1, 2, 4 (nearest: 8)"),
        (["plan", "qwen3_8b", "--gpus", "20", "--gpu", "h200"], "--gpus=20 fills neither nodes of 8 GPUs nor an even"),
        (
            ["plan", "qwen3_9b", "--gpus", "8", "--gpu", "h200"],
            "MODEL='qwen3_9b' is neither a folder with a config.json",
        ),
        (["plan", "--gpus", "8", "--gpu", "h200"], "MODEL is missing: megatron-paint plan qwen3_8b --gpus 8"),
        (["plan", "qwen3_8b", "--gpu", "h200"], "--gpus is missing"),
        ([*SMALL, "--reserve", "1.5"], "--reserve=1.5: give a fraction of a GPU's memory"),
        ([*SMALL, "--prompt-tokens", "0"], "--prompt-tokens=0: give a number from 1"),
        ([*SMALL, "--response-tokens", "nan"], "--response-tokens=nan: give a number from 1"),
        ([*SMALL, "--response-tokens", "inf"], "--response-tokens=inf: give a number from 1"),
        ([*SMALL, "--response-tokens", "1025"], "--response-tokens=1025 is above rollout.max_new_tokens=1024: lower"),
        (
            [*SMALL, "--objective", "sft", "--response-tokens", "9"],
            "--response-tokens=9: objective.name=sft samples no responses; give --solution-tokens",
        ),
        (
            [*SMALL, "--max-new-tokens", "40261"],
            "a prompt of 700 tokens (--prompt-tokens and --solution-tokens) and rollout.max_new_tokens=40261 need "
            "40,961 positions, and qwen3_8b has 40,960: lower one of them",
        ),
        (
            [*SMALL, "--objective", "sft", "--solution-tokens", "40761"],
            "a prompt of 200 tokens (--prompt-tokens) and --solution-tokens=40761 need 40,961 positions",
        ),
        ([*SMALL, "--top", "0"], "--top=0: give the number of layouts"),
        ([*SMALL, "--problems-per-step", "0"], "data.problems_per_step"),
        ([*SMALL, "--gpu", "a100-80", "--fp8", "blockwise"], "--fp8=blockwise: a100-80 has no FP8"),
        ([*SMALL, "--gpu", "h100-80", "--fp8", "mxfp8"], "--fp8=mxfp8: h100-80 has no MXFP8 (mxfp8: false)"),
        (
            ["plan", "qwen3_235b_a22b", "--gpus", "64", "--gpu", "h100-80", "--engine", "vllm", "--sampling-gpus", "1"],
            "--sampling-gpus=1: no vLLM server holds the 470 GB of weights",
        ),
        ([*SMALL, "--objective", "ppo"], "unknown --objective 'ppo'"),
        ([*SMALL, "--yaml", "/no/such/folder/x.yaml"], "--yaml=/no/such/folder/x.yaml cannot be written"),
        (["plan", "qwen3_32b", "--gpus", "1", "--gpu", "h100-80"], "no layout fits on 1 x h100-80: the closest, "),
    ],
)
def test_a_mistake_is_one_line(arguments, says, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("megatron-paint: error: ")
    assert says in error
    assert error.count("\n") == 1
    assert out == ""


def test_a_folder_without_a_config(tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--gpus", "8", "--gpu", "h200"]) == 2
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err


def test_a_wrong_file_of_a_gpu(tmp_path, capsys):
    file = tmp_path / "gpu.yaml"
    for text, says in (("memory: 80", "bf16: Field required"), ("[1, 2", "cannot be read")):
        file.write_text(text)
        assert main(["plan", "qwen3_8b", "--gpus", "8", "--gpu", str(file)]) == 2
        assert f"--gpu={file}: " in (error := capsys.readouterr().err)
        assert says in error
        assert error.count("\n") == 1


def test_it_needs_no_torch():
    code = (
        "import sys\nfrom megatron_paint.cli.main import main\n"
        f"assert main({SMALL!r}) == 0\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)


def write_golden() -> None:
    """Writes the expected output again."""
    import contextlib
    import io

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as out:
        only_tensor_and_pipeline(monkeypatch)
        main([*SMALL, "--lora", "64", "--top", "3", "--slurm"])
    GOLDEN.write_text(out.getvalue())


if __name__ == "__main__":
    write_golden()
