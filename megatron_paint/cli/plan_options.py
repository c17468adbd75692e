"""The options of `megatron-paint plan`."""

import argparse
from pathlib import Path


def add_plan_options(plan: argparse.ArgumentParser) -> None:
    """Adds what is planned, for which GPUs, and what is printed."""
    plan.add_argument("model", metavar="MODEL", nargs="?", help="folder with a config.json, or a size such as qwen3_8b")
    plan.add_argument("--gpus", type=int, metavar="N", help="number of GPUs, one for each rank")
    plan.add_argument("--gpu", metavar="NAME", help="kind of GPU, such as h100-80, or a YAML file; see --gpu-list")
    plan.add_argument("--gpu-list", action="store_true", help="print the known GPUs with the sources of their figures")
    plan.add_argument("--config", type=Path, metavar="SETTINGS.yaml", help="settings whose layout is searched")
    _add_work(plan)
    plan.add_argument("--top", type=int, default=10, metavar="K", help="layouts in the table; default: 10")
    plan.add_argument("--reserve", type=float, default=0.08, metavar="R", help="free fraction of memory; default: 0.08")
    plan.add_argument("--no-offload", action="store_true", help="keep teacher and optimiser on the GPUs")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--yaml", type=Path, metavar="FILE", help="write the settings of the fastest layout to this file")
    plan.add_argument("--slurm", action="store_true", help="also print the command that submits the fastest layout")


def _add_work(plan: argparse.ArgumentParser) -> None:
    """What a step has to do. Without an option, the value of --config or of the settings counts."""
    plan.add_argument("--objective", choices=("paint", "opsd", "grpo", "sft"), help="objective.name; default: paint")
    for name, meaning in (
        ("problems-per-step", "data.problems_per_step"),
        ("samples-per-problem", "rollout.samples_per_problem"),
        ("max-new-tokens", "rollout.max_new_tokens"),
        ("micro-batch-tokens", "data.micro_batch_tokens"),
        ("batch-size", "rollout.batch_size"),
        ("lora", "rank of model.lora; 0: train all weights (the default without --config)"),
        ("sampling-gpus", "GPUs of the vLLM servers, beside the N of --gpus; default: one node"),
    ):
        plan.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    plan.add_argument("--prompt-tokens", type=int, default=200, metavar="N", help="tokens of a prompt; default: 200")
    plan.add_argument(
        "--solution-tokens", type=int, default=500, metavar="N", help="tokens of a solution; default: 500"
    )
    plan.add_argument(
        "--response-tokens", type=float, metavar="N", help="mean tokens of a response; default: --max-new-tokens"
    )
    plan.add_argument(
        "--fp8", choices=("blockwise", "tensorwise", "delayed", "mxfp8"), help="FP8 with this megatron.fp8_recipe"
    )
    plan.add_argument("--engine", choices=("megatron", "vllm"), help="rollout.engine: what samples")
