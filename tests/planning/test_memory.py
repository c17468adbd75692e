"""The estimate of memory: hand arithmetic for real models, what it says, and what it advises."""

import json
import re
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.planning import memory as planning
from megatron_paint.planning.hardware import parse_gpu_memory, ranks_of_this_node
from megatron_paint.planning.memory import Plan, make_plan
from megatron_paint.planning.stage_memory import StageMemory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text()
QWEN3 = {  # hidden, feed-forward, layers, heads
    "Qwen3-8B": (4096, 12288, 36, 32),
    "Qwen3-14B": (5120, 17408, 40, 40),
    "Qwen3-32B": (5120, 25600, 64, 64),
}
ROWS = re.findall(r"^\| (Qwen3-\S+), TP (\d+), DP (\d+), (LoRA 64|all weights) \| (.+) \|$", PAGE, re.MULTILINE)
PARTS = ("weights", "adapters", "gradients", "optimiser", "teacher")
PARTS += ("inputs of recomputed layers", "output layer's gradient", "key-value cache")
GB = 1e9


def write_config(folder: Path, hidden: int, ffn: int, layers: int, heads: int, **changes) -> Path:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "rope_theta": 1e6}
    config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 40960, "tie_word_embeddings": False, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_of(tmp_path: Path, *changes: str, model: str = "Qwen3-8B", processes: int = 8, **options) -> Plan:
    """The plan of a PAINT preset. There is nothing in the model's folder but config.json."""
    folder = write_config(tmp_path / model, *QWEN3[model])
    preset = ROOT / "examples" / model.lower().replace("-", "_") / "paint.yaml"
    return make_plan(load_settings(preset, [f"model.hf_path={folder}", *changes]), processes=processes, **options)


def by_hand(model: str, *, tp: int, dp: int, lora: bool) -> tuple[float, ...]:
    """Bytes of PARTS: bfloat16, one stage, 16,384 tokens, 32 problems of 1,024 new tokens, sequence parallel."""
    hidden, ffn, layers, heads = QWEN3[model]
    q, kv, table = heads * 128, 8 * 128, 151936 * hidden
    matrices = hidden * q + 2 * hidden * kv + q * hidden + 3 * hidden * ffn
    weights = layers * (matrices / tp + 2 * hidden + 2 * 128) + 2 * table / tp + hidden
    split_outputs = 64 * (5 * hidden + (q + 2 * kv + 2 * ffn) / tp)
    split_inputs = 64 * ((q + ffn) / tp + 2 * hidden)
    adapters = layers * (split_outputs + split_inputs) if lora else 0
    trained = adapters if lora else weights
    rows = 32 / dp
    return (
        *(2 * weights, 2 * adapters, 4 * trained, 12 * trained / dp, 0 if lora else 2 * weights),
        layers * 16384 * hidden * 2 / tp,
        0 if lora else 4 * table / tp,
        layers * 2 * kv * 2 / tp * (rows * 1024 + 16384),
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[3]}")
def test_hand_arithmetic(row, tmp_path):
    """The page, the planner and this file's own formulas agree."""
    model, tp, dp, trained, numbers = row
    tp, dp, lora = int(tp), int(dp), trained != "all weights"
    plan = plan_of(tmp_path, *([] if lora else ["model.lora=null"]), model=model, processes=tp * dp, gpu_memory=80e9)
    assert (plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel) == (tp, 1, dp)
    peaks = StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=True)
    found = {name: size for peak in (*peaks.training(), *peaks.sampling()) for name, size in peak.parts.items()}
    expected = dict(zip(PARTS, by_hand(model, tp=tp, dp=dp, lora=lora), strict=True))
    # The rotation's angles, 8 MB, are kept with the inputs.
    assert {name: found[name] for name in PARTS} == pytest.approx(expected, rel=0.01)
    assert numbers.split(" | ") == [f"{expected[name] / GB:.2f}" for name in PARTS]


def test_the_page_has_every_model_with_and_without_lora():
    assert {(row[0], row[3]) for row in ROWS} == {
        (model, kind) for model in QWEN3 for kind in ("LoRA 64", "all weights")
    }


