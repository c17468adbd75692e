"""Settings and data that the loss tests run through, at every layout. Axes: T tokens, V vocabulary, H hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.elementwise.divergences import DIVERGENCES

# What a divergence needs beside its name, and a clip of tokens that clips some of the data's tokens and not all. The
# package's table decides which divergences are tested: one that is new there needs a line here.
DIVERGENCE_SETTINGS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"jsd_beta": 0.3}}
TOKEN_CLIPS = {"forward_kl": 0.2, "reverse_kl": 0.2, "jsd": 0.05}
LENGTHS = (7, 1, 12, 3)
COLUMNS = 48
HIDDEN = 16


def short(divergence: str) -> str:
    """The name of a divergence in the names of cases."""
    return divergence.removesuffix("_kl")


def options(*, clip: float) -> dict[str, dict]:
    """Settings of every divergence, and of the forward KL with clipped entries."""
    made = {short(name): {"divergence": name, **DIVERGENCE_SETTINGS[name]} for name in DIVERGENCES}
    return made | {"clipped": {"clip": clip}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings, and how the call is made: chunk size, padding, weights, the teacher's own output layer."""

    name: str
    settings: dict = field(default_factory=dict)
    chunk_tokens: int | None = None
    valid_size: int | None = None
    weights: bool = False
    own_teacher_weight: bool = False
    own_initial_weight: bool = False
    token_temperature: float | None = None
    skewed: bool = False

    @property
    def config(self) -> InterpolationLossConfig:
        return InterpolationLossConfig(**self.settings)


def _cases() -> list[Case]:
    divergences = options(clip=0.02)
    cases = [Case(name=name, settings=settings) for name, settings in divergences.items()]
    # A chunk of 6 cuts the rollouts of 7 and 12 tokens, so that their rows are visited twice.
    for name, settings in divergences.items():
        for more, extra in {
            "cut": {},
            "cut-skip": {"elsewhere": "skip"},
            "cut-most": {"fraction": 0.7},
            "cut-most-skip": {"fraction": 0.7, "elsewhere": "skip"},
            "cut-reweight": {"control": "reweight", "weight": 0.4},
            "cut-full-teacher": {"partner": "full_teacher", "weight": 0.6},
        }.items():
            cases.append(Case(name=f"{name}-{more}", settings=settings | extra, chunk_tokens=6, weights=True))
        for positions in ("threshold", "all", "none", "random"):
            extra = {"positions": positions, "threshold_nats": 0.2 if positions == "threshold" else None, "weight": 0.5}
            cases.append(Case(name=f"{name}-{positions}", settings=settings | extra, chunk_tokens=9))
        extra = {"positions": "random", "elsewhere": "skip", "control": "reweight"}
        cases.append(Case(name=f"{name}-random-skip-reweight", settings=settings | extra, chunk_tokens=9))
        # 30 of 48 columns: at TP 4 the last rank has padding alone, the one before it some.
        cases.append(Case(name=f"{name}-padded", settings=settings, valid_size=30, chunk_tokens=10, weights=True))
        cases.append(Case(name=f"{name}-skewed", settings=settings, skewed=True, chunk_tokens=10))
    for name in DIVERGENCES:
        divergence = short(name)
        settings = divergences[divergence] | {"clip": TOKEN_CLIPS[name], "clip_rule": "token"}
        cases.append(Case(name=f"{divergence}-token-clip", settings=settings))
        most = settings | {"fraction": 0.7, "weight": 0.4}
        cases.append(Case(name=f"{divergence}-token-clip-cut-most", settings=most, chunk_tokens=6, weights=True))
        skip = settings | {"elsewhere": "skip", "partner": "full_teacher"}
        cases.append(Case(name=f"{divergence}-token-clip-padded-skip", settings=skip, valid_size=30, chunk_tokens=6))
    return [
        *cases,
        Case(name="teacher-minus-student", settings={"mismatch": "teacher_minus_student"}),
        Case(name="student-minus-teacher", settings={"mismatch": "student_minus_teacher", "fraction": 0.3}),
        Case(name="jsd-low", settings={"divergence": "jsd", "jsd_beta": 0.001}, chunk_tokens=6),
        Case(name="jsd-high", settings={"divergence": "jsd", "jsd_beta": 0.999}, chunk_tokens=6),
        Case(name="fraction-0", settings={"fraction": 0.0}, chunk_tokens=5),
        Case(name="fraction-1", settings={"fraction": 1.0, "weight": 0.3}, chunk_tokens=5),
        Case(name="weight-0", settings={"weight": 0.0}, chunk_tokens=5),
        Case(name="full-teacher-alone", settings={"partner": "full_teacher", "weight": 1.0, "positions": "all"}),
        Case(name="one-token-chunks", settings={"clip": 0.05}, chunk_tokens=1),
        Case(name="hot", settings={"temperature": 3.0}, token_temperature=0.7),
        Case(name="cold", settings={"temperature": 0.5}, token_temperature=1.2, chunk_tokens=6),
        Case(name="own-teacher-weight", settings={"clip": 0.05}, own_teacher_weight=True, chunk_tokens=6),
        *_support_cases(divergences),
        *_token_weight_cases(divergences),
    ]


