"""Compares the planner's model of time with published speeds, and prints the table of docs/planner.md.

`python tools/planner_published.py --check` ends with status 1 if the page has another table.

A row has the layout that its source states; what a source leaves open is chosen here and marked by "assumed".
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.layer_time import LayerTime
from megatron_paint.planning.search.machines import Gpu, known_gpus
from megatron_paint.planning.search.rollout_time import RolloutTime, server_cache_bytes, server_layout, transfer
from megatron_paint.planning.search.sizes import find_model
from megatron_paint.planning.search.training_time import Batch, Loss, TrainingTime
from megatron_paint.planning.search.workload import Workload

PAGE = Path(__file__).parents[1] / "docs" / "planner.md"
H100, H200, B200 = (known_gpus()[name] for name in ("h100-80", "h200", "b200"))
H800 = replace(H100, nvlink=200.0e9, source="H800: as H100, with 400 GB/s NVLink in both directions")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A published training speed, in tokens/s of a GPU."""

    what: str
    model: str
    gpu: Gpu
    layout: Candidate
    published: float
    note: str
    length: int = 4096
    micro_batch: int = 1  # sequences
    global_batch: int = 512  # sequences
    fp8: bool = False
    lora: int | None = None
    once_a_node: bool = True

    @property
    def unit(self) -> str:
        return "tokens/s a GPU"

    def predicted(self) -> float:
        """Tokens/s of a GPU by the model."""
        training = training_of(self.model, self.gpu, self.layout, self.fp8, self.lora, self.once_a_node)
        batch = Batch(
            sequences=self.global_batch, length=self.length, micro_batch_tokens=self.micro_batch * self.length
        )
        loss = Loss(tokens=self.length, products=3 if self.lora is None else 2, logit_sets=1)
        seconds = training.student(batch, loss) + training.reduction(batch) + training.optimizer()
        return self.global_batch * self.length / seconds.total / self.layout.gpus


def training_of(
    model: str, gpu: Gpu, layout: Candidate, fp8: bool, lora: int | None, once_a_node: bool
) -> TrainingTime:
    """The times of a layout, with gradients reduced while the backward pass runs."""
    _, shape = find_model(model)
    layer = LayerTime(shape=shape, gpu=gpu, layout=layout, fp8=fp8, lora_rank=lora, once_a_node=once_a_node)
    return TrainingTime(layer=layer, overlap=True)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Published seconds of a complete step that samples with vLLM on the GPUs that train."""

    what: str
    model: str
    gpu: Gpu
    layout: Candidate
    published: float
    note: str
    work: Workload
    micro_batch_tokens: int = 16384
    lora: int | None = None
    ahead: bool = False

    @property
    def unit(self) -> str:
        return "s a step"

    def predicted(self) -> float:
        """Seconds by the model."""
        training, work = training_of(self.model, self.gpu, self.layout, False, self.lora, False), self.work
        batch = Batch(
            sequences=work.sequences, length=work.prompt + work.response, micro_batch_tokens=self.micro_batch_tokens
        )
        loss = Loss(tokens=work.response, products=work.output_products, logit_sets=work.logit_sets)
        seconds = training.student(batch, loss) + training.reduction(batch) + training.optimizer()
        seconds += (work.teacher_passes + work.initial_passes) * training.forward(batch)
        served, servers = server_layout(training.layer, gpus=self.layout.gpus)
        sampler = replace(training.layer, layout=served, lora_rank=None)
        prompts, decoding = RolloutTime(
            layer=sampler,
            host="vllm",
            replicas=servers,
            rows=256,
            cache_bytes=server_cache_bytes(sampler, served),
        ).seconds(work, prefill_tokens=self.micro_batch_tokens)
        rollout = prompts + decoding + transfer(training.layer)
        return max(seconds.total, rollout.total) if self.ahead else seconds.total + rollout.total


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Published seconds of a transfer of weights to servers."""

    what: str
    model: str
    gpu: Gpu
    published: float
    note: str

    @property
    def unit(self) -> str:
        return "s"

    def predicted(self) -> float:
        """Seconds by the model."""
        _, shape = find_model(self.model)
        return transfer(LayerTime(shape=shape, gpu=self.gpu, layout=Candidate())).total


