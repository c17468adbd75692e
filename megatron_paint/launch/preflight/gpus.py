"""Whether the node's GPUs are all there, healthy, and multiply right."""

from collections.abc import Callable

from megatron_paint.launch.preflight import nvidia
from megatron_paint.launch.preflight.result import Finding

CHECK = "GPUs"
SIZE = 256  # of the products' sides; their sums stay below 1100, which every float type's GEMM has exactly in float32


def visible() -> int:
    """GPUs that torch may use; 0 where it is built without CUDA."""
    import torch

    return torch.cuda.device_count() if torch.version.cuda else 0


def check_gpus(count: Callable[[], int], expected: int | None) -> tuple[Finding, int]:
    """Counts the GPUs and tries each; also gives their number.

    expected: None takes what is there. Touches the GPUs: to be called in a process that goes away.
    """
    found = count()
    if expected is not None and found != expected:
        advice = "have the node looked at (nvidia-smi, dmesg), or give the right --expect-gpus"
        return Finding(check=CHECK, ok=False, seen=f"{found} visible, {expected} expected", advice=advice), found
    problems = [] if found == 0 else nvidia.health_problems() + _wrong_products(found)
    if problems:
        advice = "have the node looked at, and leave it out until then"
        return Finding(check=CHECK, ok=False, seen=", ".join(problems), advice=advice), found
    health = "healthy by nvidia-smi" if nvidia.is_there() else "nvidia-smi is not there to tell their health"
    seen = f"{found} visible, right products, {health}" if found else "none, and none expected"
    return Finding(check=CHECK, ok=True, seen=seen), found


def _wrong_products(count: int) -> list[str]:
    wrong = []
    for number in range(count):
        try:
            if not multiplies_right(f"cuda:{number}"):
                wrong.append(f"GPU {number} multiplies two matrices wrongly")
        except RuntimeError as error:
            wrong.append(f"GPU {number} cannot be used ({str(error).strip().splitlines()[0]})")
    return wrong


def multiplies_right(device: str) -> bool:
    """A product of matrices of small whole numbers against its value in whole-number arithmetic."""
    import torch

    row, column = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    left, right = (row + column) % 3, (row * 2 + column) % 3
    product = left.float().to(device) @ right.float().to(device)
    return torch.equal(product.cpu().long(), left @ right)
