"""Runs a worker module at a layout: one process group runs all its cases."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support import forked_ranks


@dataclass(frozen=True)
class Layout:
    processes: int
    tp: int
    pp: int
    sequence_parallel: bool = False
    recompute: str | None = None
    ep: int = 1
    etp: int | None = None

    @property
    def megatron(self) -> dict:
        recompute = {"recompute_granularity": self.recompute}
        if self.recompute == "full":
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "sequence_parallel": self.sequence_parallel,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            **recompute,
        }


LAYOUTS = {
    "tp1": Layout(1, 1, 1),
    "pp2": Layout(2, 1, 2, recompute="full"),
    "tp2-pp2-sp": Layout(4, 2, 2, True, recompute="full"),
    "tp2-dp2": Layout(4, 2, 1, recompute="selective"),
}
# Layouts of a mixture of experts. ep2: replicas share experts, and there are two copies of each expert. tp2-etp1: an
# expert is complete on both tensor-parallel ranks. tp2-ep2-etp1: the experts are cut over tensor-parallel ranks alone.
# tp2-ep2-etp2: two replicas have each expert once, in halves. ep2-etp2: the same of four replicas, without other cuts.
EXPERT_LAYOUTS = {
    "experts-tp1": Layout(1, 1, 1),
    "ep2": Layout(4, 1, 1, ep=2),
    "tp2-etp1": Layout(2, 2, 1, True, etp=1),
    "tp2-ep2-etp1": Layout(4, 2, 1, True, recompute="selective", ep=2, etp=1),
    "tp2-ep2-etp2": Layout(4, 2, 1, True, ep=2),
    "pp2-ep2": Layout(4, 1, 2, recompute="full", ep=2),
    "ep2-etp2": Layout(4, 1, 1, ep=2, etp=2),
}
EVERY_LAYOUT = LAYOUTS | EXPERT_LAYOUTS


def run_worker(module: str, layout: str, *arguments: str | Path) -> None:
    """Runs `main` of `tests.mcore.MODULE` with LAYOUT ARGUMENTS... on the layout's ranks; fails with their messages."""
    processes = EVERY_LAYOUT[layout].processes
    with tempfile.TemporaryDirectory() as printed:
        ended = forked_ranks.run(
            Path(printed), layout, *arguments, target=f"tests.mcore.{module}:main", processes=processes, limit=800
        )
    assert ended.statuses == [0] * processes, "\n".join(text[-3000:] for text in ended.err)
