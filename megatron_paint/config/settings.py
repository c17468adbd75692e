"""All settings of a run: their names, types, limits, meaning and defaults. A default is written here and nowhere else.

A YAML file sets values and `key=value` arguments override them; `load.py` reads both. The long sections have modules of
their own: `objective.py`, `loss.py`, `megatron.py`, `vllm.py`.
"""

from dataclasses import field, replace
from typing import Annotated, Literal

from megatron_paint.config.dialect import (
    ADAMW,
    MEGATRON_NAME,
    OASIS,
    OPSD,
    Count,
    Flag,
    Number,
    Positive,
    Text,
    Whole,
    setting,
    settings_class,
)
from megatron_paint.config.domains import DEFAULT_DOMAIN, DomainSettings
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.objective import Needs, ObjectiveSettings
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.config.vllm import VllmSettings, has_logprobs, logprobs_mode

LONGEST_ANSWER = 38912  # tokens; OPSD's limit in evaluations
Format = Literal["auto", "json", "jsonl", "csv", "parquet", "datasets"]
FORMAT = (
    "format of the problem file; auto: chosen by its ending; json, jsonl: one object a line or one array; csv: with a "
    "header, fields between commas, semicolons or tabs"
)


@settings_class
class LoraSettings:
    """Low-rank adapters, which train in place of the weights."""

    rank: Annotated[
        Count,
        setting(
            "rank of the adapters: on all seven projections of a dense model, on the four of attention in a mixture",
            source=OPSD,
        ),
    ] = 64
    alpha: Annotated[Positive, setting("the adapters' output is scaled by alpha / rank", source=OPSD)] = 128.0
    experts: Annotated[Flag, setting("mixture of experts: also adapt each expert; routers are never adapted")] = False
    export: Annotated[
        Literal["merged", "adapter"], setting("an export is a complete model, or a PEFT folder of the adapters alone")
    ] = "merged"


@settings_class
class ModelSettings:
    """The model that is trained."""

    hf_path: Annotated[Text, setting("Qwen3 checkpoint: a Hugging Face folder, a PEFT adapter, or a name on the hub")]
    megatron_path: Annotated[
        Text | None, setting("Megatron checkpoint of the same model that replaces the weights of hf_path at the start")
    ] = None
    adapter_path: Annotated[
        Text | None,
        setting(
            "PEFT adapter of hf_path to continue from: the start of the run's adapters, or merged into the weights if "
            "lora is null"
        ),
    ] = None
    dtype: Annotated[Literal["bfloat16", "float32"], setting("number type of weights and activations", source=OPSD)] = (
        "bfloat16"
    )
    lora: Annotated[LoraSettings | None, setting("low-rank adapters; null: all weights are trained")] = None


@settings_class
class ColumnSettings:
    """Names of the columns of a problem file. Dots lead into objects and lists: reward_model.ground_truth, turns.0."""

    id: Annotated[Text | None, setting("column of the problem's id; null: file name and row number are the id")] = "id"
    problem: Annotated[Text, setting("column of the problem's text, or of a list of messages with one of the user")] = (
        "problem"
    )
    solution: Annotated[Text, setting("column of the verified solution; grpo and evaluations need none")] = "solution"
    answer: Annotated[Text, setting("column of the final answer")] = "answer"
    views: Annotated[
        dict[Text, Text],
        setting("other texts that may be shown in place of the solution: a name for each, and its column"),
    ] = field(default_factory=dict)
    domain: Annotated[
        Text | None, setting("column of the problem's domain, a name of the section domains; null: none")
    ] = None
    choices: Annotated[
        Text | None, setting("column of the texts of a problem's choices, for grader=choice; null: none")
    ] = None


@settings_class
class DataSettings:
    """The training problems and how they are batched."""

    train: Annotated[Text, setting("training problems: a file, a folder, or a name for the library `datasets`")]
    format: Annotated[Format, setting(FORMAT)] = "auto"
    split: Annotated[Text, setting("split of a `datasets` source")] = "train"
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    domain: Annotated[Text, setting("domain of the rows that name none")] = DEFAULT_DOMAIN
    problems_per_step: Annotated[Count, setting("problems in one step, over all data-parallel ranks", source=OPSD)] = 32
    micro_batch_tokens: Annotated[
        Count, setting("most tokens in one micro-batch, padding included; a longer sequence is a micro-batch alone")
    ] = 16384
    max_tokens: Annotated[
        Count | None,
        setting(
            "most tokens of a problem's longest prompt together with its responses, or with the solution in SFT; a "
            "longer problem is a bad row. null: the model's positions"
        ),
    ] = None
    on_bad_row: Annotated[
        Literal["error", "skip"], setting("at a bad row: stop, or leave the row out and count it")
    ] = "error"
    check_answers: Annotated[Flag, setting("compare each answer with the last box of its solution")] = True
    order: Annotated[
        Literal["shuffled", "adastar"],
        setting(
            "shuffled: each epoch has all problems in a new order; adastar: the problems with the oldest visit come "
            "first, and of these the ones that the model solves least; the better the model, the fewer are repeated; "
            "all rollouts are graded",
            source="ours; adastar is AdaSTaR, arXiv 2505.16322",
        ),
    ] = "shuffled"
    seed: Annotated[Whole, setting("random key of the order of the problems", ge=0)] = 1