def grpo(prompts: int, samples: int, response: int) -> Workload:
    """A GRPO step with the log-probabilities of two older sets of weights, as NeMo-RL does it."""
    return Workload(
        sequences=prompts * samples,
        prompt=200.0,
        response=float(response),
        new_tokens=4096,
        teacher_prompt=200.0,
        teacher_passes=0,
        initial_passes=2,
        updates=1,
        output_products=5.0,
        logit_sets=3,
    )


ROWS: tuple[Training | Step | Transfer, ...] = (
    Training(
        what="Qwen3-8B pretraining, 16 H100, bf16, DP 16",
        model="qwen3_8b",
        gpu=H100,
        layout=Candidate(dp=16),
        published=10456,
        note="fitted; Megatron-Bridge card",
    ),
    Training(
        what="Qwen3-8B LoRA, 1 H100, bf16",
        model="qwen3_8b",
        gpu=H100,
        layout=Candidate(),
        published=8429,
        global_batch=32,
        lora=32,
        note="Megatron-Bridge card; rank assumed",
    ),
    Training(
        what="Qwen3-8B SFT, 4 H100, bf16, TP 4, rows of 2k",
        model="qwen3_8b",
        gpu=H100,
        layout=Candidate(tp=4),
        published=2207,
        length=2048,
        global_batch=32,
        note='Megatron-Bridge card, "not tuned"',
    ),
    Training(
        what="Qwen3-8B SFT, 8 H100, bf16, TP 4 x CP 2, rows of 32k",
        model="qwen3_8b",
        gpu=H100,
        layout=Candidate(tp=4, cp=2),
        published=457,
        length=32768,
        global_batch=8,
        note='Megatron-Bridge card, "not tuned"',
    ),
    Training(
        what="Qwen3-4B SFT, 8 H100, bf16, rows of 16k",
        model="qwen3_4b",
        gpu=H100,
        layout=Candidate(dp=8, recompute="full"),
        published=6215,
        length=16384,
        global_batch=64,
        note="prime-rl, FSDP2; full recomputation assumed",
    ),
    Training(
        what="Qwen3-4B SFT, 8 H200, bf16, rows of 16k",
        model="qwen3_4b",
        gpu=H200,
        layout=Candidate(dp=8, recompute="full"),
        published=6643,
        length=16384,
        global_batch=64,
        note="prime-rl, FSDP2; full recomputation assumed",
    ),
    Training(
        what="30B-A3B pretraining, 16 H100, bf16, EP 16",
        model="qwen3_30b_a3b",
        gpu=H100,
        layout=Candidate(dp=16, ep=16),
        published=8655,
        note="fitted; Megatron-Bridge card",
    ),
    Training(
        what="30B-A3B pretraining, 16 H100, FP8, EP 16",
        model="qwen3_30b_a3b",
        gpu=H100,
        layout=Candidate(dp=16, ep=16),
        published=8826,
        fp8=True,
        note="fitted; Megatron-Bridge 26.06",
    ),
    Training(
        what="30B-A3B pretraining, 8 B200, MXFP8, EP 8",
        model="qwen3_30b_a3b",
        gpu=B200,
        layout=Candidate(dp=8, ep=8),
        published=27136,
        fp8=True,
        note="Megatron-Bridge 26.04.01; layout assumed",
    ),
    Training(
        what="30B-A3B, 16 H800, bf16, EP 16, rows of 8k",
        model="qwen3_30b_a3b",
        gpu=H800,
        layout=Candidate(dp=16, ep=16),
        published=6325,
        length=8192,
        once_a_node=False,
        note="Pai-Megatron-Patch#643; layout assumed",
    ),
    Training(
        what="30B-A3B SFT, 8 H200, bf16, EP 8, rows of 16k",
        model="qwen3_30b_a3b",
        gpu=H200,
        layout=Candidate(dp=8, ep=8, recompute="full"),
        published=4378,
        length=16384,
        global_batch=64,
        note="prime-rl, FSDP2; layout and full recomputation assumed",
    ),
    Training(
        what="235B-A22B pretraining, 256 H100, FP8, TP 2 x PP 8 x VP 4, EP 32",
        model="qwen3_235b_a22b",
        gpu=H100,
        layout=Candidate(tp=2, pp=8, vpp=4, balanced=True, dp=16, ep=32),
        published=1712,
        global_batch=2048,
        fp8=True,
        note="Megatron-Bridge 26.04.01; batch assumed",
    ),
    Training(
        what="235B-A22B pretraining, 256 B200, MXFP8, the same layout",
        model="qwen3_235b_a22b",
        gpu=B200,
        layout=Candidate(tp=2, pp=8, vpp=4, balanced=True, dp=16, ep=32),
        published=3776,
        global_batch=2048,
        fp8=True,
        note="Megatron-Bridge 26.04.01; layout and batch assumed",
    ),
    Training(
        what="235B-A22B, 256 H800, bf16, the same layout",
        model="qwen3_235b_a22b",
        gpu=H800,
        layout=Candidate(tp=2, pp=8, vpp=4, balanced=True, dp=16, ep=32),
        published=1540,
        global_batch=2048,
        note="Pai-Megatron-Patch#658; layout and batch assumed",
    ),
    Step(
        what="GRPO, 30B-A3B, 32 H100, bf16, on-policy",
        model="qwen3_30b_a3b",
        gpu=H100,
        layout=Candidate(dp=32, ep=8),
        published=192,
        work=grpo(64, 32, 3100),
        note="NeMo-RL 0.6; 2,048 responses, their length from its tokens/s; layout assumed",
    ),
    Step(
        what="GRPO, 235B-A22B, 128 H100, bf16, one step ahead",
        model="qwen3_235b_a22b",
        gpu=H100,
        layout=Candidate(tp=4, pp=8, balanced=True, dp=4, ep=16, recompute="full"),
        published=395,
        work=grpo(16, 32, 5600),
        ahead=True,
        note="NeMo-RL 0.6; 512 responses and layout assumed",
    ),
    Step(
        what="OPSD, Qwen3-1.7B, 1 H100, 1,024 new tokens",
        model="qwen3_1p7b",
        gpu=H100,
        layout=Candidate(recompute="full"),
        published=18,
        lora=64,
        work=Workload(
            sequences=32,
            prompt=200.0,
            response=1024.0,
            new_tokens=1024,
            teacher_prompt=700.0,
            teacher_passes=1,
            initial_passes=0,
            updates=1,
            output_products=3.0,
            logit_sets=2,
        ),
        note="opsd-reference-study; 100 steps in about 30 minutes; 32 problems assumed",
    ),
    Transfer(
        what="weights of 235B-A22B to 8 H800",
        model="qwen3_235b_a22b",
        gpu=H800,
        published=6.22,
        note="checkpoint-engine",
    ),
)


def table() -> Iterator[str]:
    """The rows of the page."""
    yield "| what | unit | published | predicted | predicted / published | source and assumptions |"
    yield "|---|---|---:|---:|---:|---|"
    for row in ROWS:
        predicted = row.predicted()
        yield (
            f"| {row.what} | {row.unit} | {row.published:,g} | {_number(predicted)} | "
            f"{predicted / row.published:.2f} | {row.note} |"
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or compares it with the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only compare the page with the model")
    check = parser.parse_args(arguments).check
    rows = list(table())
    if not check:
        print("\n".join(rows))
        return 0
    old = [row for row in rows if row not in PAGE.read_text(encoding="utf-8").splitlines()]
    print("\n".join(["docs/planner.md does not have these rows:", *old]) if old else "docs/planner.md is current")
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main())
