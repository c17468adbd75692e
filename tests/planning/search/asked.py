"""Questions for the tests of the search."""

from dataclasses import replace

from megatron_paint.planning.search import as_settings, report
from megatron_paint.planning.search.question import Asked, question_of
from megatron_paint.planning.search.search import Question


def ask(model: str = "qwen3_8b", gpus: int = 16, gpu: str = "h100-80", **options) -> Question:
    """The question of the options of `megatron-paint plan`."""
    return question_of(Asked(model=model, gpus=gpus, gpu=gpu, **options))


def with_memory(question: Question, size: float) -> Question:
    """The same question for GPUs of another size."""
    machine = question.machine
    return replace(question, machine=replace(machine, gpu=replace(machine.gpu, memory=size)))


def only_tensor_and_pipeline(monkeypatch) -> None:
    """Hides the other dimensions, so that a result does not depend on which settings exist."""
    kept = tuple(each for each in as_settings.DIMENSIONS if each.name in ("tp", "pp"))
    monkeypatch.setattr(as_settings, "DIMENSIONS", kept)
    monkeypatch.setattr(report, "DIMENSIONS", kept)
