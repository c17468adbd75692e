"""All settings of a run: frozen dataclasses, closed, checked once, with the reason in each error.

A YAML file gives the values, `key=value` arguments override them (`settings.py` reads both), and what is left out takes
the default that stands here and nowhere else. Descriptions are part of the error messages.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from megatron_paint.config.loss import InterpolationLossConfig

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)


def setting(description: str, **limits: Any) -> Any:
    """Limits and meaning of one setting, for pydantic and for error messages."""
    return Field(description=description, **limits)


# Strict: "3" is not taken for 3, nor 1 for true.
Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Whole, Field(ge=1)]


def settings_class(cls: type) -> type:
    """A frozen keyword-only dataclass that refuses unknown keys and wrong types."""
    cls.__pydantic_config__ = CLOSED
    return dataclass(frozen=True, kw_only=True)(cls)


@settings_class
class LoraSettings:
    rank: Annotated[Count, setting("rank of the adapters on all seven projections")] = 64
    alpha: Annotated[Positive, setting("adapters are scaled by alpha / rank")] = 128.0
    export: Annotated[
        Literal["merged", "adapter"], setting("exports are whole models, or PEFT folders of the adapters alone")
    ] = "merged"


@settings_class
class ModelSettings:
    hf_path: Annotated[Text, setting("folder of a Hugging Face Qwen3 checkpoint")]
    megatron_path: Annotated[Text | None, setting("Megatron checkpoint of the same model to start from instead")] = None
    dtype: Annotated[Literal["bfloat16", "float32"], setting("type of weights and activations")] = "bfloat16"
    lora: LoraSettings | None = None  # low-rank adapters; null trains every weight


@settings_class
class ColumnSettings:
    id: Annotated[Text, setting("column of the problem's id")] = "id"
    problem: Annotated[Text, setting("column of the problem's text")] = "problem"
    solution: Annotated[Text, setting("column of the verified solution")] = "solution"
    answer: Annotated[Text, setting("column of the final answer")] = "answer"


@settings_class
class DataSettings:
    train: Annotated[Text, setting("training problems: a file, or a name for `datasets`")]
    format: Annotated[Literal["auto", "jsonl", "parquet", "datasets"], setting("auto goes by the file's ending")] = (
        "auto"
    )
    split: Annotated[Text, setting("split of a `datasets` source")] = "train"
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    problems_per_step: Annotated[Count, setting("problems in one optimiser step, over all data-parallel ranks")] = 32
    micro_batch_tokens: Annotated[Count, setting("most tokens, padding counted, in one micro-batch")] = 16384
    on_bad_row: Annotated[Literal["error", "skip"], setting("stop at a bad row, or leave it out and count it")] = (
        "error"
    )
    check_answers: Annotated[Flag, setting("compare each answer with the solution's last box")] = True
    seed: Annotated[Whole, setting("key of the order of the problems", ge=0)] = 1


@settings_class
class PromptSettings:
    student_template: Annotated[
        Text | None, setting("template file of the student's message; null: the shipped one")
    ] = None
    teacher_template: Annotated[
        Text | None, setting("template file of the teacher's message; null: the shipped one")
    ] = None
    evaluation_template: Annotated[
        Text | None, setting("template file of the message in evaluations; null: the shipped one")
    ] = None
    chat_template: Annotated[Text | None, setting("chat template file; null: the tokenizer's own")] = None
    student_thinking: Annotated[Flag, setting("thinking mode of the student's prompt")] = False
    teacher_thinking: Annotated[Flag, setting("thinking mode of the teacher's prompt")] = True


@settings_class
class RevealSettings:
    rule: Annotated[
        Literal["overlap", "full", "fixed", "random", "shuffled", "inverted"],
        setting("how much of the solution the teacher sees"),
    ] = "overlap"
    minimum: Annotated[Number, setting("r_min: share shown to a rollout that has every anchor", ge=0, le=1)] = 0.3
    share: Annotated[Number | None, setting("share shown under rule: fixed", ge=0, le=1)] = None
    unit: Annotated[Literal["token", "segment"], setting("what the share is counted in")] = "token"
    hidden_nats: Annotated[
        Positive | None,
        setting("most that may be hidden, by what the teacher still finds surprising in it, in nats; null: no limit"),
    ] = None
    hide_answer: Annotated[Flag, setting("hide the last box whatever the share")] = False
    solution: Annotated[
        Literal["own", "wrong", "none"],
        setting(
            "own: the problem's; wrong: another problem's of the step; none: the teacher sees the student's prompt"
        ),
    ] = "own"
    anchors: Annotated[Text, setting("name of the anchor extractor")] = "math"


@settings_class
class TeacherSettings:
    weights: Annotated[Literal["initial", "current", "ema"], setting("which weights score as teacher")] = "initial"
    ema_decay: Annotated[Number, setting("decay of the EMA after each optimiser step", ge=0, lt=1)] = 0.999
    ema_anchor: Annotated[
        Number, setting("share of the initial weights in what the EMA moves towards, beside the student", ge=0, le=1)
    ] = 0.0
    offload: Annotated[Flag, setting("keep the second set of weights in host memory between passes")] = False


@settings_class
class GrpoSettings:
    samples_per_problem: Annotated[Whole, setting("responses of a group", ge=2)] = 8
    updates_per_batch: Annotated[Count, setting("optimiser steps on each step's responses")] = 1
    clip_low: Annotated[Number, setting("the ratio is cut below 1 - clip_low", ge=0, lt=1)] = 0.2
    clip_high: Annotated[Number, setting("the ratio is cut above 1 + clip_high", ge=0)] = 0.2
    normalisation: Annotated[
        Literal["token_mean", "sequence_mean"],
        setting("mean over all tokens that are trained on, or over responses of their means"),
    ] = "token_mean"
    kl_weight: Annotated[Number, setting("of the KL to the weights of objective.teacher (k3)", ge=0)] = 0.0
    importance_limit: Annotated[
        Positive | None, setting("largest importance weight of a token whose sampler and trainer differ; null: none")
    ] = 2.0


@settings_class
class ObjectiveSettings:
    name: Annotated[Literal["paint", "opsd", "grpo", "sft"], setting("what is trained")] = "paint"
    reveal: RevealSettings = field(default_factory=RevealSettings)
    loss: InterpolationLossConfig = field(default_factory=InterpolationLossConfig)
    chunk_bytes: Annotated[Positive, setting("bytes of logits that the loss may hold at once")] = 1.0e9
    kernel: Annotated[
        Literal["auto", "torch", "triton"],
        setting("who does the loss's elementwise work; auto takes torch where CUDA or Triton is missing"),
    ] = "auto"
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)

    @property
    def distils(self) -> bool:
        """Whether a teacher that sees a reference scores each rollout."""
        return self.name in ("paint", "opsd")

    @property
    def samples_per_problem(self) -> int:
        """Rollouts of each problem in a step; 0: the solution takes their place."""
        return {"sft": 0, "grpo": self.grpo.samples_per_problem}.get(self.name, 1)

    @property
    def has_teacher(self) -> bool:
        """Whether anything scores with the weights of `teacher`."""
        return self.distils or (self.name == "grpo" and self.grpo.kl_weight > 0)


@settings_class
class RolloutSettings:
    engine: Annotated[Literal["megatron", "replay"], setting("who samples")] = "megatron"
    path: Annotated[Text | None, setting("file of rollouts for engine: replay")] = None
    max_new_tokens: Annotated[Count, setting("longest response")] = 1024
    temperature: Annotated[Number, setting("0 is greedy", ge=0)] = 1.1
    top_p: Annotated[Number, setting("nucleus: smallest set of tokens with this mass", gt=0, le=1)] = 0.95
    top_k: Annotated[Whole, setting("most likely tokens kept; 0 keeps all", ge=0)] = 20
    batch_size: Annotated[Count, setting("responses decoded together on one data-parallel rank")] = 64
    cache_bytes: Annotated[Positive, setting("bytes of keys and values that a rank may hold while it samples")] = 2.0e10


@settings_class
class OptimizerSettings:
    name: Annotated[Literal["adam", "sgd"], setting("adam is AdamW")] = "adam"
    lr: Annotated[Positive, setting("peak learning rate")] = 5.0e-6
    min_lr: Annotated[Number, setting("learning rate at the end of linear and cosine decay", ge=0)] = 0.0
    decay: Annotated[Literal["constant", "linear", "cosine"], setting("shape after the warm-up")] = "constant"
    decay_steps: Annotated[Count | None, setting("step at which the decay reaches min_lr; null: run.steps")] = None
    warmup_steps: Annotated[Whole, setting("steps of linear rise", ge=0)] = 0
    beta1: Annotated[Number, setting("first moment's decay", ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, setting("second moment's decay", ge=0, lt=1)] = 0.999
    eps: Annotated[Positive, setting("added to the root of the second moment")] = 1.0e-8
    weight_decay: Annotated[Number, setting("decoupled weight decay", ge=0)] = 0.0
    momentum: Annotated[Number, setting("of sgd", ge=0, lt=1)] = 0.0
    clip_grad: Annotated[Number, setting("largest global gradient norm; 0 is no clipping", ge=0)] = 0.1


@settings_class
class MegatronSettings:
    """Megatron-Core's and Transformer Engine's own settings, with their own names; null leaves their default."""

    tensor_model_parallel_size: Annotated[Count, setting("ranks that share each layer")] = 1
    pipeline_model_parallel_size: Annotated[Count, setting("stages that share the layers")] = 1
    expert_model_parallel_size: Annotated[Count, setting("data-parallel ranks that share the experts")] = 1
    sequence_parallel: Annotated[Flag, setting("split activations between layers over the tensor-parallel ranks")] = (
        False
    )
    use_distributed_optimizer: Annotated[Flag, setting("shard optimiser state over data-parallel ranks")] = True
    overlap_grad_reduce: Annotated[Flag, setting("reduce gradients during backward")] = False
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"],
        setting("auto takes Transformer Engine where CUDA and it are present"),
    ] = "auto"
    recompute_granularity: Annotated[Literal["full", "selective"] | None, setting("activation recomputation")] = None
    recompute_method: Annotated[Literal["uniform", "block"] | None, setting("with granularity full")] = None
    recompute_num_layers: Annotated[Count | None, setting("with granularity full")] = None
    fp8: Annotated[Literal["e4m3", "hybrid"] | None, setting("FP8 format of Transformer Engine's GEMMs")] = None
    fp8_recipe: Annotated[Literal["delayed", "tensorwise", "blockwise", "mxfp8"], setting("FP8 scaling")] = "blockwise"
    fp8_margin: Annotated[Whole, setting("of delayed scaling", ge=0)] = 0
    fp8_amax_history_len: Annotated[Count, setting("of delayed scaling")] = 1
    fp8_amax_compute_algo: Annotated[Literal["most_recent", "max"], setting("of delayed scaling")] = "most_recent"
    first_last_layers_bf16: Annotated[Flag, setting("keep the first and last layers out of FP8")] = False
    num_layers_at_start_in_bf16: Annotated[Whole, setting("with first_last_layers_bf16", ge=0)] = 1
    num_layers_at_end_in_bf16: Annotated[Whole, setting("with first_last_layers_bf16", ge=0)] = 1
    deterministic_mode: Annotated[Flag, setting("only deterministic kernels")] = False
    distributed_timeout_minutes: Annotated[
        Count | None,
        setting("time-out of a collective; null: 10 and so many that run.hang_timeout_s comes first"),
    ] = None


@settings_class
class EvaluationSettings:
    problems: Annotated[Text | None, setting("held-out problems; null: no evaluation")] = None
    format: Annotated[Literal["auto", "jsonl", "parquet", "datasets"], setting("as in data")] = "auto"
    split: Annotated[Text, setting("as in data")] = "test"
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    limit: Annotated[Count | None, setting("only the first problems")] = None
    samples: Annotated[Count, setting("n of Avg@n")] = 12
    temperature: Annotated[Number, setting("0 is greedy", ge=0)] = 1.0
    top_p: Annotated[Number, setting("as in rollout", gt=0, le=1)] = 0.95
    top_k: Annotated[Whole, setting("as in rollout", ge=0)] = 0
    max_new_tokens: Annotated[Count, setting("longest answer")] = 38912
    thinking: Annotated[Flag, setting("thinking mode of the prompt")] = True
    greedy: Annotated[Flag, setting("one greedy answer a problem as well")] = False
    grading_seconds: Annotated[Positive, setting("time limit of one verdict")] = 5.0


@settings_class
class RunSettings:
    dir: Annotated[Text, setting("run folder")]
    steps: Annotated[Count, setting("optimiser steps")] = 100
    save_every: Annotated[Whole, setting("steps between checkpoints; 0: only at the end", ge=0)] = 25
    evaluate_every: Annotated[Whole, setting("steps between evaluations; 0: only before and after", ge=0)] = 25
    export_every: Annotated[Whole, setting("steps between Hugging Face exports; 0: only at the end", ge=0)] = 0
    async_save: Annotated[
        Flag, setting("write a checkpoint, from a copy in host memory, while training goes on; false: it waits")
    ] = True
    keep_last: Annotated[Count | None, setting("newest checkpoints that are kept; null: all are")] = None
    keep_every: Annotated[
        Count | None, setting("checkpoints of steps that are multiples of it are kept as well; null: none")
    ] = None
    exit_before_limit_s: Annotated[
        Number, setting("seconds before the end of the Slurm job at which to stop, with a checkpoint", ge=0)
    ] = 300.0
    hang_timeout_s: Annotated[
        Positive | None, setting("longest time without progress, ten times it in a save or evaluation; null: no watch")
    ] = 600.0
    max_skipped_steps: Annotated[
        Whole, setting("steps of a run that may be left out because a loss or gradient is not finite", ge=0)
    ] = 0
    seed: Annotated[Whole, setting("key of all sampling", ge=0)] = 1
    resume: Annotated[
        Literal["never", "auto", "required"], setting("go on from the newest complete checkpoint of run.dir")
    ] = "never"
    tensorboard: Annotated[Flag, setting("write TensorBoard files")] = True
    sampler_gap_limit: Annotated[
        Positive,
        setting("largest difference, in nats, of sampler's and trainer's log-probabilities at the start"),
    ] = 1.0
    self_check_limit: Annotated[Number, setting("largest loss, in nats a token, of a model against itself", ge=0)] = (
        0.05
    )


@settings_class
class Settings:
    """All settings of a run."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    prompts: PromptSettings = field(default_factory=PromptSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    megatron: MegatronSettings = field(default_factory=MegatronSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


@settings_class
class EvaluateSettings:
    """Settings of an evaluation without training. `load.py` fills them from the same sections, and the last two from
    run.seed and data.micro_batch_tokens."""

    model: ModelSettings
    prompts: PromptSettings
    rollout: RolloutSettings
    megatron: MegatronSettings
    evaluation: EvaluationSettings
    seed: int
    micro_batch_tokens: int
