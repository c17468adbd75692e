"""The cases that every layout runs and that plain torch runs beside it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.mcore.layouts import layout_of

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that every layer matters, small enough that three steps do not amplify float32's rounding to 1e-5.
    "initializer_range": 0.1,
}
# A ramp over the four frequencies of a head: 0, 1/2, 1, 1.
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 3
EMA_DECAY = 0.6
LOSS = {"temperature": 1.1, "weight": 0.3, "fraction": 0.25, "clip": None}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    tied: bool
    teacher: str  # "initial", "current", "ema"; "none" is cross entropy
    optimizer: str
    lora: bool = False
    distributed_optimizer: bool = False
    lr: float = 5e-3
    eps: float = 1e-2  # large: near-zero gradients must not decide Adam's step
    clip_grad: float = 0.0
    weight_decay: float = 0.0
    ema_anchor: float = 0.0
    loss: dict = field(default_factory=dict)  # beyond LOSS
    offload: bool = False  # the teacher's weights rest in host memory
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None  # weights whose gradients are reduced together; None: Megatron's default, all
    grpo: dict | None = None  # settings of GRPO, which then takes the divergence's place
    importance_limit: float | None = None  # every second response was sampled by older weights
    num_samples: int = 5  # 1 leaves a data-parallel replica without any
    yarn: bool = False
    layers: int = 4
    experts: bool = False  # a mixture
    adapts_experts: bool = False  # LoRA on its experts too

    def checkpoint(self, folder: Path, name: str) -> Path:
        """The folder of its weights `name`: start or moved."""
        return checkpoint(folder, name, self.tied, self.yarn, self.experts, self.layers)

    def changes(self, weight: str) -> bool:
        """Whether the weight of this Hugging Face name is trained."""
        if ".experts." in weight:
            return not self.lora or self.adapts_experts
        return not self.lora or any(f".{target}." in weight for target in LORA_TARGETS)

    @property
    def loss_settings(self) -> dict:
        return LOSS | self.loss

    def older(self, index: int, length: int) -> tuple[float, ...] | None:
        """The log-probabilities of a response under the older weights that sampled it."""
        return sampler_logprobs(index, length) if self.importance_limit and index % 2 else None

    @property
    def has_teacher_prompt(self) -> bool:
        return self.teacher != "none" and self.grpo is None


CASES = (
    Case(name="full-initial-sgd", tied=False, teacher="initial", optimizer="sgd", lr=0.3, offload=True),
    Case(name="full-tied-ema-adam", tied=True, teacher="ema", optimizer="adam", clip_grad=0.5, weight_decay=0.3),
    Case(
        name="full-anchored-token-clip",
        tied=True,
        teacher="ema",
        optimizer="adam",
        ema_anchor=0.4,
        loss={"clip": 0.2, "clip_rule": "token"},
        offload=True,
    ),
    Case(
        name="full-current-distributed-adam",
        tied=True,
        teacher="current",
        optimizer="adam",
        distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    Case(name="lora-initial-adam", tied=True, teacher="initial", optimizer="adam", lora=True),
    Case(
        name="lora-ema-sgd",
        tied=False,
        teacher="ema",
        optimizer="sgd",
        lora=True,
        lr=5e-2,
        ema_anchor=0.3,
        loss={"partner": "full_teacher"},
    ),
    Case(
        name="lora-current-distributed-adam",
        tied=True,
        teacher="current",
        optimizer="adam",
        lora=True,
        distributed_optimizer=True,
    ),
    Case(name="full-one-sample", tied=True, teacher="initial", optimizer="sgd", lr=0.3, num_samples=1),
    Case(
        name="full-clip-skip",
        tied=False,
        teacher="ema",
        optimizer="sgd",
        lr=5e-2,
        loss={"clip": 0.05, "elsewhere": "skip", "positions": "threshold", "threshold_nats": 0.05},
    ),
    Case(
        name="lora-random-reweight",
        tied=True,
        teacher="initial",
        optimizer="sgd",
        lora=True,
        lr=5e-2,
        loss={"positions": "random", "control": "reweight", "divergence": "jsd", "jsd_beta": 0.3},
    ),
    Case(
        name="full-support-initial",
        tied=False,
        teacher="current",
        optimizer="sgd",
        lr=0.3,
        loss={"support": "initial", "support_ratio": 0.3, "partner": "initial"},
        offload=True,
    ),
    Case(
        name="lora-support-ema",
        tied=True,
        teacher="ema",
        optimizer="adam",
        lora=True,
        loss={"support": "initial", "support_ratio": 0.3, "clip": 0.5},
    ),
    Case(
        name="full-support-student",
        tied=True,
        teacher="ema",
        optimizer="adam",
        loss={"support": "student", "support_ratio": 0.2, "divergence": "jsd", "jsd_beta": 0.4},
    ),
    Case(
        name="full-older-sgd",
        tied=False,
        teacher="initial",
        optimizer="sgd",
        lr=0.3,
        importance_limit=1.5,
        loss={"clip": 0.3},
    ),
    Case(name="lora-older-adam", tied=True, teacher="ema", optimizer="adam", lora=True, importance_limit=1.5),
    Case(name="yarn-ema-adam", tied=True, teacher="ema", optimizer="adam", yarn=True),
    Case(name="sft-tied-adam", tied=True, teacher="none", optimizer="adam"),
    Case(
        name="sft-distributed",
        tied=True,
        teacher="none",
        optimizer="adam",
        distributed_optimizer=True,
        clip_grad=0.5,
    ),
    Case(
        name="sft-overlapped-gather",
        tied=False,
        teacher="none",
        optimizer="adam",
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=700,  # so the output layer has a bucket alone
    ),
    Case(name="sft-lora-sgd", tied=False, teacher="none", optimizer="sgd", lora=True, lr=5e-2),
    Case(
        name="grpo-kl-sgd",
        tied=False,
        teacher="initial",
        optimizer="sgd",
        lr=0.15,
        grpo={
            "updates_per_batch": 2,
            "clip_low": 0.01,
            "clip_high": 0.015,
            "normalisation": "sequence_mean",
            "kl_weight": 0.3,
            "importance_limit": 1.2,
        },
    ),
    Case(
        name="grpo-older-sgd",
        tied=True,
        teacher="none",
        optimizer="sgd",
        lr=0.15,
        importance_limit=1.5,
        grpo={"updates_per_batch": 2, "importance_limit": 1.2},
    ),
    Case(
        name="grpo-lora-adam",
        tied=True,
        teacher="none",
        optimizer="adam",
        lora=True,
        grpo={"updates_per_batch": 1, "importance_limit": None},
    ),
    Case(
        name="grpo-lora-kl-distributed",
        tied=False,
        teacher="initial",
        optimizer="adam",
        lora=True,
        distributed_optimizer=True,
        grpo={"updates_per_batch": 2, "kl_weight": 0.3, "importance_limit": 2.0},
    ),
    Case(
        name="grpo-one-sample",
        tied=True,
        teacher="initial",
        optimizer="sgd",
        lr=5e-2,
        num_samples=1,
        grpo={"updates_per_batch": 2, "kl_weight": 0.3, "normalisation": "sequence_mean", "importance_limit": None},
    ),
)
BY_NAME = {case.name: case for case in CASES}
# What each layout of `layouts.PIPELINES` and `layouts.INSTANCES` runs. Those with uneven stages train a deeper model.
AT_PIPELINES = {
    "pp2-vp2": (
        "full-tied-ema-adam",
        "full-current-distributed-adam",
        "full-one-sample",
        "full-support-initial",
        "lora-ema-sgd",
        "lora-current-distributed-adam",
        "sft-lora-sgd",
        "sft-overlapped-gather",
        "grpo-kl-sgd",
    ),
    "tp2-pp2-vp2-sp": (
        "full-tied-ema-adam",
        "full-current-distributed-adam",
        "lora-initial-adam",
        "sft-tied-adam",
        "grpo-kl-sgd",
    ),
    "pp2-vp2-dp2": (
        "full-tied-ema-adam",
        "full-current-distributed-adam",
        "full-one-sample",
        "sft-overlapped-gather",
    ),
    "pp2-first4": ("full-tied-ema-adam", "lora-ema-sgd", "grpo-kl-sgd"),
    "pp4-ends": ("full-tied-ema-adam", "grpo-kl-sgd", "sft-tied-adam"),
    "pp2-vp2-uneven": ("full-tied-ema-adam", "lora-ema-sgd", "grpo-kl-sgd"),
    "pp3-vp2": ("full-tied-ema-adam", "lora-ema-sgd"),
    "dp4-instances2": (
        "full-current-distributed-adam",
        "lora-current-distributed-adam",
        "sft-distributed",
        "sft-overlapped-gather",
        "grpo-lora-kl-distributed",
    ),
    "tp2-cp2-instances2": ("full-current-distributed-adam", "sft-distributed", "sft-overlapped-gather"),
    "pp2-vp2-dp2-instances2": ("full-current-distributed-adam", "sft-overlapped-gather"),
}
DEEP = 7  # layers
DEEP_CASES = {
    name: replace(BY_NAME[name], name=f"deep-{name}", layers=DEEP)
    for name in ("full-tied-ema-adam", "lora-ema-sgd", "grpo-kl-sgd", "sft-tied-adam")
}


def cases_at(layout: str) -> tuple[Case, ...]:
    """The cases that a layout runs."""
    if layout not in AT_PIPELINES:
        return CASES
    chosen = DEEP_CASES if layout_of(layout).layers == DEEP else BY_NAME
    return tuple(chosen[name] for name in AT_PIPELINES[layout])


# Cases in which single updates are not finite, with the type of the weights.
NOT_FINITE = {
    "full-tied-ema-adam": "float32",
    "full-initial-sgd": "bfloat16",
    "full-current-distributed-adam": "bfloat16",
}
# `make test` runs every case at tp1. At the other layouts of `layouts.COVERING` it runs the cases that touch what they
# have, and `make test-all` runs the rest.
TOUCHING = {
    "tp2-pp2-sp": (  # shards of the vocabulary, and all collectives of tensor and pipeline parallelism
        "full-initial-sgd",
        "full-tied-ema-adam",
        "full-current-distributed-adam",
        "full-one-sample",
        "full-support-initial",
        "lora-initial-adam",
        "lora-ema-sgd",
        "lora-random-reweight",
        "lora-support-ema",
        "yarn-ema-adam",
        "sft-tied-adam",
        "grpo-kl-sgd",
        "grpo-lora-adam",
    ),
    "tp2-cp2-sp": ("full-tied-ema-adam", "lora-older-adam"),
    "tp2-dp2": (  # replicas: sums over them, state that they share, one that has no sample
        "full-tied-ema-adam",
        "full-current-distributed-adam",
        "lora-current-distributed-adam",
        "full-one-sample",
        "full-clip-skip",
        "sft-overlapped-gather",
        "grpo-kl-sgd",
        "grpo-lora-kl-distributed",
        "grpo-one-sample",
    ),
}
GRPO_TEMPERATURE = 1.2
ADVANTAGES = (1.3, -0.7, 0.4, -1.1, 0.9)


def touches(layout: str, name: str) -> bool:
    """Whether a case touches what a layout has and tp1 has not; all do at layouts that `make test` leaves out."""
    return layout not in TOUCHING or name in TOUCHING[layout]


def part_of(layout: str, name: str) -> str:
    """The part of a layout's cases that a case belongs to: those of one kind that touch the layout, or do not."""
    if layout in AT_PIPELINES:
        return "all"
    return f"{'touching' if touches(layout, name) else 'rest'}-{name.split('-')[0]}"


