"""Starts a worker module at a layout: one process group runs all its cases."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Layout:
    processes: int
    tp: int
    pp: int
    sequence_parallel: bool = False
    recompute: str | None = None

    @property
    def megatron(self) -> dict:
        recompute = {"recompute_granularity": self.recompute}
        if self.recompute == "full":
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "sequence_parallel": self.sequence_parallel,
            **recompute,
        }


LAYOUTS = {
    "tp1": Layout(1, 1, 1),
    "pp2": Layout(2, 1, 2, recompute="full"),
    "tp2-pp2-sp": Layout(4, 2, 2, True, recompute="full"),
    "tp2-dp2": Layout(4, 2, 1, recompute="selective"),
}


def run_worker(module: str, layout: str, *arguments: str | Path, timeout: int = 800) -> str:
    """Runs `tests.mcore.MODULE LAYOUT ARGUMENTS...` on the layout's ranks; fails with what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(LAYOUTS[layout].processes), "-m", f"tests.mcore.{module}", layout]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        # The first rank's traceback says it; the launcher's own report does not.
        lines = [line for line in done.stderr.splitlines() if line.startswith("[rank")] or done.stderr.splitlines()
        raise AssertionError("\n".join(lines[-25:]))
    return done.stdout
