"""The estimate for a mixture of experts against bytes that were really allocated: tiny models on CPUs.

Activations are compared as the mean over the ranks, because the estimate takes the experts' load to be even.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_paint.config.load import load_settings
from megatron_paint.planning.layout import check_layout
from megatron_paint.planning.stage_memory import StageMemory
from tests.planning.memory_worker import CHANGES, LENGTH, PER_MICRO_BATCH
from tests.support import forked_ranks
from tests.support.marks import long_if_in

WITHIN = 0.05
PER_REPLICA = 4  # sequences
LAYOUTS = {  # processes, tensor parallel, further settings
    "one process": (1, 1, {}),
    "experts 2": (2, 1, {"expert_model_parallel_size": 2}),
    "tensor 2, complete experts": (2, 2, {"sequence_parallel": True, "expert_tensor_parallel_size": 1}),
    "tensor 2 x experts 2 in halves": (4, 2, {"sequence_parallel": True, "expert_model_parallel_size": 2}),
}
CASES = {
    "one process": ["full", "full selective", "full recompute", "lora", "lora recompute", "lora experts"],
    "experts 2": ["full", "lora experts"],
    "tensor 2, complete experts": ["full", "lora experts"],
    "tensor 2 x experts 2 in halves": ["full", "lora"],
}


def write_settings(folder: Path, *, processes: int, tp: int, megatron: dict) -> Path:
    """A random model whose layers save more than its tables weigh, and settings for it."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=96,
        intermediate_size=320,
        moe_intermediate_size=112,
        num_experts=8,
        num_experts_per_tok=3,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    path = folder / "settings.yaml"
    settings = {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": "unused",
            "problems_per_step": PER_REPLICA * processes // tp,
            "micro_batch_tokens": PER_MICRO_BATCH * LENGTH,
        },
        "objective": {"loss": {"positions": "all"}},
        "rollout": {"max_new_tokens": LENGTH, "batch_size": PER_MICRO_BATCH},
        "megatron": {"tensor_model_parallel_size": tp, **megatron},
        "run": {"dir": "unused"},
    }
    path.write_text(json.dumps(settings))
    return path


def expected(settings, *, processes: int) -> dict[str, float]:
    """The estimate's parts, by the names of the measurements."""
    layout = check_layout(settings.model, settings.megatron, settings.rollout, processes=processes)
    training = StageMemory(settings, layout, stage=0, engine=False, triton=False, on_gpus=False).training()
    held = training[0].parts
    return {
        "weights": held["weights"] + held["adapters"],
        "gradients": held["gradients"],
        "optimiser": held["optimiser"],
        "teacher": held["teacher"],
        "activations": max(
            peak.parts.get("activations", 0.0) + peak.parts.get("inputs of recomputed layers", 0.0) for peak in training
        ),
    }


# `make test` has every kind of training, and experts that are shared and cut.
LONG = ("experts 2", "tensor 2, complete experts")


@pytest.mark.parametrize("name", long_if_in(LONG, LAYOUTS))
def test_estimate_is_what_is_allocated(name, tmp_path):
    processes, tp, megatron = LAYOUTS[name]
    settings = write_settings(tmp_path, processes=processes, tp=tp, megatron=megatron)
    worker = {"target": "tests.planning.memory_worker:main", "processes": processes, "limit": 600}
    ended = forked_ranks.run(tmp_path, "parts", settings, tmp_path, *CASES[name], **worker)
    assert ended.statuses == [0] * processes, "\n".join(text[-3000:] for text in ended.err)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text())["cases"] for rank in range(processes)]
    off = []
    for case in CASES[name]:
        estimate = expected(load_settings(settings, CHANGES[case]), processes=processes)
        for part, wanted in estimate.items():
            sizes = [rank[case][part] for rank in ranks]
            for size in [sum(sizes) / processes] if part == "activations" else sizes:
                if abs(wanted - size) > WITHIN * size:
                    off.append(f"{case}, {part}: estimated {wanted:,.0f}, allocated {size:,.0f}")
    assert not off, "\n".join(off)
