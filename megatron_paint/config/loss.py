"""The settings of the sparse interpolation loss; importing them needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Partner = Literal["student", "full_teacher"]
Positions = Literal["top_fraction", "threshold", "all", "none", "random"]
Mismatch = Literal["absolute", "teacher_minus_student", "student_minus_teacher"]
Elsewhere = Literal["teacher", "skip"]
Control = Literal["none", "reweight"]
ClipRule = Literal["entry", "token"]
Kernel = Literal["auto", "torch", "triton"]

_CHOICES = {
    "divergence": get_args(Divergence),
    "partner": get_args(Partner),
    "positions": get_args(Positions),
    "mismatch": get_args(Mismatch),
    "elsewhere": get_args(Elsewhere),
    "control": get_args(Control),
    "clip_rule": get_args(ClipRule),
}


@dataclass(frozen=True, kw_only=True)
class InterpolationLossConfig:
    """Which target a position gets, which divergence is taken to it, and where.

    temperature > 0 divides all logits; clip > 0 in nats, None = off. clip_rule="entry" bounds each vocabulary entry of
    the forward KL, which can turn the gradient round; "token" bounds the gradient of a token, of any divergence: above
    the clip the loss is clip (1 + ln(divergence / clip)), and the gradient keeps its direction.
    weight (lambda), fraction in [0, 1]; jsd_beta strictly in (0, 1); threshold_nats belongs to positions="threshold".
    elsewhere="skip" leaves positions that are not selected without loss. control="reweight" keeps the plain teacher as
    the target everywhere and multiplies the loss of selected positions, after the clip, by 1 - weight.
    Raises ValueError for anything else. Source: PAINT (arXiv 2604.26573); the clip is from OPSD (arXiv 2601.18734);
    fraction and weight defaults, the student partner, the control and the clip of tokens are ours.
    """

    divergence: Divergence = "forward_kl"
    jsd_beta: float = 0.5
    temperature: float = 1.1
    clip: float | None = None
    clip_rule: ClipRule = "entry"
    weight: float = 0.1
    partner: Partner = "student"
    positions: Positions = "top_fraction"
    fraction: float = 0.10
    threshold_nats: float | None = None
    mismatch: Mismatch = "absolute"
    elsewhere: Elsewhere = "teacher"
    control: Control = "none"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise _refusal(name, value, "it is one of " + ", ".join(choices), "choose one of them")
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        _check_number("jsd_beta", self.jsd_beta)
        if not 0.0 < self.jsd_beta < 1.0:
            fact = "it lies strictly between 0 and 1: at either end the JSD is 0 whatever the student says"
            raise _refusal("jsd_beta", self.jsd_beta, fact, "ask for divergence forward_kl or reverse_kl by name")
        _check_number("temperature", self.temperature)
        if self.temperature <= 0.0:
            raise _refusal("temperature", self.temperature, "it divides the logits and is above 0", "1.1 is usual")
        for name in ("weight", "fraction"):
            value = getattr(self, name)
            _check_number(name, value)
            if not 0.0 <= value <= 1.0:
                nearest = 0.0 if value < 0.0 else 1.0
                raise _refusal(name, value, "it is a share in [0, 1]", f"the nearest valid value is {nearest}")
        if self.clip is not None:
            _check_number("clip", self.clip)
            if self.clip <= 0.0:
                fact = "it is a bound in nats, per vocabulary entry or token, above 0"
                raise _refusal("clip", self.clip, fact, "set null to turn the clip off, or 0.05 as OPSD does")

    def _check_combinations(self) -> None:
        if self.clips_entries and self.divergence != "forward_kl":
            fact = f"the clip of entries belongs to divergence forward_kl alone, and divergence is {self.divergence}"
            raise _refusal("clip", self.clip, fact, "set clip to null, clip_rule to token or divergence to forward_kl")
        if self.positions == "threshold":
            if self.threshold_nats is None:
                fact = "positions threshold selects where the entropy mismatch is above this number of nats"
                raise _refusal("threshold_nats", None, fact, "set it, or choose positions top_fraction")
            _check_number("threshold_nats", self.threshold_nats)
            if self.mismatch == "absolute" and self.threshold_nats < 0.0:
                fact = "an absolute mismatch is never negative, so this would select every position"
                raise _refusal("threshold_nats", self.threshold_nats, fact, "set 0 or more, or choose positions all")
        elif self.threshold_nats is not None:
            fact = f"it belongs to positions threshold, and positions is {self.positions}"
            raise _refusal("threshold_nats", self.threshold_nats, fact, "set it to null or positions to threshold")
        if self.control == "reweight" and self.partner == "full_teacher":
            fact = "the control imitates the scale of a detached student partner and has no use for a full teacher"
            raise _refusal("control", self.control, fact, "set partner to student or control to none")

    @property
    def clips_entries(self) -> bool:
        """Whether single vocabulary entries are clipped, which can turn the gradient of a token round."""
        return self.clip is not None and self.clip_rule == "entry"

    @property
    def target_weight(self) -> float:
        """The lambda of the target at selected positions: 0 under control="reweight", which leaves the target plain."""
        return 0.0 if self.control == "reweight" else float(self.weight)

    @property
    def interpolates(self) -> bool:
        """Whether any position can have a target other than the plain teacher."""
        nowhere = self.positions == "none" or (self.positions in ("top_fraction", "random") and self.fraction == 0.0)
        return self.target_weight > 0.0 and not nowhere

    @property
    def selected_loss_factor(self) -> float:
        """What multiplies the loss of selected positions: 1 - weight under control="reweight", else 1."""
        return 1.0 - self.weight if self.control == "reweight" else 1.0


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refusal(name, value, "it is a number", "write it as a number, without quotes")
    if not math.isfinite(value):
        raise _refusal(name, value, "it is a finite number", "write a finite number")


def _refusal(name: str, value: Any, fact: str, mend: str) -> ValueError:
    return ValueError(f"loss setting {name}: got {value!r}; {fact}; {mend}")
