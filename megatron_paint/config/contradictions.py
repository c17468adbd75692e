"""Settings that contradict each other: each function takes the sections that it compares and yields error messages.

`loss.py` checks the loss, which can be used alone.
"""

from collections.abc import Iterator

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.objective import SHOWN_WHOLE, ObjectiveSettings, RevealSettings, TeacherSettings
from megatron_paint.config.settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    RolloutSettings,
    RunSettings,
)
from megatron_paint.config.vllm_contradictions import of_vllm

BUILT_IN_VIEWS = ("full", "answer")  # every problem has them, without a further column
TAKES_ANOTHER_PROBLEM = ("wrong", "other_example", "shuffled")  # values of reveal.solution and reveal.rule


def of_data(data: DataSettings, objective: ObjectiveSettings) -> Iterator[str]:
    reveal = objective.reveal
    if objective.needs.masker and data.problems_per_step < 2:
        for name, value in (("solution", reveal.solution), ("rule", reveal.rule)):
            if value in TAKES_ANOTHER_PROBLEM:
                yield (
                    f"objective.reveal.{name}={value} takes another problem of the same step, and "
                    f"data.problems_per_step is {data.problems_per_step}: set it to 2 or more"
                )
    if data.order == "adastar" and not objective.needs.samples_per_problem:
        yield (
            f"data.order=adastar orders the problems by verdicts on rollouts, and objective.name={objective.name} "
            "samples no rollouts: set data.order=shuffled"
        )


def of_lengths(data: DataSettings, rollout: RolloutSettings, objective: ObjectiveSettings) -> Iterator[str]:
    if data.max_tokens is None or not objective.needs.samples_per_problem:
        return
    if data.max_tokens <= rollout.max_new_tokens:
        yield (
            f"data.max_tokens={data.max_tokens} counts prompt and response, and rollout.max_new_tokens="
            f"{rollout.max_new_tokens} leaves no token for the prompt: raise max_tokens, or lower max_new_tokens"
        )


def of_reveal(reveal: RevealSettings) -> Iterator[str]:
    if reveal.rule == "fixed" and reveal.share is None:
        yield "objective.reveal.share is not set: rule=fixed shows this share of each solution; set it in [0, 1]"
    if reveal.rule != "fixed" and reveal.share is not None:
        yield (
            f"objective.reveal.share={reveal.share} belongs to rule=fixed, but rule={reveal.rule}; leave share out, or "
            "set rule to fixed"
        )
    if reveal.hidden_nats is not None and reveal.unit != "token":
        yield (
            f"objective.reveal.hidden_nats={reveal.hidden_nats} is counted over tokens, but objective.reveal.unit="
            f"{reveal.unit}; set unit to token or hidden_nats to null"
        )


def of_shown(objective: ObjectiveSettings, rollout: RolloutSettings) -> Iterator[str]:
    """What the teacher is shown; only for the objectives that show it something."""
    reveal = objective.reveal
    if not objective.needs.masker:
        return
    if reveal.solution == "other_example":
        if reveal.rule != "full":
            yield (
                f"objective.reveal.rule={reveal.rule} hides a part of a solution, and a worked example "
                "(objective.reveal.solution=other_example) is shown completely: set objective.reveal.rule to full"
            )
        if reveal.hide_answer:
            yield (
                "objective.reveal.hide_answer hides a box, and a worked example "
                "(objective.reveal.solution=other_example) is shown completely: set it to false"
            )
        if reveal.hidden_nats is not None:
            yield (
                f"objective.reveal.hidden_nats={reveal.hidden_nats} limits what is hidden, and nothing of a worked "
                "example (objective.reveal.solution=other_example) is hidden: set it to null"
            )
    if reveal.solution in ("none", "reference_free") and (reveal.hide_answer or reveal.hidden_nats is not None):
        name = "hide_answer" if reveal.hide_answer else "hidden_nats"
        yield (
            f"objective.reveal.{name} is about what is hidden of a reference, and objective.reveal.solution="
            f"{reveal.solution} shows no reference: leave {name} out"
        )
    if reveal.solution == "peer_rollout":
        samples = rollout.samples_per_problem or 1
        if samples < 2:
            yield (
                f"objective.reveal.solution=peer_rollout shows another response to the same problem, and "
                f"rollout.samples_per_problem is {samples}: set it to 2 or more, such as 8"
            )
        if reveal.view != "full":
            yield (
                f"objective.reveal.view={reveal.view} chooses a text of the problem, and objective.reveal.solution="
                "peer_rollout shows a response: leave the view out"
            )
        if reveal.rule == "shuffled":
            yield (
                "objective.reveal.rule=shuffled takes the share of another problem, and with objective.reveal.solution="
                "peer_rollout a step may have peers for one problem alone: choose another rule"
            )
    if reveal.view == "answer" and reveal.hide_answer:
        yield (
            "objective.reveal.hide_answer hides the box, and objective.reveal.view=answer shows nothing but the box: "
            "set one of them to its default"
        )


