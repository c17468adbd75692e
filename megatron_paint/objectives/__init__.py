"""The algorithms, readable without knowing Megatron: each turns a batch of problems into one update of a policy."""

from megatron_paint.config import Settings
from megatron_paint.objectives.paint import Paint, Share, directly
from megatron_paint.objectives.sft import Sft
from megatron_paint.overlap import MaskerPool
from megatron_paint.prompts import Prompts

__all__ = ["Paint", "Sft", "make_objective"]


def make_objective(
    settings: Settings, prompts: Prompts, *, pool: MaskerPool | None = None, share: Share = directly
) -> Paint | Sft:
    """The objective that `objective.name` asks for; `pool` and `share` as Paint takes them."""
    if settings.objective.name == "sft":
        return Sft(settings, prompts)
    return Paint(settings, prompts, pool=pool, share=share)