def _support_cases(divergences: dict[str, dict]) -> list[Case]:
    """Targets that are cut to a support, and the initial weights as partner."""
    cases = []
    for name, settings in divergences.items():
        initial = {"partner": "initial", "weight": 0.6}
        cases.append(Case(name=f"{name}-partner-initial", settings=settings | initial, chunk_tokens=6, weights=True))
        if settings.get("divergence") == "reverse_kl":
            continue
        settings = settings | {"support": "initial", "support_ratio": 0.2}
        for more, extra in {
            "": {},
            "-cut-skip": {"elsewhere": "skip"},
            "-cut-most": {"fraction": 0.7, "weight": 0.5},
            "-cut-reweight": {"control": "reweight", "weight": 0.4},
            "-cut-full-teacher": {"partner": "full_teacher", "weight": 0.6},
            "-cut-partner-initial": initial,
            "-cut-student": {"support": "student"},
            "-cut-student-partner-initial": initial | {"support": "student"},
            "-partner-alone": {"partner": "initial", "weight": 1.0, "positions": "all"},
            "-none": {"positions": "none", "support": "student"},
        }.items():
            chunk = 6 if "cut" in more else None
            cases.append(
                Case(name=f"{name}-support{more}", settings=settings | extra, chunk_tokens=chunk, weights=True)
            )
        padded = {"valid_size": 30, "own_initial_weight": True, "own_teacher_weight": True, "chunk_tokens": 10}
        cases.append(Case(name=f"{name}-support-padded", settings=settings, **padded))
        cases.append(Case(name=f"{name}-support-skewed", settings=settings, skewed=True, chunk_tokens=10))
        if name != "clipped":  # there terms near 1 cancel to the clip, and float32 has 6e-6 of it
            cases.append(Case(name=f"{name}-support-one", settings=settings | {"support_ratio": 1.0}, chunk_tokens=5))
        cases.append(Case(name=f"{name}-support-all", settings=settings | {"support_ratio": 1e-30}, chunk_tokens=5))
    token = divergences["jsd"] | {"support": "initial", "support_ratio": 0.2, "clip": 0.05, "clip_rule": "token"}
    return [*cases, Case(name="jsd-support-token-clip", settings=token, chunk_tokens=6, token_temperature=0.7)]


def _token_weight_cases(divergences: dict[str, dict]) -> list[Case]:
    """Weights of tokens by place and by divergence, beside given weights and all that also scales a token's loss."""
    cases = []
    for kind in ("position", "divergence"):
        for name, settings in divergences.items():
            settings = settings | {"token_weight": kind, "position_center": 0.5, "token_weight_minimum": 0.1}
            cases.append(Case(name=f"{name}-weight-{kind}", settings=settings))
            cases.append(Case(name=f"{name}-weight-{kind}-cut", settings=settings, chunk_tokens=6, weights=True))
        more = {"token_weight": kind, "fraction": 0.7, "elsewhere": "skip", "control": "reweight", "weight": 0.4}
        cases.append(Case(name=f"forward-weight-{kind}-cut-most-skip-reweight", settings=more, chunk_tokens=6))
        more = {"token_weight": kind, "support": "initial", "clip": 0.2, "clip_rule": "token"}
        cases.append(Case(name=f"forward-weight-{kind}-support-token-clip", settings=more, valid_size=30))
    return cases


# Token log-probabilities depend on the chunks, the vocabulary and the temperature alone.
LOGPROB_CASES = ("forward", "forward-cut", "forward-padded", "forward-skewed", "one-token-chunks", "hot", "cold")
TRITON_CASES = (
    *options(clip=0.02),
    *(f"{short(name)}-token-clip" for name in DIVERGENCES),
    "clipped-cut-skip",
    "clipped-cut-full-teacher",
    "clipped-padded",
    "forward-token-clip-cut-most",
    "reverse-cut-most",
    "reverse-random-skip-reweight",
    "jsd-low",
    "jsd-high",
    "jsd-cut-full-teacher",
    "jsd-threshold",
    "hot",
    "own-teacher-weight",
    "one-token-chunks",
    "forward-support",
    "forward-support-one",
    "forward-support-padded",
    "forward-support-cut-student-partner-initial",
    "clipped-support-cut-partner-initial",
    "jsd-support-cut-full-teacher",
    "jsd-support-token-clip",
    "forward-weight-divergence-cut",
)
CASES = {case.name: case for case in _cases()}


def make_data(case: Case, dtype: torch.dtype, seed: int = 0, lengths=LENGTHS) -> SimpleNamespace:
    """Hidden states, output weights, ids, keys; float64 copies of them are what `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student_TH = normal(tokens, HIDDEN)
    weight_VH = normal(COLUMNS, HIDDEN) * 0.7
    teacher_TH = student_TH + 0.4 * normal(tokens, HIDDEN)
    full_TH = student_TH + 0.6 * normal(tokens, HIDDEN)
    own_VH = weight_VH + 0.1 * normal(COLUMNS, HIDDEN)
    initial_seed = torch.Generator().manual_seed(seed + 1)  # apart, so that the other numbers stay the same
    initial_TH = student_TH + 0.5 * torch.randn((tokens, HIDDEN), generator=initial_seed, dtype=torch.float64)
    own_initial_VH = weight_VH + 0.1 * torch.randn((COLUMNS, HIDDEN), generator=initial_seed, dtype=torch.float64)
    weight_T = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.5
    ids_T = torch.randint(0, case.valid_size or COLUMNS, (tokens,), generator=generator)
    return SimpleNamespace(
        lengths=lengths,
        student_TH=student_TH.to(dtype),
        weight_VH=weight_VH.to(dtype),
        teacher_TH=teacher_TH.to(dtype),
        full_TH=full_TH.to(dtype) if case.config.partner == "full_teacher" else None,
        own_VH=own_VH.to(dtype) if case.own_teacher_weight else None,
        initial_TH=initial_TH.to(dtype) if case.config.needs_initial else None,
        own_initial_VH=own_initial_VH.to(dtype) if case.own_initial_weight else None,
        weight_T=weight_T.to(torch.float32) if case.weights else None,
        ids_T=ids_T,
        keys=[11 + 7 * index for index in range(len(lengths))],
    )
