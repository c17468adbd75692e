"""What to say where no layout can be proposed: the closest one, and what would make one fit."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.planning.memory import size_text
from megatron_paint.planning.search.question import with_changes
from megatron_paint.planning.search.search import Found, Question, search
from megatron_paint.planning.stage_memory import micro_batch_tokens

LORA = 64  # rank of the presets
REASONS = 3  # refusals that the message names


def nothing_fits(question: Question, found: Found) -> UserError:
    """The error of a search without a result."""
    if found.closest is None:
        reasons = [
            f"{count_text(count, 'layout')}: {question.shown(message)}"
            for message, count in found.refused.most_common(REASONS)
        ]
        rest = len(found.refused) - len(reasons)
        more = f"; and {count_text(rest, 'more reason')}" if rest else ""
        return UserError(f"none of {count_text(found.layouts, 'layout')} is accepted: {'; '.join(reasons)}{more}")
    closest, machine = found.closest, question.machine
    phase = max(closest.memory, key=lambda name: closest.memory[name])
    helps = list(_remedies(question))
    advice = f"What makes one fit: {'; '.join(helps)}" if helps else "No single change that was tried is enough"
    usable, memory = size_text(question.usable), size_text(machine.gpu.memory)
    savings = closest.candidate.savings_text()
    return UserError(
        f"no layout fits on {machine.gpus} x {machine.name}: the closest, {closest.candidate.layout_text()}"
        f"{'' if savings == '-' else f' with {savings}'}, needs {size_text(closest.peak)} a GPU (phase {phase}), and "
        f"{usable} of {memory} may be used (--reserve {question.reserve:g}). {advice}"
    )


def _remedies(question: Question) -> Iterator[str]:
    """Changes after which a layout fits, each one alone, with its peak."""
    for text, changed in _changes(question):
        found = search(changed, top=1)
        if found.ranked:
            yield f"{text} ({size_text(found.ranked[0].peak)}, {found.ranked[0].candidate.layout_text()})"


def _changes(question: Question) -> Iterator[tuple[str, Question]]:
    machine, settings = question.machine, question.settings
    for factor in (2, 4, 8):
        gpus = machine.gpus * factor
        changed = replace(question, machine=replace(machine, gpus=gpus))
        if search(changed, top=1).ranked:
            yield f"--gpus {gpus}", changed
            break
    if not question.offload:
        yield "without --no-offload", replace(question, offload=True)
    if settings.model.lora is None:
        with suppress(UserError):  # other settings may contradict adapters
            yield f"--lora {LORA}", with_changes(question, model_lora={"rank": LORA, "alpha": 2 * LORA})
    tokens = settings.data.micro_batch_tokens
    if question.work.longest <= tokens < micro_batch_tokens(settings, question.shape) and not question.work.new_tokens:
        yield f"data.max_tokens={tokens} in --config", with_changes(question, data_max_tokens=tokens)
    for part in (2, 4):
        if tokens // part >= settings.rollout.max_new_tokens or not settings.needs.samples_per_problem:
            yield (
                f"--micro-batch-tokens {tokens // part}",
                with_changes(question, data_micro_batch_tokens=tokens // part),
            )
    if settings.needs.samples_per_problem:
        fewer = settings.rollout.max_new_tokens // 2
        if fewer:
            yield f"--max-new-tokens {fewer}", with_changes(question, rollout_max_new_tokens=fewer)
        rows = settings.rollout.batch_size // 2
        if rows and settings.rollout.engine == "megatron":
            yield f"--batch-size {rows}", with_changes(question, rollout_batch_size=rows)
