"""Lets Megatron's optimiser with its state in host memory run on a CPU: a part of this memory counts as the GPU's.

Megatron decides by `is_cuda` what it moves, and pins what it has moved. Everything else is its own code: the copies of
weights and gradients, torch's AdamW on them, and what is loaded and saved.
"""

from unittest.mock import patch

import torch
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def stand_in_for_gpu_memory() -> None:
    """Changes the process. It cannot be undone, so each test of it has its own process."""
    choose = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def choose_with_gpu(self, offload_fraction: float):
        weights = {_storage(p) for group in self.param_groups for p in group["params"]}
        is_cuda = property(lambda tensor: _storage(tensor) in weights)
        with patch.object(torch.Tensor, "is_cuda", is_cuda), patch.object(torch.Tensor, "pin_memory", lambda t: t):
            return choose(self, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = choose_with_gpu
    # Where there is a GPU, there is Transformer Engine.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    optimizer_config.is_te_min_version = lambda version: True


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