def make_checkpoints(folder: Path) -> None:
    """Two sets of weights for each kind of model: `start` (the initial teacher) and `moved` (the student)."""
    for tied, yarn, layers in (
        (True, False, 4),
        (False, False, 4),
        (True, True, 4),
        (True, False, 7),
        (False, False, 7),
    ):
        sizes = SIZES | {"num_hidden_layers": layers}
        rope = {"rope_parameters": YARN} if yarn else {}
        for seed, name in ((0, "start"), (1, "moved")):
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, **rope, tie_word_embeddings=tied))
            if name == "moved":
                start = Qwen3ForCausalLM.from_pretrained(checkpoint(folder, "start", tied, yarn, layers=layers))
                with torch.no_grad():
                    for p, q in zip(model.parameters(), start.parameters(), strict=True):
                        p.copy_(q + 0.1 * p)
            model.save_pretrained(checkpoint(folder, name, tied, yarn, layers=layers))


def checkpoint(folder: Path, name: str, tied: bool, yarn: bool = False, experts: bool = False, layers: int = 4) -> Path:
    deep = f"-{layers}" if layers != SIZES["num_hidden_layers"] else ""
    return folder / f"{name}-{'tied' if tied else 'untied'}{'-yarn' * yarn}{'-experts' * experts}{deep}"


def adapter_value(name: str, shape: torch.Size) -> torch.Tensor:
    """A whole adapter matrix, from its PEFT name: not zero, so that the teacher kinds differ."""
    generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return 0.1 * torch.randn(shape, generator=generator)


def sampler_logprobs(index: int, length: int) -> tuple[float, ...]:
    """As a sampler that differs from the trainer would have them."""
    generator = torch.Generator().manual_seed(500 + index)
    return tuple((-4.0 + 0.5 * torch.randn(length, generator=generator)).tolist())


def step_samples(step: int) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """(student prompt, teacher prompt, prompt of the full teacher, response) of the step's problems.

    Lengths differ; one response is one token.
    """
    generator = torch.Generator().manual_seed(100 + step)

    def draw(n: int) -> list[int]:
        return torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist()

    lengths = ((5, 11, 13, 7), (3, 17, 20, 1), (9, 9, 12, 12), (2, 6, 8, 4), (6, 14, 15, 9))
    return [tuple(draw(n) for n in row) for row in lengths]
