"""The presets of the larger sizes have a layout that the planner finds about as fast as its fastest one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_paint.config.load import load_settings
from megatron_paint.planning.search.as_settings import phase_bytes, refusal, settings_for
from megatron_paint.planning.search.candidate import Candidate, layouts
from megatron_paint.planning.search.search import Question
from tests.planning.search.asked import ask

EXAMPLES = Path(__file__).parents[3] / "examples"
GPUS = {"qwen3_14b": 8, "qwen3_32b": 8, "qwen3_30b_a3b": 8, "qwen3_235b_a22b": 16}
WITHIN = {"qwen3_14b": 1.12, "qwen3_32b": 1.12, "qwen3_30b_a3b": 1.2, "qwen3_235b_a22b": 1.2}  # of the fastest time


def layout_of(size: str, preset: str, *, gpus: int) -> Candidate:
    """The layout of a preset, as a candidate."""
    megatron = load_settings(EXAMPLES / size / f"{preset}.yaml").megatron
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    assert (megatron.recompute_granularity, megatron.recompute_num_layers) == ("full", 1)
    layout = Candidate(tp=tp, pp=pp, dp=gpus // (tp * pp), recompute="full")
    experts = getattr(megatron, "expert_tensor_parallel_size", None)
    return replace(layout, ep=megatron.expert_model_parallel_size, etp=experts) if experts else layout


def recomputing(question: Question) -> float:
    """Seconds of the fastest layout that fits with what the presets use: full recomputation, no context parallelism."""
    machine, shape, seconds = question.machine, question.shape, []
    for layout in layouts(shape, gpus=machine.gpus, gpus_per_node=8, searched=("tp", "pp", "ep", "etp")):
        candidate = replace(layout, recompute="full")
        settings = settings_for(question.settings, candidate, shape)
        if refusal(settings, shape, gpus=machine.gpus) is None:
            peak = max(phase_bytes(settings, shape, gpus=machine.gpus).values())
            seconds += [question.model().step(candidate).total] if peak <= question.usable else []
    return min(seconds)


def test_the_seconds_in_the_readme_of_the_slurm_scripts():
    """Each cell has seconds, nodes and problems a step."""
    page = (EXAMPLES / "slurm" / "README.md").read_text()
    rows = re.findall(r"^\| Qwen3-(\S+) \| (\d.*) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == ["14B", "32B", "30B-A3B", "235B-A22B"]
    for name, cells in rows:
        size = f"qwen3_{name.lower().replace('-', '_')}"
        for seconds, nodes, problems in re.findall(r"([\d.]+) \((\d+), (\d+)\)", cells):
            gpus = 8 * int(nodes)
            question = ask(size, gpus, config=EXAMPLES / size / "paint.yaml", problems_per_step=int(problems))
            found = question.model().step(layout_of(size, "paint", gpus=gpus)).total
            assert f"{found:.1f}" == seconds, (name, nodes, problems)


@pytest.mark.parametrize("preset", ["paint", "support", "opsd", "reference_free", "grpo", "sft"])
@pytest.mark.parametrize("size", GPUS)
def test_a_preset_is_near_the_planner_s_best(size, preset):
    if not (EXAMPLES / size / f"{preset}.yaml").exists():
        assert (preset, "a3b" in size or "a22b" in size) == ("reference_free", True)
        return
    question = ask(size, GPUS[size], config=EXAMPLES / size / f"{preset}.yaml")
    layout = layout_of(size, preset, gpus=GPUS[size])
    assert question.model().step(layout).total <= WITHIN[size] * recomputing(question)
    assert max(phase_bytes(question.settings, question.shape, gpus=GPUS[size]).values()) < 0.65 * 80e9
