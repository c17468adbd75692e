"""The scripts in golden/ and examples/slurm/; `python -m tests.slurm.scripts` writes them again."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from megatron_paint.cli.main import main, parse
from megatron_paint.config.settings import RunSettings
from megatron_paint.launch.slurm.options import make_options
from megatron_paint.launch.slurm.rendering import render
from megatron_paint.planning.search.sizes import find_model, folder_of

REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = REPOSITORY / "examples" / "slurm"
ENVIRON = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "connections_do_not_tell",
    "HF_TOKEN": "hf_do_not_tell",
    "WANDB_API_KEY": "wandb_do_not_tell",
}

GOLDEN_CASES: dict[str, list[str]] = {
    "plain": ["--nodes=2"],
    "one_node": ["--nodes=1", "--gpus-per-node=4"],
    "fewer_processes": ["--nodes=1", "--processes-per-node=6"],
    "cpu_nodes": ["--nodes=3", "--gpus-per-node=0", "--processes-per-node=2"],
    "srun": ["--nodes=2", "--launcher=srun"],
    "srun_cpus": ["--nodes=2", "--launcher=srun", "--cpus-per-task=12"],
    "torchrun_cpus": ["--nodes=2", "--cpus-per-task=96"],
    "restarts": ["--nodes=2", "--max-restarts=5"],
    "placing": [
        *["--nodes=2", "--time=1-12:00:00", "--account=team", "--partition=gpu,long", "--qos=high"],
        *["--constraint=h100&ib", "--reservation=weekly", "--exclude=n[01-03],n7", "--job-name=my-run.2"],
    ],
    "choosing": [
        *["--nodes=4", "--gpus-per-node=4", "--nodelist=n[1-4]", "--switches=1@2:00:00", "--segment=2"],
        *["--gres=gpu:h100:4,nvme:1", "--begin=now+2hours", "--mail-type=END,FAIL", "--mail-user=me@example.org"],
        "--comment=first try, 8B",
    ],
    "sharing": ["--nodes=1", "--gpus-per-node=2", "--cpus-per-task=16", "--mem=200G"],
    "exclusive": ["--nodes=1", "--cpus-per-task=16", "--exclusive"],
    "further_lines": ["--nodes=2", "--sbatch=--mail-type=END", "--sbatch", "--switches=1@2:00:00"],
    "modules": ["--nodes=2", "--module=cuda/12.8", "--module=gcc/13.2"],
    "pyxis": ["--nodes=2", "--container=/images/paint.sqsh", "--mount=/data:/data:ro", "--mount=/models:/models"],
    "pyxis_env": ["--nodes=2", "--container=nvcr.io#nvidia/pytorch:26.01-py3", "--env=HF_TOKEN"],
    "apptainer": [
        *["--nodes=2", "--container=paint.sif", "--container-runtime=apptainer", "--mount=/data:/data"],
        *["--container-python=/opt/venv/bin/python"],
    ],
    "apptainer_srun_cpu": [
        *["--nodes=2", "--gpus-per-node=0", "--processes-per-node=2", "--launcher=srun"],
        *["--container=paint.sif", "--container-runtime=apptainer"],
    ],
    "env": ["--nodes=2", "--env=HF_TOKEN", "--env=WANDB_API_KEY"],
    "env_file": ["--nodes=2", "--env-file=secrets.env"],
    "prologue": ["--nodes=2", "--env=CUDA_DEVICE_MAX_CONNECTIONS", "--prologue=prologue.sh"],
    "copies": ["--nodes=2", "--copy-code", "--container=/images/paint.sqsh"],
    "python": ["--nodes=2", "--python=/opt/python/bin/python3"],
    "chain": ["--nodes=2", "--attempts=4"],
    "signal": ["--nodes=2", "--signal-seconds=900"],
    "no_preflight": ["--nodes=2", "--no-preflight"],
    "overrides": ["--nodes=2", "optimizer.lr=1e-5", "model.hf_path=/models/my model"],
}
EXAMPLE_NODES = {"qwen3_8b": 1, "qwen3_14b": 2, "qwen3_32b": 4, "qwen3_30b_a3b": 4, "qwen3_235b_a22b": 32}
# hidden, feed-forward, layers, heads
SHAPES = {
    "Qwen3-8B": (4096, 12288, 36, 32),
    "Qwen3-14B": (5120, 17408, 40, 40),
    "Qwen3-32B": (5120, 25600, 64, 64),
}


def script(*arguments: str, run_dir: str = "runs/paint", settings: str = "paint.yaml") -> str:
    """The script of `megatron-paint launch slurm SETTINGS ARGUMENTS`; no settings are read."""
    python = [] if any(argument.startswith(("--python", "--venv")) for argument in arguments) else ["--venv=.venv"]
    given = parse(["launch", "slurm", settings, *arguments, *python])
    options = make_options(given, run=RunSettings(dir=run_dir), environ=ENVIRON)
    code = "/work/runs/paint/logs/launch/code-01234567" if options.copy_code else None
    return render(options, settings_file=settings, overrides=given.overrides, run_dir=run_dir, code=code)


def golden_script(name: str) -> str:
    """The script of one case, made in a folder with a file of secrets."""
    with in_new_folder():
        Path("secrets.env").write_text("HF_TOKEN=hf_do_not_tell\n")
        Path("secrets.env").chmod(0o600)
        Path("prologue.sh").write_text("export NCCL_DEBUG=WARN\nulimit -l unlimited")
        return script(*GOLDEN_CASES[name])


def example_script(model: str) -> str:
    """What `--dry-run` prints of an example, without the commands, in a folder with the model's config.json."""
    with in_new_folder(), contextlib.redirect_stdout(io.StringIO()) as printed:
        Path("examples").symlink_to(REPOSITORY / "examples")
        for name, shape in SHAPES.items():
            write_config(Path(name), *shape)
        for name in ("Qwen3-30B-A3B", "Qwen3-235B-A22B"):
            Path(name).symlink_to(folder_of(find_model(name)[1]))
        status = main([*example_command(model), "--dry-run"])
    assert status == 0, printed.getvalue()
    return printed.getvalue().partition("\n# would be submitted with:\n")[0]


def example_command(model: str) -> list[str]:
    """The arguments of an example."""
    place = ["--account", "ACCOUNT", "--partition", "PARTITION", "--time", "24:00:00", "--venv", ".venv"]
    # For submission by hand: no copy of the settings exists then. The model and the problems are the user's.
    alone = ["--gpu-memory", "80GB", "--no-copy", "--no-check"]
    return ["launch", "slurm", f"examples/{model}/paint.yaml", "--nodes", str(EXAMPLE_NODES[model]), *place, *alone]


def write_config(folder: Path, hidden: int, ffn: int, layers: int, heads: int) -> None:
    """The config.json of a Qwen3 model."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


@contextlib.contextmanager
def in_new_folder():
    """Works in an empty folder for a while."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def write() -> None:
    """Writes all files again."""
    GOLDEN.mkdir(exist_ok=True)
    for name in GOLDEN_CASES:
        (GOLDEN / f"{name}.sbatch").write_text(golden_script(name))
    for model in EXAMPLE_NODES:
        (EXAMPLES / f"{model}.sbatch").write_text(example_script(model))


if __name__ == "__main__":
    write()
