"""Starts the processes of a run on this machine, or notices that something else already has."""

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from megatron_paint.config import MegatronSettings

ERRORS = "MEGATRON_PAINT_ERRORS"  # folder in which a rank leaves the message of an error of the user's


def inside_a_world() -> bool:
    """Whether torchrun (or a batch script that sets its variables) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_processes(megatron: MegatronSettings) -> int:
    """One a GPU; without GPUs as many as one replica of the model needs."""
    import torch

    return torch.cuda.device_count() or megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size


def run_here(arguments: Sequence[str], processes: int) -> int:
    """Runs `megatron-paint ARGUMENTS` in so many processes; the exit status of the first that failed, or 0.

    An error of the user's is printed once, however many ranks met it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher reports a failed child with a traceback of its own; the child has said what there is to say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory() as errors:
        os.environ[ERRORS] = errors
        try:
            elastic_launch(config, sys.executable)("-m", "megatron_paint", *arguments)
        except ChildFailedError as failure:
            messages = {path.read_text(encoding="utf-8") for path in sorted(Path(errors).iterdir())}
            for message in messages:
                print(message, file=sys.stderr)
            return 2 if messages else max(1, failure.get_first_failure()[1].exitcode)
        finally:
            del os.environ[ERRORS]
    return 0


def tell_launcher(message: str) -> bool:
    """Leaves an error message for the launcher; False where no launcher of ours started this process."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    (Path(folder) / f"rank{os.environ.get('RANK', '0')}").write_text(message, encoding="utf-8")
    return True