def of_loss(objective: ObjectiveSettings) -> Iterator[str]:
    """Settings of the loss under which nothing is learned, or a teacher's pass changes nothing."""
    if not objective.needs.masker:
        return
    loss, reveal = objective.loss, objective.reveal
    if loss.elsewhere == "skip" and loss.selects_nothing:
        why = "positions=none" if loss.positions == "none" else f"fraction={loss.fraction:g}"
        yield (
            f"objective.loss.elsewhere=skip trains on selected tokens alone, and with objective.loss.{why} none is "
            "selected, so nothing would be learned: set elsewhere to teacher, or select tokens"
        )
    if loss.partner != "full_teacher":
        return
    if not loss.interpolates:
        yield (
            "objective.loss.partner=full_teacher costs a pass of the teacher and has no effect, because no target is "
            "mixed (positions, fraction or weight); set partner to student, or mix targets"
        )
    elif reveal.shows_all:
        everything = "share=1" if reveal.rule == "fixed" else "rule=full"
        what = f"solution={reveal.solution}" if reveal.solution in SHOWN_WHOLE else everything
        yield (
            "objective.loss.partner=full_teacher mixes in the teacher that also sees what is hidden, and with "
            f"objective.reveal.{what} nothing is hidden: it would be the teacher itself; set partner to student"
        )


def of_kept(objective: ObjectiveSettings, rollout: RolloutSettings) -> Iterator[str]:
    """Which responses are trained on."""
    distils = objective.needs.masker
    if rollout.keep != "all" and not distils:
        yield (
            f"rollout.keep={rollout.keep} belongs to objective.name=paint and opsd, but objective.name="
            f"{objective.name}; leave keep out"
        )
    samples = rollout.samples_per_problem or 1
    if distils and samples > 1 and rollout.temperature == 0:
        yield (
            f"rollout.temperature=0 makes all {samples} responses to a problem the same (rollout.samples_per_problem): "
            "set it above 0, such as 1.1, or sample one response"
        )


def of_views(objective: ObjectiveSettings, data: DataSettings, evaluation: EvaluationSettings) -> Iterator[str]:
    """The names of views, and the one that is shown."""
    views, chosen = data.columns.views, objective.reveal.view
    for name in BUILT_IN_VIEWS:
        if name in views:
            yield (
                f"data.columns.views.{name} cannot be set: the view full is data.columns.solution, and the view answer "
                "is the box of data.columns.answer; choose another name"
            )
    if evaluation.columns.views:
        yield "evaluation.columns.views has no use, because an evaluation shows no solution; leave views out"
    if objective.needs.masker and chosen not in (*BUILT_IN_VIEWS, *views):
        yield (
            f"objective.reveal.view={chosen} is no view: known are {', '.join((*BUILT_IN_VIEWS, *views))}; name its "
            f"column with data.columns.views.{chosen}"
        )


def of_teacher(teacher: TeacherSettings) -> Iterator[str]:
    if teacher.ema_anchor > 0 and teacher.weights != "ema":
        yield (
            f"objective.teacher.ema_anchor={teacher.ema_anchor} belongs to weights=ema, but weights={teacher.weights}; "
            "leave ema_anchor out, or set weights to ema"
        )


def of_rollout(rollout: RolloutSettings) -> Iterator[str]:
    if rollout.engine == "replay" and rollout.path is None:
        yield "rollout.path is not set: engine=replay reads rollouts from this file"
    if rollout.engine != "replay" and rollout.path is not None:
        yield (
            f"rollout.path belongs to engine=replay, but engine={rollout.engine}; leave path out, or set engine to "
            "replay"
        )
    yield from of_vllm(rollout)