def test_both_tables_of_an_untied_model_count(tmp_path):
    """8B at TP 2: one table is 0.62 GB of a rank's 8.19."""
    (weights,) = {plan_of(tmp_path, *change).memory.training.parts["weights"] for change in ([], ["model.lora=null"])}
    assert weights == pytest.approx(8.191e9, rel=1e-3)
    untied, tied = (
        make_plan(
            load_settings(ROOT / "examples/qwen3_8b/paint.yaml", [f"model.hf_path={folder}"]), processes=2
        ).memory.training.parts["weights"]
        for folder in (
            write_config(tmp_path / "untied", *QWEN3["Qwen3-8B"]),
            write_config(tmp_path / "tied", *QWEN3["Qwen3-8B"], tie_word_embeddings=True),
        )
    )
    assert untied - tied == 151936 * 4096 * 2 / 2


def test_a_pipeline_has_a_table_on_each_end(tmp_path):
    """Tied or not, the first and the last stage hold one table each. The last one also has the final norm."""
    sizes = []
    for tied in (False, True):
        folder = write_config(tmp_path / str(tied), *QWEN3["Qwen3-8B"], tie_word_embeddings=tied)
        changes = [f"model.hf_path={folder}", "megatron.pipeline_model_parallel_size=3", "model.lora=null"]
        plan = make_plan(load_settings(ROOT / "examples/qwen3_8b/paint.yaml", changes), processes=6)
        stages = [
            StageMemory(plan.settings, plan, stage=stage, engine=True, triton=True, on_gpus=False) for stage in range(3)
        ]
        sizes.append([stage.training()[0].parts["weights"] / 2 for stage in stages])
    assert sizes[0] == sizes[1]
    first, middle, last = sizes[0]
    assert (first - middle, last - first) == (151936 * 4096 / 2, 4096)


def test_the_cache_and_the_activations_are_in_different_peaks(tmp_path):
    memory = plan_of(tmp_path).memory
    assert "key-value cache" not in memory.training.parts
    assert "activations" not in memory.sampling.parts
    assert memory.peak == max(memory.training.total, memory.sampling.total)


@pytest.mark.parametrize(
    ("chunk_bytes", "expected"),
    [
        (1e9, 1e9),
        # One chunk: 4 sequences of 64 tokens, student and teacher and Triton's gradient, float32.
        (1e12, 4 * 64 * 3 * (151936 / 2) * 4),
    ],
)
def test_logits_are_at_most_what_the_tokens_need(chunk_bytes, expected, tmp_path):
    changes = [f"objective.chunk_bytes={chunk_bytes}", "data.problems_per_step=16", "rollout.max_new_tokens=64"]
    plan = plan_of(tmp_path, *changes if chunk_bytes > 1e9 else changes[:1])
    memory = StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=True)
    assert memory.logits_bytes() == expected


def test_an_evaluation_may_need_the_larger_cache(tmp_path):
    """64 rows of up to 40,960 positions are more than rollout.cache_bytes, which then is the limit."""
    plan = plan_of(tmp_path, "evaluation.problems=held_out.jsonl", "rollout.batch_size=64", "rollout.cache_bytes=2e10")
    assert plan.memory.sampling.moment == "evaluation"
    assert plan.memory.sampling.parts["key-value cache"] == pytest.approx(2e10, rel=1e-4)


def test_sft_without_an_evaluation_samples_nothing(tmp_path):
    plan = plan_of(tmp_path, "objective.name=sft")
    assert plan.memory.sampling is None
    assert not [line for line in plan.memory_lines() if "sampling" in line]


def test_a_limit_of_the_data_limits_what_sft_needs(tmp_path):
    """A solution may have all positions, with data.max_tokens only these tokens. A micro-batch is never smaller."""
    all_positions, limited, equal = (
        plan_of(tmp_path, "objective.name=sft", *changes).memory.training.total
        for changes in ((), ("data.max_tokens=20000",), ("data.max_tokens=16384",))
    )
    assert equal < limited < all_positions
    assert plan_of(tmp_path, "objective.name=sft", "data.max_tokens=9").memory.training.total == equal
    (warning,) = plan_of(tmp_path, "objective.name=sft", gpu_memory=all_positions - 1e8).warnings()
    assert "data.max_tokens=16384 (to " in warning


