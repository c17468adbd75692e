"""The settings of the sparse interpolation loss; importing them needs no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatron_paint.base.errors import UserError
from megatron_paint.config.dialect import OPSD, PAINT, PW_OPSD, Number, Positive, setting, settings_class
from megatron_paint.config.mistakes import check_fields

SECTION = "objective.loss"  # the dotted key of this section in a settings file, which all its messages name

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Partner = Literal["student", "full_teacher", "initial"]
Support = Literal["none", "initial", "student"]
Positions = Literal["top_fraction", "threshold", "all", "none", "random"]
Mismatch = Literal["absolute", "teacher_minus_student", "student_minus_teacher"]
Elsewhere = Literal["teacher", "skip"]
Control = Literal["none", "reweight"]
ClipRule = Literal["entry", "token"]
TokenWeight = Literal["uniform", "position", "divergence"]
Kernel = Literal["auto", "torch", "triton"]


@settings_class
class InterpolationLossConfig:
    """Which target each response token gets, and which divergence the loss measures to it.

    `clip_rule="entry"` bounds each vocabulary entry of the forward KL; this can reverse the gradient of a token.
    `clip_rule="token"` bounds the gradient of a token, for every divergence: above the clip the loss is
    clip (1 + ln(divergence / clip)), and the gradient keeps its direction. `control="reweight"` keeps the plain
    teacher as the target everywhere. It multiplies the loss of selected tokens, after the clip, by 1 - weight.
    `support` keeps only those vocabulary entries in the target that a distribution p_0 finds plausible:
    p_0(v) >= support_ratio max p_0, at the loss temperature. The rest of the target is renormalised.
    Raises UserError, which is a ValueError, for any other value and for settings that contradict each other.
    Source: PAINT (arXiv 2604.26573); the clip is from OPSD (arXiv 2601.18734).
    """

    divergence: Annotated[
        Divergence,
        setting(
            "forward_kl: KL(target || student); reverse_kl: KL(student || target); jsd: Jensen-Shannon divergence",
            source=OPSD,
        ),
    ] = "forward_kl"
    jsd_beta: Annotated[
        Number,
        setting(
            "weight of the target in the mixture of jsd; at 0 and 1 the JSD is always 0, so choose divergence "
            "forward_kl or reverse_kl instead",
            gt=0,
            lt=1,
        ),
    ] = 0.5
    temperature: Annotated[Positive, setting("divides the logits of teacher and student in the loss", source=OPSD)] = (
        1.1
    )
    clip: Annotated[
        Positive | None,
        setting(
            "largest loss of a vocabulary entry or of a token, in nats; null: no clip",
            source="ours; OPSD, arXiv 2601.18734, sets 0.05 (1.7B, 4B) or 0.06 (8B)",
        ),
    ] = None
    clip_rule: Annotated[
        ClipRule,
        setting(
            "what the clip bounds: each vocabulary entry of the forward KL, or the gradient of each token, whose "
            "direction it keeps"
        ),
    ] = "entry"
    weight: Annotated[
        Number,
        setting(
            "lambda: share of the partner's logits in the target of selected tokens",
            source=f"ours; {PAINT}, uses a small one",
            ge=0,
            le=1,
        ),
    ] = 0.1
    partner: Annotated[
        Partner,
        setting(
            "whose logits are mixed into the target: the student's, without gradient; those of the teacher that sees "
            "the complete solution; or those of the initial weights on the student's prompt"
        ),
    ] = "student"
    support: Annotated[
        Support,
        setting(
            "which distribution decides what the target may contain: that of the initial weights on the student's "
            "prompt, or the student's own; the target is 0 elsewhere",
            source="ours; the threshold is that of contrastive decoding, arXiv 2210.15097",
        ),
    ] = "none"
    support_ratio: Annotated[
        Number,
        setting("a token is in the support if its probability is at least this share of the largest one", gt=0, le=1),
    ] = 0.05
    positions: Annotated[
        Positions,
        setting(
            "which tokens of a response are selected for the mixed target; top_fraction: those with the largest "
            "entropy mismatch; random: the same number, drawn",
            source=f"{PAINT}: a few tokens with a large mismatch; their number is ours",
        ),
    ] = "top_fraction"
    fraction: Annotated[
        Number, setting("share of a response's tokens that top_fraction and random select", ge=0, le=1)
    ] = 0.10
    threshold_nats: Annotated[
        Number | None, setting("positions=threshold selects tokens whose entropy mismatch is above this, in nats")
    ] = None
    mismatch: Annotated[
        Mismatch,
        setting(
            "entropy mismatch of a token: the difference between the entropies of teacher and student, or its absolute "
            "value"
        ),
    ] = "absolute"
    elsewhere: Annotated[
        Elsewhere, setting("tokens that are not selected: the target is the plain teacher, or they carry no loss")
    ] = "teacher"
    control: Annotated[
        Control, setting("reweight: no mixed target, but 1 - weight times the loss at selected tokens")
    ] = "none"
    token_weight: Annotated[
        TokenWeight,
        setting(
            "weight of a token in the loss; position: smaller at the start of a response; divergence: smaller where "
            "neither the token nor what follows it diverges more than the response's mean",
            source=f"position: {PW_OPSD}; divergence: ours, after DASH, arXiv 2608.06243",
        ),
    ] = "uniform"
    token_weight_minimum: Annotated[
        Number, setting("lower bound of the weights of token_weight; the upper bound is 1", source=PW_OPSD, ge=0, le=1)
    ] = 0.25
    position_center: Annotated[
        Number,
        setting("share of a response before which the weights of token_weight=position are small", source=PW_OPSD),
    ] = 0.30
    position_width: Annotated[
        Positive, setting("share of a response over which the weights of token_weight=position grow", source=PW_OPSD)
    ] = 0.10
    divergence_width: Annotated[
        Positive,
        setting(
            "difference from the mean divergence, in means, over which the weights of token_weight=divergence grow"
        ),
    ] = 0.5

    def __post_init__(self) -> None:
        check_fields(self, SECTION)
        if contradictions := [f"{SECTION}.{message}" for message in self._contradictions()]:
            raise UserError("\n".join(contradictions))

    def _contradictions(self) -> Iterator[str]:
        if self.clips_entries and self.divergence != "forward_kl":
            yield (
                f"clip={self.clip} with clip_rule=entry belongs to divergence=forward_kl, but divergence="
                f"{self.divergence}; set clip to null, clip_rule to token or divergence to forward_kl"
            )
        if self.positions == "threshold" and self.threshold_nats is None:
            yield (
                "threshold_nats is not set: positions=threshold selects tokens whose entropy mismatch is above "
                "this number of nats; set it, or set positions to top_fraction"
            )
        if self.positions != "threshold" and self.threshold_nats is not None:
            yield (
                f"threshold_nats={self.threshold_nats} belongs to positions=threshold, but positions={self.positions}; "
                "leave threshold_nats out, or set positions to threshold"
            )
        if self.positions == "threshold" and self.mismatch == "absolute" and (self.threshold_nats or 0) < 0:
            yield (
                f"threshold_nats={self.threshold_nats} selects every token, because an absolute mismatch is never "
                "negative; set it to 0 or more, or set positions to all"
            )
        if self.support != "none" and self.divergence == "reverse_kl":
            yield (
                f"support={self.support} makes the target 0 outside the support, where the student is not 0: "
                "divergence=reverse_kl is infinite there; set divergence to forward_kl or jsd, or support to none"
            )
        if self.partner == "initial" and self.control == "none" and not self.interpolates:
            yield (
                f"partner={self.partner} has no effect, because no target is mixed (positions, fraction or weight); "
                "set partner to student, or mix targets"
            )
        if self.control == "reweight" and self.partner != "student":
            yield (
                f"control={self.control} imitates the scale of the student as partner, but partner={self.partner}; "
                "set partner to student or control to none"
            )

    @property
    def supports(self) -> bool:
        """Whether the target is cut to a support."""
        return self.support != "none"

    @property
    def needs_initial(self) -> bool:
        """Whether the loss needs the initial weights' distribution on the student's prompt."""
        return "initial" in (self.support, self.partner)

    @property
    def clips_entries(self) -> bool:
        """Whether single vocabulary entries are clipped; this can reverse the gradient of a token."""
        return self.clip is not None and self.clip_rule == "entry"

    @property
    def target_weight(self) -> float:
        """The lambda of the target at selected tokens: 0 under control="reweight", which keeps the plain teacher."""
        return 0.0 if self.control == "reweight" else float(self.weight)

    @property
    def selects_nothing(self) -> bool:
        """Whether no token can be selected."""
        return self.positions == "none" or (self.positions in ("top_fraction", "random") and self.fraction == 0.0)

    @property
    def interpolates(self) -> bool:
        """Whether any token can have a target other than the plain teacher."""
        return self.target_weight > 0.0 and not self.selects_nothing

    @property
    def selected_loss_factor(self) -> float:
        """The factor of the loss at selected tokens: 1 - weight under control="reweight", else 1."""
        return 1.0 - self.weight if self.control == "reweight" else 1.0