def of_ahead(rollout: RolloutSettings, data: DataSettings, objective: ObjectiveSettings) -> Iterator[str]:
    """Sampling one step ahead; only for the objectives that sample."""
    if rollout.ahead == 0:
        if rollout.importance_limit != RolloutSettings.importance_limit:
            yield (
                f"rollout.importance_limit={rollout.importance_limit} belongs to rollout.ahead=1, and rollout.ahead is "
                "0; leave importance_limit out, or set ahead to 1"
            )
        return
    if not objective.needs.samples_per_problem:
        yield (
            f"rollout.ahead=1 samples the responses of the next step, and objective.name={objective.name} samples "
            "no responses: leave rollout.ahead out"
        )
    elif not objective.needs.weighs_older:
        yield (
            f"rollout.ahead=1 samples with older weights, and objective.name={objective.name} does not weigh such "
            "responses: leave rollout.ahead out"
        )
    if rollout.engine != "vllm":
        yield (
            f"rollout.ahead=1 samples while a step trains, which needs servers, and rollout.engine={rollout.engine}: "
            "set engine to vllm or ahead to 0"
        )
    if data.order == "adastar":
        yield (
            "rollout.ahead=1 samples the next step's problems before the verdicts of this step, and data.order=adastar "
            "chooses them by these verdicts: set order to shuffled or ahead to 0"
        )
    if objective.name == "grpo" and rollout.importance_limit != RolloutSettings.importance_limit:
        yield (
            f"rollout.importance_limit={rollout.importance_limit} belongs to objective.name=paint and opsd, and grpo "
            "has its clipped ratio; leave importance_limit out"
        )
    if objective.needs.masker and rollout.temperature == 0 and rollout.importance_limit is not None:
        yield (
            "rollout.temperature=0 samples without probabilities, and rollout.importance_limit weighs older responses "
            "by them: set importance_limit to null, or the temperature above 0"
        )


def of_grpo(objective: ObjectiveSettings, rollout: RolloutSettings) -> Iterator[str]:
    """Only for objective.name=grpo."""
    grpo = objective.grpo
    if rollout.temperature == 0:
        yield (
            "rollout.temperature=0 makes all responses of a group the same, and objective.name=grpo learns from their "
            "differences: set it above 0, such as 1.2"
        )
    if rollout.engine == "replay" and grpo.importance_limit is not None:
        yield (
            f"objective.grpo.importance_limit={grpo.importance_limit} needs the sampler's log-probabilities, and "
            "rollouts read from a file have none: set it to null"
        )
    if rollout.engine == "vllm" and grpo.importance_limit is not None and not rollout.vllm_has_logprobs:
        yield (
            f"objective.grpo.importance_limit={grpo.importance_limit} needs log-probabilities at the temperature, but "
            f"before top-k and top-p. vLLM has none with rollout.temperature={rollout.temperature:g}, top_p="
            f"{rollout.top_p:g}, top_k={rollout.top_k}: set the temperature to 1, or top_p to 1 and top_k to 0, or the "
            "limit to null"
        )
    if grpo.kl_weight > 0 and objective.teacher.weights == "current":
        yield (
            f"objective.grpo.kl_weight={grpo.kl_weight} keeps the model near the weights of objective.teacher, and "
            "with objective.teacher.weights=current these are the model's own: set it to initial or ema"
        )


def of_loggers(run: RunSettings) -> Iterator[str]:
    if len(set(run.loggers)) != len(run.loggers):
        yield "run.loggers names a logger twice; name each once"
    if "tensorboard" in run.loggers and not run.tensorboard:
        yield ("run.loggers names tensorboard, and run.tensorboard=false turns it off: leave one of them out")


def of_tokens(run: RunSettings) -> Iterator[str]:
    if run.keep_top_tokens and not run.keep_token_values:
        yield (
            f"run.keep_top_tokens={run.keep_top_tokens} applies to the samples of run.keep_token_values, and that is "
            "0: set run.keep_token_values to a number of samples, or run.keep_top_tokens to 0"
        )


def of_optimizer(optimizer: OptimizerSettings) -> Iterator[str]:
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; it is where the decay ends"
    if optimizer.decay_steps is None:
        return
    if optimizer.decay == "constant":
        yield (
            f"optimizer.decay_steps={optimizer.decay_steps} is where a decay ends, but optimizer.decay=constant; leave "
            "decay_steps out, or set decay to linear or cosine"
        )
    if optimizer.decay_steps <= optimizer.warmup_steps:
        yield (
            f"optimizer.decay_steps={optimizer.decay_steps} must lie after optimizer.warmup_steps="
            f"{optimizer.warmup_steps}, where the decay begins: {optimizer.warmup_steps + 1} or more"
        )


