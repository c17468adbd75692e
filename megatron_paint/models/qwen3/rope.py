"""Reads the rotary positions of a config.json: their base, and YaRN. It refuses what the package does not compute.

`transformers` 4 writes `rope_theta` and `rope_scaling`; `transformers` 5 writes `rope_parameters`. Defaults and
precedence are those of `transformers` 5, except that a config with two readings is refused.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.models.shape import Yarn

THETA, SCALING, PARAMETERS = "rope_theta", "rope_scaling", "rope_parameters"
ORIGINAL = "original_max_position_embeddings"
COMMON = frozenset({"rope_type", "type", THETA, "partial_rotary_factor"})
YARN = frozenset({"factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})
YARN |= {"truncate"}
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")  # of layers


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary positions of a config."""

    theta: float
    yarn: Yarn | None
    max_positions: int  # the longest sequence


def read_rope(raw: dict[str, Any], path: Path, *, positions: int) -> Rope:
    """Reads the rotary positions of a config. positions: its `max_position_embeddings`; path: its file, for errors.

    Qwen3's model cards add YaRN and leave `max_position_embeddings` at 40960. So with YaRN the longest sequence is
    `factor` times the stated original length, or `max_position_embeddings` if that is larger. Raises UserError if a key
    is unknown or wrong, or if keys contradict each other.
    """
    key, rope = _section(raw, path)
    where = f"{path}: {key}"
    kind = _rope_type(rope, where)
    if any(part.get("partial_rotary_factor") not in (None, 1) for part in (raw, rope)):
        raise UserError(
            f"{path} needs rotary embedding of only a part of each head (partial_rotary_factor), which is not supported"
        )
    known = COMMON | YARN if kind == "yarn" else COMMON
    unknown = sorted(name for name in rope.keys() - known if rope[name] is not None)
    if unknown:
        raise UserError(
            f"{where} has {', '.join(unknown)}, which rope_type {kind!r} does not use; remove it, or correct rope_type"
        )
    theta = _theta(raw, rope, key, path)
    if kind == "default":
        return Rope(theta=theta, yarn=None, max_positions=positions)
    if theta <= 1:
        raise UserError(f"{path} has {THETA}={theta}; YaRN needs a number above 1")
    inner, outer = rope.get(ORIGINAL), raw.get(ORIGINAL)
    if inner is not None and outer is not None and inner != outer:
        raise UserError(f"{where} has {ORIGINAL} {inner}, and the config itself {outer}; keep the right one")
    stated = outer if inner is None else inner
    if stated is None:  # as transformers; but the config may have the stretched length, so that length is the limit
        return Rope(theta=theta, yarn=_yarn(rope, positions, where), max_positions=positions)
    yarn = _yarn(rope, stated, where)
    return Rope(theta=theta, yarn=yarn, max_positions=max(positions, math.floor(yarn.factor * stated)))


def _section(raw: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Returns the key of the config that describes the rotary positions, and its content."""
    found = {key: raw[key] for key in (PARAMETERS, SCALING) if raw.get(key)}
    for key, content in found.items():
        if not isinstance(content, dict):
            raise UserError(f"{path}: {key} is {content!r}, not a dictionary; copy the config of the model again")
        kinds = [name for name in KINDS if name in content]
        if kinds:
            raise UserError(
                f"{path}: {key} has {', '.join(kinds)}; rotary positions by kind of layer are not supported, and "
                "transformers does not read them for Qwen3 either: write the content of full_attention directly under "
                f"{PARAMETERS}"
            )
    if len(found) > 1:
        raise UserError(
            f"{path} has {SCALING} beside {PARAMETERS}; transformers would then ignore {PARAMETERS} and its {THETA}: "
            f"keep only {PARAMETERS}"
        )
    return next(iter(found.items()), (PARAMETERS, {}))


def _rope_type(rope: dict[str, Any], where: str) -> str:
    named = [rope[name] for name in ("rope_type", "type") if name in rope]  # `type` is the older spelling
    if any(name != named[0] for name in named):
        raise UserError(f"{where} has rope_type {named[0]!r} and type {named[1]!r}; keep the right one")
    kind = named[0] if named else "default"
    if kind not in ("default", "yarn"):
        raise UserError(f"{where} needs RoPE scaling of rope_type {kind!r}; only 'default' and 'yarn' are supported")
    return kind


def _theta(raw: dict[str, Any], rope: dict[str, Any], key: str, path: Path) -> float:
    inner, outer = rope.get(THETA), raw.get(THETA)
    if inner is None and outer is None:
        raise UserError(f"{path} has no key '{THETA}'; it is not a complete Qwen3 config")
    # transformers 4 reads the outer one beside rope_scaling, transformers 5 the inner one.
    if key == SCALING and inner is not None and outer is not None and inner != outer:
        raise UserError(f"{path} has {THETA} {outer} and, in {SCALING}, {inner}; keep the right one")
    return _number(raw, THETA, str(path)) if inner is None else _number(rope, THETA, f"{path}: {key}")


def _yarn(rope: dict[str, Any], original: Any, where: str) -> Yarn:
    factor = _number(rope, "factor", where)
    if factor < 1:
        raise UserError(f"{where} has factor {factor:g}; it must be at least 1")
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original < 2**31:
        raise UserError(f"{where} has {ORIGINAL} {original!r}; it must be a whole number from 1")
    # transformers also takes 0 for "not given" in these four.
    beta_fast, beta_slow, mscale, mscale_all_dim = (
        _number(rope, name, where) if rope.get(name) else None
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    )
    beta_fast, beta_slow = beta_fast or 32.0, beta_slow or 1.0
    if beta_fast < beta_slow:
        raise UserError(f"{where} has beta_fast {beta_fast:g} below beta_slow {beta_slow:g}; exchange the two")
    if not isinstance(rope.get("truncate", True), bool):
        raise UserError(f"{where} has truncate {rope['truncate']!r}; it must be true or false")
    if rope.get("attention_factor") is not None:
        attention_factor = _number(rope, "attention_factor", where)
    else:
        attention_factor = _attention_factor(factor, mscale, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_positions=original,
        attention_factor=attention_factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.get("truncate", True),
    )


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The paper's 0.1 ln(factor) + 1, or the ratio of two of them that DeepSeek's configs state."""

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)


def _number(content: dict[str, Any], key: str, where: str) -> float:
    """Returns a positive number. Raises UserError if it is another value or missing."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where} has {key} {value!r}; it must be a positive number")
    return float(value)
