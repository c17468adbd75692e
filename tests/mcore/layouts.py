"""Runs a worker module at a layout: one process group runs all its cases."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import forked_ranks


@dataclass(frozen=True)
class Layout:
    processes: int
    tp: int
    pp: int
    sequence_parallel: bool = False
    recompute: str | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    pipeline: dict = field(default_factory=dict)  # what else says which layers a stage has
    layers: int = 4  # of the model
    instances: int = 1  # of the distributed optimiser

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return self.processes // (self.tp * self.pp)

    @property
    def megatron(self) -> dict:
        recompute = {"recompute_granularity": self.recompute}
        if self.recompute == "full":
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "sequence_parallel": self.sequence_parallel,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "num_distributed_optimizer_instances": self.instances,
            **recompute,
            **self.pipeline,
        }


LAYOUTS = {
    "tp1": Layout(1, 1, 1),
    "pp2": Layout(2, 1, 2, recompute="full"),
    "tp2-pp2-sp": Layout(4, 2, 2, True, recompute="full"),
    "tp2-dp2": Layout(4, 2, 1, recompute="selective"),
    "cp2": Layout(2, 1, 1, cp=2),
    "tp2-cp2-sp": Layout(4, 2, 1, True, cp=2),
    "pp2-cp2": Layout(4, 1, 2, recompute="full", cp=2),
    "cp2-dp2": Layout(4, 1, 1, cp=2),
}
# Stages of several chunks of layers, and stages with different numbers of layers.
PIPELINES = {
    "pp2-vp2": Layout(2, 1, 2, pipeline={"virtual_pipeline_model_parallel_size": 2}),
    "tp2-pp2-vp2-sp": Layout(4, 2, 2, True, recompute="full", pipeline={"virtual_pipeline_model_parallel_size": 2}),
    "pp2-vp2-dp2": Layout(4, 1, 2, pipeline={"virtual_pipeline_model_parallel_size": 2}),
    "pp2-first4": Layout(2, 1, 2, recompute="full", pipeline={"num_layers_in_first_pipeline_stage": 4}, layers=7),
    "pp4-ends": Layout(4, 1, 4, pipeline={"pipeline_model_parallel_layout": "E|t*3|t*4|L"}, layers=7),
    "pp2-vp2-uneven": Layout(
        2, 1, 2, recompute="full", pipeline={"pipeline_model_parallel_layout": "E|tt|tttt|tL"}, layers=7
    ),
    # Two neighbours in a ring of three have the same parity, by which Megatron orders sends and receives.
    "pp3-vp2": Layout(3, 1, 3, pipeline={"pipeline_model_parallel_layout": "Et|t|t|tt|t|tL"}, layers=7),
}
# Replicas in two groups that each hold the optimiser's state completely.
INSTANCES = {
    "dp4-instances2": Layout(4, 1, 1, instances=2),
    "tp2-cp2-instances2": Layout(4, 2, 1, True, cp=2, instances=2),
    "pp2-vp2-dp2-instances2": Layout(4, 1, 2, pipeline={"virtual_pipeline_model_parallel_size": 2}, instances=2),
}
# Layouts of a mixture of experts. ep2: replicas share experts, and there are two copies of each expert. tp2-etp1: an
# expert is complete on both tensor-parallel ranks. tp2-ep2-etp1: the experts are cut over tensor-parallel ranks alone.
# tp2-ep2-etp2: two replicas have each expert once, in halves. ep2-etp2: the same of four replicas, without other cuts.
# tp2-cp2-ep2-etp2: one replica, whose ranks cut rows, weights and experts.
EXPERT_LAYOUTS = {
    "experts-tp1": Layout(1, 1, 1),
    "ep2": Layout(4, 1, 1, ep=2),
    "tp2-etp1": Layout(2, 2, 1, True, etp=1),
    "tp2-ep2-etp1": Layout(4, 2, 1, True, recompute="selective", ep=2, etp=1),
    "tp2-ep2-etp2": Layout(4, 2, 1, True, ep=2),
    "pp2-ep2": Layout(4, 1, 2, recompute="full", ep=2),
    "cp2-ep2": Layout(2, 1, 1, cp=2, ep=2),
    "pp2-vp2-ep2": Layout(4, 1, 2, ep=2, pipeline={"virtual_pipeline_model_parallel_size": 2}),
    "pp2-vp2-cp2-ep2": Layout(4, 1, 2, cp=2, ep=2, pipeline={"virtual_pipeline_model_parallel_size": 2}),
    "ep2-etp2": Layout(4, 1, 1, ep=2, etp=2),
    "tp2-cp2-ep2-etp2": Layout(4, 2, 1, True, recompute="full", cp=2, ep=2),
    "ep2-instances2": Layout(4, 1, 1, ep=2, instances=2),
}
# Layouts that `make test` runs. Between them they cut weights, rows and batches in every way: over tensor-parallel
# ranks, stages, chunks of uneven stages, replicas, context-parallel ranks, experts. `make test-all` runs all layouts.
COVERING = (
    *("tp1", "tp2-pp2-sp", "tp2-dp2", "tp2-cp2-sp", "pp2-vp2-uneven", "dp4-instances2"),
    *("experts-tp1", "tp2-ep2-etp1", "pp2-vp2-ep2"),
)


def layout_of(name: str) -> Layout:
    return (LAYOUTS | PIPELINES | INSTANCES | EXPERT_LAYOUTS)[name]


def run_worker(module: str, layout: str, *arguments: str | Path) -> None:
    """Runs `main` of `tests.mcore.MODULE` with LAYOUT ARGUMENTS... on the layout's ranks; fails with their messages."""
    processes = layout_of(layout).processes
    with tempfile.TemporaryDirectory() as printed:
        ended = forked_ranks.run(
            Path(printed), layout, *arguments, target=f"tests.mcore.{module}:main", processes=processes, limit=800
        )
    assert ended.statuses == [0] * processes, "\n".join(text[-3000:] for text in ended.err)
