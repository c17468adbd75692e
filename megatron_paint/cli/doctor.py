"""`megatron-paint doctor`: what this machine has, what is missing, and what that costs."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_paint.base.json_text import to_json
from megatron_paint.planning.apex import CURE, apex_folders, is_foreign

Status = Literal["ok", "missing", "broken", "low"]
GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
FREE_DISK = 20 * GIB  # one 8B checkpoint in bf16 is 16 GiB
SHARED_MEMORY = 1 * GIB  # the default of a container, 64 MiB, is too small for NCCL and data loaders
LOG_WIDTH = 140  # of the table if the console is a file
STYLES = {"ok": "green", "missing": "yellow", "low": "yellow", "broken": "bold red"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that doctor looked for."""

    name: str
    status: Status  # low: it exists, but too little of it
    found: str  # version, size or reason
    cost: str = ""  # the consequence; empty if ok
    required: bool = False
    fatal: bool = False  # training may fail


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that `doctor` looks for."""

    name: str  # for the reader
    module: str  # that is imported
    distribution: str  # that pip installs, and that has the version
    cost: str  # what is not possible without it, and how to install it
    required: bool = False
    imported: bool = True  # training imports it, so a broken one is fatal; False: only its presence is reported


REQUIRED = (
    Package(
        name="Megatron-Core",
        module="megatron.core",
        distribution="megatron-core",
        cost="nothing can be trained: pip install megatron-core",
        required=True,
    ),
    Package(
        name="transformers",
        module="transformers",
        distribution="transformers",
        cost="no tokenizer: pip install transformers",
        required=True,
    ),
    Package(
        name="math-verify",
        module="math_verify",
        distribution="math-verify",
        cost="answers cannot be graded: pip install 'math-verify[antlr4_13_2]'",
        required=True,
    ),
)
OPTIONAL = (
    Package(
        name="Transformer Engine",
        module="transformer_engine.pytorch",
        distribution="transformer-engine",
        cost="no FP8 and no fused attention; layers run on megatron.transformer_impl=local",
    ),
    Package(
        name="Triton",
        module="triton",
        distribution="triton",
        cost="the elementwise work of the loss runs in torch: slower, and more memory",
    ),
    Package(
        name="vLLM",
        module="vllm",
        distribution="vllm",
        cost="none now: rollouts are sampled by Megatron in process",
        imported=False,
    ),
    Package(
        name="sentencepiece",
        module="sentencepiece",
        distribution="sentencepiece",
        cost="none for Qwen3; other tokenizers may need it",
        imported=False,
    ),
    Package(
        name="datasets",
        module="datasets",
        distribution="datasets",
        cost="data.format=datasets is refused; JSONL works",
        imported=False,
    ),
    Package(
        name="TensorBoard",
        module="tensorboard",
        distribution="tensorboard",
        cost="no TensorBoard files are written",
        imported=False,
    ),
    Package(
        name="Weights & Biases",
        module="wandb",
        distribution="wandb",
        cost="run.loggers=[wandb] logs nothing",
        imported=False,
    ),
    Package(
        name="MLflow",
        module="mlflow",
        distribution="mlflow-skinny",
        cost="run.loggers=[mlflow] logs nothing",
        imported=False,
    ),
)
EXTENSIONS = (
    Package(
        name="Apex amp_C",
        module="amp_C",
        distribution="apex",
        cost="gradient norms and clipping take a loop of small kernels, unless Transformer Engine is installed",
    ),
    Package(
        name="Apex fused_weight_gradient_mlp_cuda",
        module="fused_weight_gradient_mlp_cuda",
        distribution="apex",
        cost="weight gradients are not added up inside the GEMM: gradient_accumulation_fusion stays off",
    ),
)


def load(module: str) -> ModuleType | str:
    """The module, "" if it is not installed, or why it could not be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron-Core warns of missing packages, which are in the table
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        return "" if f"{module}.".startswith(f"{missing}.") else f"needs {missing}, which is not installed"
    except Exception as error:  # a broken installation can raise anything
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"


def examine_package(package: Package) -> Finding:
    """Looks for one package, imports it if training does, and reports its version."""
    if package.imported:
        module = load(package.module)
        problem = module if isinstance(module, str) else None
    else:
        there = package.module in sys.modules or importlib.util.find_spec(package.module) is not None
        problem = None if there else ""
    if problem is None:
        return Finding(name=package.name, status="ok", found=_version(package), required=package.required)
    return Finding(
        name=package.name,
        status="broken" if problem else "missing",
        found=problem or "not installed",
        cost=package.cost,
        required=package.required,
        fatal=package.required or bool(problem),
    )


def _version(package: Package) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package.module), "__version__", "found"))


def examine_apex() -> list[Finding]:
    """Apex and its CUDA extensions. PyPI's `apex` is another project with the same name."""
    findings = []
    folders = apex_folders()
    if folders is None:
        findings.append(Finding(name="Apex", status="missing", found="not installed", cost="see its extensions below"))
    elif is_foreign(folders):
        findings.append(
            Finding(
                name="Apex",
                status="broken",
                found="a module `apex` without apex.optimizers: not NVIDIA's",
                cost=f"training is refused, because Megatron-Core would use it as NVIDIA's: {CURE}",
                fatal=True,
            )
        )
    else:
        findings.append(Finding(name="Apex", status="ok", found="NVIDIA Apex"))
    return findings + [examine_package(package) for package in EXTENSIONS]


