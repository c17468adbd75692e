"""Checks and measures this project on one GPU, in order of value, within eight minutes.

    python tools/gpu_check.py [--out gpu_check.json] [--parts versions,engine,...] [--limit 480]
    python tools/gpu_check.py --tiny          # tiny sizes, also on a CPU: exercises the check itself

Each part runs in a separate process with a time limit. The file has the result of every part that has ended. The other
parts still run if one fails, crashes or hangs. The exit status is 0 if no part failed.

    versions         driver, libraries, the GPU
    engine           one linear layer of Transformer Engine without FP8 and with three FP8 recipes, against torch
    tests            tests/gpu
    loss             benchmarks/loss.py: the fused loss against its products, and peers that are installed
    step             training steps of PAINT and of SFT in bfloat16: seconds, FLOP/s, memory against the estimate
    step_tensorwise  the same in FP8 with one scale for a tensor
    step_blockwise   the same in FP8 with blockwise scales
    sampling         tokens a second of the sampler in process

The model of the steps has the width of Qwen3-8B and four layers, with random weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDE = {  # Qwen3-8B, with fewer layers
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    model: Mapping[str, int]
    dtype: str
    samples: int  # of a step
    prompt: int
    solution: int
    response: int
    steps: int  # timed ones, after a warm-up
    rows: int  # that are sampled together
    new_tokens: int
    loss: tuple[str, ...]  # arguments of benchmarks/loss.py
    variants: tuple[str, ...]  # of the loss


FULL = Sizes(
    model=WIDE,
    dtype="bfloat16",
    samples=16,
    prompt=256,
    solution=512,
    response=1024,
    steps=3,
    rows=64,
    new_tokens=128,
    loss=("--tokens", "8192", "--hidden", "4096"),
    variants=("gemms", "fused", "triton", "liger"),
)
SMALL = Sizes(
    model=TINY,
    dtype="float32",
    samples=4,
    prompt=8,
    solution=8,
    response=16,
    steps=2,
    rows=4,
    new_tokens=8,
    loss=("--tokens", "64", "--hidden", "64", "--vocab", "1024", "--tp", "1"),
    variants=("gemms", "fused"),
)


def versions(sizes: Sizes) -> dict[str, Any]:
    from importlib import metadata

    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("megatron-core", "transformer-engine", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": device.name,
            "memory_gb": device.total_memory / 1e9,
            "processors": device.multi_processor_count,
        }
        found["capability"] = list(torch.cuda.get_device_capability(0))
    return found


def engine(sizes: Sizes) -> dict[str, Any]:
    """The relative error of a linear layer and its gradients, for each recipe."""
    import torch

    from megatron_paint.planning.hardware import missing_for_engine

    if (missing := missing_for_engine()) is not None:
        raise Skipped(missing)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    recipes = {
        "none": None,
        "tensorwise": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
        "delayed": recipe.DelayedScaling(),
    }
    layer = te.Linear(4096, 4096, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = x.detach().float() @ layer.weight.detach().float().T
    found = {}
    for name, one in recipes.items():
        try:
            with te.fp8_autocast(enabled=one is not None, fp8_recipe=one):
                y = layer(x)
            y.float().square().mean().backward()
            error = (y.detach().float() - wanted).norm() / wanted.norm()
            finite = bool(layer.weight.grad.isfinite().all())
            found[name] = {"relative_error": float(error), "gradient_is_finite": finite}
        except Exception as error:  # another recipe may work
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        layer.weight.grad = None
    return found


def tests(sizes: Sizes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-x" if sizes is SMALL else "-q", "-m", "gpu"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", str(ROOT / "tests" / "gpu")]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {ended.returncode}: {(ended.stdout + ended.stderr)[-500:]}")
        from xml.etree import ElementTree

        suite = ElementTree.parse(report).getroot().find("testsuite")
        names = ("tests", "failures", "errors", "skipped")
        found = {name: int(suite.get(name, 0)) for name in names}
        wrong = ("failure", "error")
        failed = [
            case.get("name") for case in suite.iter("testcase") if any(case.find(one) is not None for one in wrong)
        ]
        if failed:
            raise RuntimeError(f"{len(failed)} of {found['tests']} tests failed: {', '.join(failed[:20])}")
        if found["tests"] == found["skipped"]:
            raise Skipped(f"pytest skipped all {found['tests']} tests")
        return found


def loss(sizes: Sizes) -> dict[str, Any]:
    """A command measures one variant. If a variant crashes, the others keep their figures."""
    rows = [measured_loss(variant, sizes) for variant in sizes.variants]
    if all("error" in row for row in rows):
        raise RuntimeError(rows[0]["error"])
    return {"rows": rows}


def measured_loss(variant: str, sizes: Sizes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loss.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "loss.py"), *sizes.loss, "--variants", variant]
        ended = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            text = f"benchmarks/loss.py ended with status {ended.returncode}: {ended.stderr[-500:]}"
            return {"variant": variant, "error": text}
        (row,) = json.loads(file.read_text())
        return row


def step(sizes: Sizes, *, fp8_recipe: str | None = None) -> dict[str, Any]:
    """Seconds of a step of PAINT and of SFT on the same responses, and their FLOP/s.

    FLOP: six for each weight of the body and each token of the student, two for each of the teacher's; the output layer
    at response tokens: its logits on each side, and two products of the gradient; causal attention.
    """
    import torch

    from megatron_paint.losses.objectives import CrossEntropyLoss, DistillationLoss
    from megatron_paint.planning.hardware import missing_for_engine

    megatron: dict[str, Any] = {"recompute_granularity": "selective"} if sizes is FULL else {}
    if fp8_recipe is not None:
        if (missing := missing_for_engine()) is not None and sizes is FULL:
            raise Skipped(missing)
        megatron |= {"fp8": "hybrid", "fp8_recipe": fp8_recipe, "fp8_emulate": missing is not None}
    dtype = "bfloat16" if fp8_recipe is not None else sizes.dtype
    with tempfile.TemporaryDirectory() as folder:
        policy, settings, shape = made_policy(Path(folder), sizes, dtype=dtype, megatron=megatron)
        samples = made_samples(sizes)
        paint = DistillationLoss(
            config=settings.objective.loss, chunk_bytes=settings.objective.chunk_bytes, token_temperature=1.0
        )
        sft = CrossEntropyLoss(chunk_bytes=settings.objective.chunk_bytes)
        found: dict[str, Any] = {"layers": type(policy.stage.chunks[0].decoder.layers[0].mlp.linear_fc1).__name__}
        for name, one in (("paint", paint), ("sft", sft)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(lambda one=one: policy.update(samples, one, lr=1e-6), sizes.steps)
            flop = flop_of(shape, sizes, teaches=name == "paint")
            found[name] = {"seconds": seconds, "tflop": flop / 1e12, "tflop_a_second": flop / seconds / 1e12}
            if torch.cuda.is_available():
                found[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if (peak := gpu_peak(fp8=fp8_recipe is not None)) is not None:
            for name in ("paint", "sft"):
                found[name]["share_of_peak"] = found[name]["tflop_a_second"] * 1e12 / peak
        found["paint_over_sft"] = found["paint"]["seconds"] / found["sft"]["seconds"]
        found["estimated_peak_gb"] = estimated_peak(settings) / 1e9
    return found


def sampling(sizes: Sizes) -> dict[str, Any]:
    from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

    with tempfile.TemporaryDirectory() as folder:
        policy, *_ = made_policy(Path(folder), sizes, dtype=sizes.dtype, megatron={}, trained=False)
        prompts = [sample.rollout.prompt_ids for sample in made_samples(sizes)]
        requests = [
            GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=prompts[i % len(prompts)], key=i)
            for i in range(sizes.rows)
        ]
        plain = SamplingParameters(
            max_new_tokens=sizes.new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset()
        )
        seconds = timed(lambda: policy.sampler.generate(requests, plain), 2)
        return {"seconds": seconds, "tokens_a_second": sizes.rows * sizes.new_tokens / seconds, "rows": sizes.rows}


class Skipped(Exception):
    """What a part needs is not here."""


PARTS: dict[str, tuple[int, Callable[[Sizes], dict[str, Any]]]] = {  # most seconds, and the part
    "versions": (30, versions),
    "engine": (60, engine),
    "tests": (150, tests),
    "loss": (90, loss),
    "step": (90, step),
    "step_tensorwise": (90, lambda sizes: step(sizes, fp8_recipe="tensorwise")),
    "step_blockwise": (90, lambda sizes: step(sizes, fp8_recipe="blockwise")),
    "sampling": (60, sampling),
}


def made_policy(folder: Path, sizes: Sizes, *, dtype: str, megatron: dict[str, Any], trained: bool = True):
    """A policy with random weights in one process, its settings and its shape."""
    from megatron_paint.config.load import settings_of
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.mcore.ranks import start_ranks
    from megatron_paint.models.qwen3.shape import read_shape

    write_model(folder, sizes.model)
    settings = settings_of(
        {
            "model": {"hf_path": str(folder), "dtype": dtype},
            "data": {"train": "none", "micro_batch_tokens": 8192, "problems_per_step": sizes.samples},
            "objective": {"name": "paint", "teacher": {"weights": "current"}},
            "rollout": {"max_new_tokens": sizes.response, "batch_size": sizes.rows},
            "megatron": megatron,
            "run": {"dir": "none"},
        }
    )
    shape = read_shape(folder)
    return MegatronPolicy(settings, shape, start_ranks(settings.megatron), trained=trained), settings, shape


def write_model(folder: Path, model: Mapping[str, int]) -> None:
    """A Hugging Face folder of random weights in bfloat16."""
    import torch
    from safetensors.torch import save_file

    from megatron_paint.models.qwen3.mapping import hugging_face_shapes
    from megatron_paint.models.qwen3.shape import read_shape

    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False, **model}
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else torch.randn(size, generator=generator).mul_(0.02).to(torch.bfloat16)
        for name, size in hugging_face_shapes(read_shape(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors")


def made_samples(sizes: Sizes) -> list:
    import torch

    from megatron_paint.records import Problem, Rollout, Sample

    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(sizes.model["vocab_size"], (count,), generator=generator).tolist())

    found = []
    for number in range(sizes.samples):
        prompt, response = draw(sizes.prompt), draw(sizes.response)
        found.append(
            Sample(
                problem=Problem(id=str(number), problem="", solution="", answer=""),
                key=number,
                rollout=Rollout(problem_id=str(number), prompt_ids=prompt, response_ids=response),
                teacher_prompt_ids=(*prompt, *draw(sizes.solution)),
            )
        )
    return found


def flop_of(shape, sizes: Sizes, *, teaches: bool) -> float:
    """Floating-point operations of a step."""
    table = shape.vocab_size * shape.hidden_size
    body = shape.num_parameters - (1 if shape.tied else 2) * table
    student, teacher = sizes.prompt + sizes.response, sizes.prompt + sizes.solution + sizes.response
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim  # causal: of each token and half its row
    forward_student = student * (2 * body + attention * student)
    forward_teacher = teacher * (2 * body + attention * teacher) if teaches else 0.0
    output = sizes.response * 2 * table * (3 + teaches)
    return sizes.samples * (3 * forward_student + forward_teacher + output)


def gpu_peak(*, fp8: bool) -> float | None:
    """FLOP/s of this GPU by its data sheet; None: it is not known."""
    import torch

    from megatron_paint.planning.search.machines import known_gpus

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0).lower()
    known = [gpu for key, gpu in known_gpus().items() if key.split("-")[0] in name]
    return (known[0].fp8 if fp8 else known[0].bf16) if known else None


def estimated_peak(settings) -> float:
    """Bytes of the training peak that the plan prints."""
    from megatron_paint.planning.memory import make_plan

    return make_plan(settings, processes=1).memory.training.total


def timed(act: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of some rounds, after a warm-up."""
    import torch

    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def run_part(name: str, *, tiny: bool, limit: float) -> dict[str, Any]:
    """Runs a part in its own process."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        found = {"status": "failed", "message": f"it took more than {limit:.0f} s"}
    except KeyboardInterrupt:  # Ctrl-C does not reach the part: it has another session
        os.killpg(process.pid, 9)
        raise
    else:
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if process.returncode == 0 and lines:
            found = json.loads(lines[-1])
        else:
            found = {"status": "failed", "message": f"status {process.returncode}: {err[-1500:]}"}
    return {"seconds": round(time.perf_counter() - start, 1), **found}


def write(file: Path, found: dict[str, Any]) -> None:
    """Replaces the file as one."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="file of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated names, run in the given order")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for all parts")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = SMALL if options.tiny else FULL
    if options.part is not None:
        try:
            print(json.dumps({"status": "passed", "result": PARTS[options.part][1](sizes)}))
        except Skipped as missing:
            print(json.dumps({"status": "skipped", "message": str(missing)}))
        return 0
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts has {unknown[0]!r}; known are {', '.join(PARTS)}")
    try:
        write(options.out, {})
    except OSError as error:
        parser.error(f"--out={options.out} cannot be written ({error.strerror})")
    end, found = time.monotonic() + options.limit, {}
    for name in names:
        left = end - time.monotonic()
        if left < 1:
            found[name] = {"status": "skipped", "message": f"--limit={options.limit:g} seconds were over"}
        else:
            found[name] = run_part(name, tiny=options.tiny, limit=min(PARTS[name][0], left))
        write(options.out, found)
        one = found[name]
        print(
            f"{name:16} {one['status']:8} {one.get('seconds', 0):6.1f} s  {one.get('message', '')[-200:]}", flush=True
        )
    print(f"Results: {options.out}")
    return int(any(one["status"] == "failed" for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