@settings_class
class PromptSettings:
    """The messages that student, teacher and evaluation see."""

    student_template: Annotated[
        Text | None, setting("template file of the student's message; null: the built-in one")
    ] = None
    teacher_template: Annotated[
        Text | None, setting("template file of the teacher's message; null: the built-in one")
    ] = None
    example_template: Annotated[
        Text | None,
        setting(
            "template file of the teacher's message with objective.reveal.solution=other_example; null: the built-in "
            "one"
        ),
    ] = None
    evaluation_template: Annotated[
        Text | None, setting("template file of the message in evaluations; null: the built-in one")
    ] = None
    chat_template: Annotated[Text | None, setting("chat template file; null: the tokenizer's own")] = None
    student_thinking: Annotated[Flag, setting("thinking mode of the student's prompt", source=OPSD)] = False
    teacher_thinking: Annotated[Flag, setting("thinking mode of the teacher's prompt", source=OPSD)] = True


@settings_class
class RolloutSettings:
    """How responses are sampled for training."""

    engine: Annotated[
        Literal["megatron", "replay", "vllm"],
        setting("where responses come from: sampled here, read from a file, or sampled by vLLM servers"),
    ] = "megatron"
    path: Annotated[Text | None, setting("file or folder of rollouts for engine=replay")] = None
    samples_per_problem: Annotated[
        Count | None,
        setting("responses to each problem of a step; null: 1, or objective.grpo.samples_per_problem for grpo"),
    ] = None
    keep: Annotated[
        Literal["all", "correct", "shortest_correct"],
        setting(
            "which responses paint and opsd train on: all, those with the right answer, or of each problem the "
            "shortest of them; a problem without a right response is left out",
            source=f"ours; shortest_correct: {OASIS}",
        ),
    ] = "all"
    grade: Annotated[
        Flag,
        setting(
            "grade every response, also where nothing depends on its grade: metrics and report then tell right from "
            "wrong. Every problem needs an answer. grpo grades anyway"
        ),
    ] = False
    max_new_tokens: Annotated[Count, setting("most tokens in a response", source=OPSD)] = 1024
    temperature: Annotated[Number, setting("sampling temperature; 0 is greedy", source=OPSD, ge=0)] = 1.1
    top_p: Annotated[
        Number, setting("nucleus: sample from the smallest set of tokens with this mass", source=OPSD, gt=0, le=1)
    ] = 0.95
    top_k: Annotated[Whole, setting("sample from this many most likely tokens; 0: from all", source=OPSD, ge=0)] = 20
    batch_size: Annotated[Count, setting("most responses that one data-parallel replica decodes together")] = 64
    cache_bytes: Annotated[Positive, setting("bytes of keys and values that a rank may hold while it samples")] = 2.0e10
    transfer_bytes: Annotated[
        Positive,
        setting(
            "bytes of weights in one message to the servers of engine=vllm, or one module; with vllm.transfer nccl and "
            "ipc also of the buffer on each GPU"
        ),
    ] = 2.56e8
    cuda_graphs: Annotated[
        Flag,
        setting(
            "sampling in the trainer: capture a decoding step as a CUDA graph and replay it; one graph for each bucket "
            "of positions. Not measured on a GPU"
        ),
    ] = False
    lora_transfer: Annotated[
        Literal["merged", "adapter"],
        setting(
            "what the servers of engine=vllm get with model.lora: complete weights with the adapters merged, or the "
            "adapters alone, under a new name in each step"
        ),
    ] = "merged"
    ahead: Annotated[
        Whole,
        setting(
            "1: the servers of engine=vllm sample the responses of the next step while a step trains, with the weights "
            "that this step started from; 0: no response is older than the weights that learn from it",
            ge=0,
            le=1,
        ),
    ] = 0
    importance_limit: Annotated[
        Number | None,
        setting(
            "largest importance weight of a token with ahead=1, for paint and opsd: the probability of the tokens "
            "before it under the weights that learn, over that under the weights that sampled; null: no weights",
            ge=1,
        ),
    ] = 2.0
    vllm: VllmSettings = field(default_factory=VllmSettings)

    @property
    def vllm_has_logprobs(self) -> bool:
        """Whether vLLM's log-probabilities are those of a `Rollout` at these settings."""
        mode = logprobs_mode(self.temperature)
        return has_logprobs(mode, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


@settings_class
class OptimizerSettings:
    """The optimiser and the schedule of its learning rate."""

    name: Annotated[Literal["adam", "sgd"], setting("the optimiser; adam is AdamW", source=OPSD)] = "adam"
    lr: Annotated[Positive, setting("peak learning rate", source=OPSD)] = 5.0e-6
    min_lr: Annotated[Number, setting("learning rate at the end of linear and cosine decay", ge=0)] = 0.0
    decay: Annotated[
        Literal["constant", "linear", "cosine"], setting("shape of the learning rate after the warm-up")
    ] = "constant"
    decay_steps: Annotated[Count | None, setting("step at which the decay reaches min_lr; null: run.steps")] = None
    warmup_steps: Annotated[Whole, setting("steps in which the learning rate rises linearly", ge=0)] = 0
    beta1: Annotated[Number, setting("decay of the first moment", source=ADAMW, ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, setting("decay of the second moment", source=ADAMW, ge=0, lt=1)] = 0.999
    eps: Annotated[Positive, setting("added to the root of the second moment", source=ADAMW)] = 1.0e-8
    weight_decay: Annotated[Number, setting("decoupled weight decay", ge=0)] = 0.0
    momentum: Annotated[Number, setting("momentum of sgd", ge=0, lt=1)] = 0.0
    clip_grad: Annotated[Number, setting("largest global gradient norm; 0: no clipping", source=OPSD, ge=0)] = 0.1
    grad_norm_skip_threshold: Annotated[
        Positive | None,
        setting(
            "a step whose global gradient norm before clipping is larger changes no weight, and counts for "
            "run.max_skipped_steps; null: no limit",
            source=MEGATRON_NAME,
        ),
    ] = None


@settings_class
class EvaluationSettings:
    """The evaluation on problems that are not trained on."""

    problems: Annotated[
        Text | None, setting("evaluation problems: what data.train takes, or a known benchmark; null: no evaluation")
    ] = None
    format: Annotated[Format, setting(FORMAT)] = "auto"
    split: Annotated[Text, setting("split of a `datasets` source")] = "test"
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    domain: Annotated[Text, setting("domain of the rows that name none")] = DEFAULT_DOMAIN
    limit: Annotated[Count | None, setting("number of problems, counted from the first one; null: all")] = None
    samples: Annotated[Count, setting("answers to each problem: the n of Avg@n", source=OPSD)] = 12
    temperature: Annotated[Number, setting("sampling temperature; 0 is greedy", source=OPSD, ge=0)] = 1.0
    top_p: Annotated[
        Number, setting("nucleus: sample from the smallest set of tokens with this mass", source=OPSD, gt=0, le=1)
    ] = 0.95
    top_k: Annotated[Whole, setting("sample from this many most likely tokens; 0: from all", source=OPSD, ge=0)] = 0
    max_new_tokens: Annotated[
        Count | None,
        setting(
            f"most tokens in an answer; null: what the model's positions leave after the longest prompt, at most "
            f"{LONGEST_ANSWER}",
            source=OPSD,
        ),
    ] = None
    thinking: Annotated[Flag, setting("thinking mode of the prompt", source=OPSD)] = True
    greedy: Annotated[Flag, setting("also give one greedy answer to each problem")] = False
    grading_seconds: Annotated[Number, setting("time limit for grading one answer, in seconds", gt=0, le=86_400)] = 5.0

    @property
    def longest_answer(self) -> int:
        """`max_new_tokens`, or the most that its default can be."""
        return self.max_new_tokens or LONGEST_ANSWER


@settings_class
class GradingSettings:
    """How responses are graded: in training, in evaluations and in checks of solutions."""

    box_in_thought: Annotated[
        Literal["ignore", "count"],
        setting("a box inside a thought that never ends: ignore, it is no answer; count, it is the answer"),
    ] = "ignore"


@settings_class
class RunSettings:
    """The run: its folder, length, checkpoints and safety limits."""

    dir: Annotated[Text, setting("run folder")]
    steps: Annotated[Count, setting("steps of the run", source=OPSD)] = 100
    save_every: Annotated[
        Whole, setting("steps between checkpoints; 0: only after the last step", source=OPSD, ge=0)
    ] = 25
    evaluate_every: Annotated[
        Whole, setting("steps between evaluations; 0: only before the first and after the last step", ge=0)
    ] = 25
    export_every: Annotated[Whole, setting("steps between Hugging Face exports; 0: only after the last step", ge=0)] = 0
    async_save: Annotated[
        Flag, setting("write a checkpoint from a copy in host memory while training continues; false: training waits")
    ] = True
    keep_last: Annotated[Count | None, setting("how many of the newest checkpoints are kept; null: all")] = None
    keep_every: Annotated[
        Count | None, setting("checkpoints at multiples of this step are kept in addition to keep_last; null: none")
    ] = None
    exit_before_limit_s: Annotated[
        Number,
        setting("the run saves a checkpoint and stops this many seconds before the Slurm job's time limit", ge=0),
    ] = 300.0
    hang_timeout_s: Annotated[
        Positive | None,
        setting(
            "limit on the time without progress, in seconds, after which a run is ended as hung; ten times as long at "
            "the start, in a save, an export or an evaluation, and while a profile is written; null: no limit"
        ),
    ] = 600.0
    max_skipped_steps: Annotated[
        Whole,
        setting(
            "number of steps that a run may skip because a loss or gradient is not finite, or the gradient norm is "
            "above optimizer.grad_norm_skip_threshold",
            ge=0,
        ),
    ] = 0
    seed: Annotated[Whole, setting("random key of all sampling", ge=0)] = 1
    resume: Annotated[
        Literal["never", "auto", "required"],
        setting(
            "never: start in an empty run.dir; auto: resume from the newest complete checkpoint in run.dir, or start "
            "without one; required: resume, or fail without a complete checkpoint"
        ),
    ] = "never"
    allow_changes: Annotated[
        tuple[Text, ...],
        setting("settings that this start may change in a run that it resumes, such as [optimizer.lr]"),
    ] = ()
    tensorboard: Annotated[Flag, setting("write TensorBoard files")] = True
    loggers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        setting("services that show the run, such as [wandb, mlflow]; tensorboard need not be named"),
    ] = ()
    name: Annotated[Text | None, setting("name of the run in these services; null: the name of the folder")] = None
    project: Annotated[
        Text | None,
        setting(
            "project of wandb, experiment of mlflow; null: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, or megatron-paint"
        ),
    ] = None
    log_samples_every: Annotated[
        Whole, setting("steps between tables of samples in loggers, after that of step 1; 0: none", ge=0)
    ] = 25
    keep_token_values: Annotated[
        Whole,
        setting(
            "number of samples of each step, from the first one on, that are stored with values of each token: "
            "divergence, entropies, and the difference between trainer and sampler",
            ge=0,
        ),
    ] = 32
    keep_top_tokens: Annotated[
        Whole,
        setting(
            "number of likeliest tokens of teacher and of student that are stored for each token of the samples of "
            "keep_token_values; 0: none. This costs two more products with the output layer for these samples",
            ge=0,
            le=20,
        ),
    ] = 0
    profile: Annotated[
        ProfileSettings | None, setting("where the time of chosen steps goes (docs/debugging.md); null: no profile")
    ] = None
    sampler_gap_limit: Annotated[
        Positive,
        setting("the run does not start if a log-probability differs by more between sampler and trainer, in nats"),
    ] = 1.0
    self_check_limit: Annotated[
        Number,
        setting("the run does not start if the loss of the model against itself is larger, in nats a token", ge=0),
    ] = 0.05


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
    grading: GradingSettings = field(default_factory=GradingSettings)
    domains: dict[Text, DomainSettings] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What the objective needs of this run: the number of responses and their grades may be asked for elsewhere."""
        needs, rollout = self.objective.needs, self.rollout
        if not needs.samples_per_problem:
            return needs
        return replace(
            needs,
            samples_per_problem=rollout.samples_per_problem or needs.samples_per_problem,
            graders=needs.graders or rollout.keep != "all" or rollout.grade or self.data.order == "adastar",
        )


@settings_class
class EvaluateSettings:
    """Settings of an evaluation without training.

    Each section has the name that it has in `Settings`. `seed` is run.seed, and `micro_batch_tokens` is
    data.micro_batch_tokens. `evaluate_settings_of` in load.py reads them.
    """

    model: ModelSettings
    prompts: PromptSettings
    rollout: RolloutSettings
    megatron: MegatronSettings
    evaluation: EvaluationSettings
    grading: GradingSettings
    domains: dict[str, DomainSettings]
    seed: int
    micro_batch_tokens: int
