"""What this machine can run: the one place that decides between Transformer Engine and plain torch."""

from importlib.util import find_spec

import torch

from megatron_paint.config import MegatronSettings
from megatron_paint.errors import UserError


def engine_is_lacking() -> str | None:
    """Why Transformer Engine cannot be used here, or None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (pip install 'megatron-paint[gpu]')"
    return None


def use_transformer_engine(megatron: MegatronSettings) -> bool:
    """Whether layers come from Transformer Engine; UserError where a setting needs it and it cannot be used."""
    lacking = engine_is_lacking()
    if lacking and megatron.transformer_impl == "transformer_engine":
        raise UserError(f"megatron.transformer_impl=transformer_engine: {lacking}; set it to auto or local")
    if lacking and megatron.fp8 is not None:
        raise UserError(f"megatron.fp8={megatron.fp8} needs Transformer Engine on a GPU: {lacking}; set fp8=null")
    return lacking is None and megatron.transformer_impl != "local"