def of_megatron(megatron: MegatronSettings, optimizer: OptimizerSettings, model: ModelSettings) -> Iterator[str]:
    if optimizer.name == "sgd" and megatron.use_distributed_optimizer:
        yield "optimizer.name=sgd has no state to shard: set megatron.use_distributed_optimizer=false"
    incomplete = megatron.recompute_method is None or megatron.recompute_num_layers is None
    if megatron.recompute_granularity == "full" and incomplete:
        yield "megatron.recompute_granularity=full needs recompute_method and recompute_num_layers (uniform, 1)"
    yield from of_pipeline(megatron)
    if megatron.fp8 is not None and model.dtype != "bfloat16":
        yield f"megatron.fp8 needs model.dtype=bfloat16, got {model.dtype}"
    if megatron.fp8 is not None and megatron.transformer_impl == "local" and not megatron.fp8_emulate:
        yield (
            f"megatron.fp8={megatron.fp8} is computed by layers of Transformer Engine, and "
            "megatron.transformer_impl=local has none: set transformer_impl to auto, or fp8 to null"
        )
    if megatron.fp8 is not None and megatron.first_last_layers_bf16 and megatron.fp8_recipe == "delayed":
        yield (
            "megatron.first_last_layers_bf16=true keeps layers out of FP8, which Megatron cannot do with "
            "megatron.fp8_recipe=delayed: set it to false, or choose another recipe, such as blockwise"
        )
    if megatron.fp8_emulate:
        if megatron.fp8 is None:
            yield "megatron.fp8_emulate emulates FP8, and megatron.fp8 is null: set it to hybrid or e4m3"
        elif megatron.fp8_recipe not in ("tensorwise", "blockwise"):
            yield (
                f"megatron.fp8_emulate emulates the recipes tensorwise and blockwise, and megatron.fp8_recipe="
                f"{megatron.fp8_recipe}: set one of the two"
            )
        if megatron.transformer_impl == "transformer_engine":
            yield (
                "megatron.fp8_emulate computes in plain torch, and megatron.transformer_impl=transformer_engine: set "
                "transformer_impl to auto or local"
            )
    if megatron.moe_router_load_balancing_type == "none" and megatron.moe_aux_loss_coeff:
        yield (
            f"megatron.moe_aux_loss_coeff={megatron.moe_aux_loss_coeff:g} belongs to moe_router_load_balancing_type="
            "aux_loss, but that is none; leave moe_aux_loss_coeff out, or set that to aux_loss"
        )
    if megatron.moe_router_load_balancing_type == "aux_loss" and not megatron.moe_aux_loss_coeff:
        yield (
            "megatron.moe_aux_loss_coeff is 0, so moe_router_load_balancing_type=aux_loss has no effect: set the "
            "coefficient, such as 1e-3, or set the type to none"
        )


def of_replicas(megatron: MegatronSettings, model: ModelSettings, objective: ObjectiveSettings) -> Iterator[str]:
    """How replicas share the optimiser's state and the weights of a step."""
    instances = megatron.num_distributed_optimizer_instances
    if instances > 1 and not megatron.use_distributed_optimizer:
        yield (
            f"megatron.num_distributed_optimizer_instances={instances} divides the replicas that share the optimiser's "
            "state, and with megatron.use_distributed_optimizer=false none do: leave one of them out"
        )
    if not megatron.overlap_param_gather:
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(megatron, name):
            yield f"megatron.overlap_param_gather needs megatron.{name}=true: set it, or leave overlap_param_gather out"
    if objective.name != "sft":
        yield (
            f"megatron.overlap_param_gather=true gathers weights during the next pass of training, and objective.name="
            f"{objective.name} reads them before it, to sample or to score: leave it out"
        )
    if model.lora is not None:
        yield (
            "megatron.overlap_param_gather=true gathers the trained weights while layers compute, and with model.lora "
            "these are small adapters: leave it out"
        )


def of_pipeline(megatron: MegatronSettings) -> Iterator[str]:
    """Settings that divide the layers among pipeline stages. `planning/stages.py` compares them with the model."""
    counts = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    flags = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    counts, flags = ([name for name in names if getattr(megatron, name)] for names in (counts, flags))
    layout = ["pipeline_model_parallel_layout"] if megatron.pipeline_model_parallel_layout is not None else []
    chunks = (
        ["virtual_pipeline_model_parallel_size"] if (megatron.virtual_pipeline_model_parallel_size or 1) > 1 else []
    )
    rules = [names[0] for names in (layout, counts, flags) if names]
    if megatron.pipeline_model_parallel_size == 1:
        for name in [*chunks, *rules][:1]:
            yield (
                f"megatron.{name} divides the layers among pipeline stages, and megatron.pipeline_model_parallel_size="
                f"1; leave {name} out, or set pipeline_model_parallel_size to 2 or more"
            )
    elif len(rules) > 1:
        yield (
            f"megatron.{rules[0]} and megatron.{rules[1]} are two rules for the layers of each pipeline stage: leave "
            "one of them out"
        )


def of_auxiliary_losses(
    megatron: MegatronSettings, model: ModelSettings, objective: ObjectiveSettings
) -> Iterator[str]:
    """The losses of a mixture's routers."""
    if not megatron.has_auxiliary_loss:
        return
    name = "moe_aux_loss_coeff" if megatron.moe_aux_loss_coeff else "moe_z_loss_coeff"
    if model.lora is not None:
        yield f"megatron.{name} is a loss of the routers, which model.lora freezes: leave one of them out"
    if objective.needs.masker and objective.loss.elsewhere == "skip":
        yield (
            f"megatron.{name} is scaled by the number of tokens that carry loss. With objective.loss.elsewhere=skip "
            f"this number is known only after the pass: set elsewhere to teacher, or leave megatron.{name} out"
        )
