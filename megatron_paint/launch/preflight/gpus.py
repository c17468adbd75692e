"""Checks that all GPUs of the node exist, are healthy, and multiply correctly."""

from collections.abc import Callable

from megatron_paint.launch.preflight import nvidia
from megatron_paint.launch.preflight.result import CheckResult

CHECK = "GPUs"
SIZE = 256  # side of the matrices; the sums are below 1100, so that the product of every float type is exact in float32


def visible() -> int:
    """The number of GPUs that torch may use; 0 if torch was built without CUDA."""
    import torch

    return torch.cuda.device_count() if torch.version.cuda else 0


def check_gpus(count: Callable[[], int], expected: int | None) -> tuple[CheckResult, int]:
    """Counts the GPUs and tests each one. Returns the result and the number of GPUs.

    count: returns the number of visible GPUs. expected: the number that passes; None: any. The test runs a matrix
    product on each GPU, so call it in a process that ends afterwards and frees them.
    """
    found = count()
    if expected is not None and found != expected:
        advice = "check the node (nvidia-smi, dmesg), or correct --expect-gpus"
        return CheckResult(check=CHECK, ok=False, seen=f"{found} visible, {expected} expected", advice=advice), found
    problems = [] if found == 0 else nvidia.health_problems() + _wrong_products(found)
    if problems:
        advice = "have the node repaired, and exclude it until then"
        return CheckResult(check=CHECK, ok=False, seen=", ".join(problems), advice=advice), found
    health = (
        "healthy according to nvidia-smi"
        if nvidia.is_installed()
        else "health not checked, because nvidia-smi was not found"
    )
    seen = f"{found} visible, correct products, {health}" if found else "none, and none expected"
    return CheckResult(check=CHECK, ok=True, seen=seen), found


def _wrong_products(count: int) -> list[str]:
    wrong = []
    for number in range(count):
        try:
            if not multiplies_correctly(f"cuda:{number}"):
                wrong.append(f"GPU {number} multiplies two matrices wrongly")
        except RuntimeError as error:
            wrong.append(f"GPU {number} cannot be used ({str(error).strip().splitlines()[0]})")
    return wrong


def multiplies_correctly(device: str) -> bool:
    """Compares a product of matrices of small integers with its value in integer arithmetic."""
    import torch

    row, column = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    left, right = (row + column) % 3, (row * 2 + column) % 3
    product = left.float().to(device) @ right.float().to(device)
    return torch.equal(product.cpu().long(), left @ right)