def test_host_memory_of_a_rank_and_of_a_node(tmp_path):
    """By hand, all weights of 8B at TP 2 x DP 4: a process of 3 GB; the first replica's two ranks also hold weights and
    teacher in bfloat16 and 12 bytes of each weight for the optimiser, which Megatron gathers before the copy."""
    weights = by_hand("Qwen3-8B", tp=2, dp=4, lora=False)[0] / 2
    writer = 3e9 + weights * (2 + 2 + 2 * 12)
    host = plan_of(tmp_path, "model.lora=null", gpu_memory=80e9, ranks_per_node=4).memory.host
    assert (host.rank, host.ranks) == (pytest.approx(writer), 4)
    assert host.node == pytest.approx(2 * writer + 2 * 3e9)
    offloaded = plan_of(tmp_path, "model.lora=null", "objective.teacher.offload=true", gpu_memory=80e9).memory.host
    assert offloaded.node == pytest.approx(2 * writer + 6 * 3e9 + 8 * 2 * weights)


def test_the_lines_compare_with_the_gpu(tmp_path):
    training, sampling, compared, host = plan_of(tmp_path, gpu_memory=80e9).memory_lines()
    assert training.startswith("memory     training 15.5 GB a rank (backward pass): weights 8.19 GB, adapters 241 MB, ")
    assert "CUDA and NCCL 1.5 GB, inputs of recomputed layers 2.42 GB, " in training
    assert sampling.startswith("           sampling 14 GB a rank (rollouts): weights 8.19 GB, ")
    assert "key-value cache 1.81 GB" in sampling
    assert compared == "           the larger peak, 15.5 GB, is 19% of a GPU's 80 GB (estimate, docs/memory.md)"
    assert host.startswith("host       about 14.3 GB a rank and 46.6 GB on a node of 8 ranks")


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ([], "16,384 tokens; "),
        (["rollout.max_new_tokens=16384"], "16,384 tokens; "),
        (["rollout.max_new_tokens=20000"], "20,000 tokens (a response above data.micro_batch_tokens=16384 alone, "),
        (["data.micro_batch_tokens=1000"], "1,024 tokens (a response above data.micro_batch_tokens=1000 alone, "),
    ],
)
def test_the_step_line_has_the_tokens_that_the_estimate_counts(tmp_path, changes, tokens):
    """The inputs of 36 recomputed layers, 4,096 numbers of 2 bytes at TP 2, and 128 float32 angles for each token."""
    plan = plan_of(tmp_path, *changes)
    (line,) = [line for line in plan.lines(plan.settings) if line.startswith("step ")]
    assert f"micro-batches of at most {tokens}" in line
    count = int(tokens.split()[0].replace(",", ""))
    assert plan.memory.training.parts["inputs of recomputed layers"] == count * (36 * 4096 * 2 / 2 + 128 * 4)


def test_the_memory_of_gpus_elsewhere_is_not_known(tmp_path):
    lines = plan_of(tmp_path, on_gpu_nodes=True).memory_lines()
    assert "the larger peak is 15.5 GB" in lines[2]
    assert "--gpu-memory 80GB compares with it" in lines[2]
    here = plan_of(tmp_path)
    assert "for ranks on CPUs" in here.memory_lines()[2]
    assert here.memory.training.parts["CUDA and NCCL"] == 0.0