def examine_torch() -> list[Finding]:
    """PyTorch, its GPUs and its communication backends."""
    torch = load("torch")
    if isinstance(torch, str):
        status: Status = "broken" if torch else "missing"
        cost = "nothing can be trained: install PyTorch from pytorch.org"
        found = torch or "not installed"
        return [Finding(name="PyTorch", status=status, found=found, cost=cost, required=True, fatal=True)]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        Finding(name="PyTorch", status="ok", found=f"{torch.__version__}", required=True),
        _gpus(torch, gpus),
        _backend("NCCL", torch.distributed.is_nccl_available(), "no more than one GPU can be used", required=gpus > 1),
        _backend("gloo", torch.distributed.is_gloo_available(), "no run on several CPU processes", required=gpus == 0),
    ]


def _gpus(torch: ModuleType, count: int) -> Finding:
    if not count:
        built = torch.version.cuda
        found = f"PyTorch is built for CUDA {built}, and no GPU answers" if built else "PyTorch is built without CUDA"
        return Finding(
            name="CUDA GPUs", status="missing", found=found, cost="runs on the CPU: enough for the quickstart only"
        )
    devices = [torch.cuda.get_device_properties(number) for number in range(count)]
    names = ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in devices)
    return Finding(name="CUDA GPUs", status="ok", found=f"{count} (CUDA {torch.version.cuda}): {names}")


def _backend(name: str, there: bool, cost: str, *, required: bool) -> Finding:
    if there:
        return Finding(name=name, status="ok", found="available", required=required)
    return Finding(
        name=name, status="missing", found="not in this PyTorch", cost=cost, required=required, fatal=required
    )


def examine_python() -> Finding:
    """The interpreter's version."""
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info >= OLDEST_PYTHON:
        return Finding(name="Python", status="ok", found=platform.python_version(), required=True)
    cost = f"Python {oldest} or newer is needed"
    return Finding(
        name="Python", status="broken", found=platform.python_version(), cost=cost, required=True, fatal=True
    )


def examine_space(name: str, path: Path, *, total: bool, wanted: int, cost: str) -> Finding:
    """The space in one place, in bytes: its total size or its free part."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding(name=name, status="missing", found=f"{path}: {error.strerror}", cost=cost)
    size = usage.total if total else usage.free
    found = f"{size / GIB:.1f} GiB {'in all' if total else 'free'} at {os.path.abspath(path)}"
    return (
        Finding(name=name, status="low", found=found, cost=cost)
        if size < wanted
        else Finding(name=name, status="ok", found=found)
    )


def examine(run_parent: str | Path = ".") -> list[Finding]:
    """All findings, in the order of the table. It changes nothing.

    run_parent: the folder of run folders, whose disk is measured.
    """
    disk = f"less than {FREE_DISK // GIB} GiB: one checkpoint of an 8B model may not fit"
    shared = "less than 1 GiB: NCCL and vLLM fail between GPUs; start the container with --shm-size=16g or --ipc=host"
    checks: list[Callable[[], Finding | list[Finding]]] = [
        examine_python,
        examine_torch,
        # After torch: extensions find its libraries only when it is imported.
        *(lambda package=package: examine_package(package) for package in REQUIRED),
        examine_apex,
        *(lambda package=package: examine_package(package) for package in OPTIONAL),
        lambda: examine_space("Disk", Path(run_parent), total=False, wanted=FREE_DISK, cost=disk),
        lambda: examine_space("Shared memory", Path("/dev/shm"), total=True, wanted=SHARED_MEMORY, cost=shared),
    ]
    findings: list[Finding] = []
    for check in checks:
        result = check()
        findings.extend(result if isinstance(result, list) else [result])
    return findings


def render(findings: list[Finding]) -> Table:
    """The table of the findings."""
    table = Table(show_lines=False)
    for name in ("what", "state", "found", "without it"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        state = finding.status + (" (required)" if finding.required and finding.status != "ok" else "")
        table.add_row(
            finding.name, f"[{STYLES[finding.status]}]{state}[/]", escape(finding.found), escape(finding.cost)
        )
    return table


def run(options: argparse.Namespace, _: list[str]) -> int:
    """The command; returns the exit status."""
    return doctor(as_json=options.json, run_parent=os.getcwd())


def doctor(*, as_json: bool = False, run_parent: str | Path = ".", console: Console | None = None) -> int:
    """Prints the findings. Returns the exit status: 1 if something required is missing or broken, else 0."""
    findings = examine(run_parent)
    fatal = [finding.name for finding in findings if finding.fatal]
    console = console or Console(highlight=False, emoji=False)
    if as_json:
        content = {"ok": not fatal, "findings": [asdict(finding) for finding in findings]}
        print(to_json(content, indent=1), file=console.file)
    else:
        if not console.is_terminal:
            console.width = LOG_WIDTH
        console.print(render(findings))
        verdict = f"Fix first: {', '.join(fatal)}" if fatal else "Ready to train."
        console.print(verdict, style="bold red" if fatal else "bold green", soft_wrap=True)
    return 1 if fatal else 0
