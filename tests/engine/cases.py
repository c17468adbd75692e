"""The stages that are built with Transformer Engine's layers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str = "dense"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    lora: bool = False
    fp8_recipe: str | None = None

    @property
    def crosses(self) -> bool:
        """Whether both kinds of layers read each other's checkpoints here: delayed scaling saves the engine's state."""
        return not self.lora and self.fp8_recipe != "delayed"

    @property
    def saves_state(self) -> bool:
        """Whether the state of a precision-aware optimiser is saved and loaded."""
        return self.fp8_recipe is None

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.ep


CASES = (
    Case(name="dense"),
    Case(name="dense-tp2", tp=2),
    Case(name="dense-pp2", pp=2),
    Case(name="tied-tp2-pp2", model="tied", tp=2, pp=2),
    Case(name="lora-tp2", tp=2, lora=True),
    Case(name="delayed", fp8_recipe="delayed"),
    Case(name="tensorwise-tp2", tp=2, fp8_recipe="tensorwise"),
    Case(name="blockwise-tp2", tp=2, fp8_recipe="blockwise"),
    Case(name="mxfp8", fp8_recipe="mxfp8"),
    Case(name="experts", model="experts"),
    Case(name="experts-ep2", model="experts", ep=2),
    Case(name="experts-pp2-ep2", model="experts", pp=2, ep=2),
    Case(name="experts-blockwise-tp2", model="experts", tp=2, fp8_recipe="blockwise"),
)
