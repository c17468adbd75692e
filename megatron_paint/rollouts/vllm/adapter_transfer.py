"""Adapters alone, as PEFT folders that the servers load while they run. The base weights never change."""

import shutil
from pathlib import Path

from megatron_paint.rollouts.vllm.fleet import Adapter, Fleet
from megatron_paint.rollouts.vllm.weights import WeightSource
from megatron_paint.runtime.rank_zero import OnRankZero


class AdapterTransfer:
    """Sends the adapters of a `WeightSource`. Every step has a new name and a new folder.

    vLLM keeps keys and values by the name and path of an adapter. Another adapter under an old path would read those of
    the old one.
    """

    shares_gpus = False
    init_info = None  # vLLM's engine of weight transfers is not used

    def __init__(self, weights: WeightSource, *, folder: Path, on_rank_zero: OnRankZero):
        """folder: of this run alone; all ranks that write and all servers must see it."""
        self.weights, self.folder, self.on_rank_zero = weights, folder, on_rank_zero
        on_rank_zero(self.close)  # what a run that was killed has left

    def send(self, fleet: Fleet | None, version: str) -> None:
        """Makes all live servers sample with the current adapters; all ranks call together.

        fleet: None on all ranks but 0. UserError: the folder cannot be written.
        """
        folder = self.folder / version.replace("/", "-")
        self.weights.export_adapters(folder)
        self.on_rank_zero(lambda: self._load(fleet, Adapter(version, folder)))

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, fleet: Fleet, adapter: Adapter) -> None:
        before = fleet.adapter
        fleet.load_adapter(adapter)
        if before is not None:
            shutil.rmtree(before.folder, ignore_errors=True)