def test_too_little_memory_is_a_warning_with_what_helps_in_order(tmp_path):
    changes = ["model.lora=null", "megatron.use_distributed_optimizer=false", "megatron.recompute_granularity=null"]
    changes += ["megatron.recompute_method=null", "megatron.recompute_num_layers=null"]
    plan = plan_of(tmp_path, *changes, gpu_memory=80e9)
    (warning,) = plan.warnings()
    assert f"peak of {planning.size_text(plan.memory.peak)} a rank is above a GPU's 80 GB" in warning
    order = ["megatron.tensor_model_parallel_size=4 ", "megatron.use_distributed_optimizer=true "]
    order += [
        "megatron.recompute_granularity=full ",
        "data.micro_batch_tokens=8192 ",
        "objective.teacher.offload=true ",
    ]
    places = [warning.index(text) for text in order]
    assert places == sorted(places)
    # The promised peak is the one that the planner finds with this change.
    text = "megatron.use_distributed_optimizer=true"
    after = plan_of(tmp_path, *changes, text, gpu_memory=80e9).memory.peak
    assert f"{text} (to {planning.size_text(after)})" in warning
    assert plan_of(tmp_path, *changes, gpu_memory=plan.memory.peak).warnings() == []


def test_advice_is_only_what_lowers_the_peak(tmp_path):
    """32B on one node: no larger tensor-parallel size exists, and the optimiser has no replicas to be shared among."""
    changes = ("model.lora=null", "megatron.tensor_model_parallel_size=8")
    (warning,) = plan_of(tmp_path, *changes, model="Qwen3-32B", gpu_memory=80e9).warnings()
    assert "tensor_model_parallel_size" not in warning
    assert "distributed_optimizer" not in warning
    assert "16 ranks (to 62.4 GB)" in warning


@pytest.mark.parametrize(
    ("text", "size"), [("80", 80e9), ("80GB", 80e9), ("141 GB", 141e9), ("79.6GiB", 79.6 * 2**30), ("24g", 24e9)]
)
def test_the_memory_of_a_gpu(text, size):
    assert parse_gpu_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "80MB", "-80", "0", "8e10", "80 TB"])
def test_a_wrong_memory_of_a_gpu(text):
    with pytest.raises(UserError, match=r"--gpu-memory=.* must be the memory of one GPU in GB"):
        parse_gpu_memory(text)


def test_ranks_of_a_node():
    assert ranks_of_this_node({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == 4
    assert ranks_of_this_node({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == 8
    assert ranks_of_this_node({}) is None


def test_logits_of_a_support_are_a_third_set(tmp_path):
    changes = ["objective.chunk_bytes=1e12", "data.problems_per_step=16", "rollout.max_new_tokens=64"]
    plan = plan_of(tmp_path, *changes, "objective.loss.support=initial")
    # Student, teacher, initial model and Triton's gradient.
    memory = StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=True)
    assert memory.logits_bytes() == 4 * 64 * 4 * (151936 / 2) * 4


@pytest.mark.parametrize(
    ("changes", "sets", "layers"),
    [
        (("objective.teacher.weights=initial",), 0, 0),  # the teacher is the initial model
        (("objective.teacher.weights=current",), 1, 0),
        (("objective.teacher.weights=ema",), 1, 0),
        (("objective.teacher.weights=ema", "objective.teacher.ema_anchor=0.5"), 0, 0),  # which the anchor has already
        (("objective.teacher.weights=ema", "objective.teacher.offload=true"), 0, 1),
        (("objective.teacher.weights=current", "model.lora={rank: 64, alpha: 128}"), 0, 0),
    ],
)
def test_the_initial_weights_of_a_support(changes, sets, layers, tmp_path):
    """8B at TP 2: `sets` further sets of bfloat16 weights on the GPU, and `layers` further output layers."""
    found = []
    for support in ("none", "initial"):
        more = ("model.lora=null", *changes, f"objective.loss.support={support}")
        plan = plan_of(tmp_path, *more)
        found.append(StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=False))
    without, with_support = (
        {name: size for peak in part.training() for name, size in peak.parts.items()} for part in found
    )
    assert with_support["teacher"] - without["teacher"] == pytest.approx(sets * 8.191e9, rel=1e-3, abs=1)
    states = found[1]._sequences() * 1024 * 4096 * 2
    grown = found[1]._teacher_results() - found[0]._teacher_results()
    assert grown == pytest.approx(states + layers * 151936 * 4096 * 2 / 2)
