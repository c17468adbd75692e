"""What a step has to do: how many sequences of how many tokens, and which passes the objective needs."""

from dataclasses import dataclass

from megatron_paint.config.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the data, which no setting has."""

    prompt: int
    solution: int
    response: float | None = None  # mean of the responses; None: rollout.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step."""

    sequences: int  # responses, or solutions where none are sampled
    prompt: float  # tokens of the student's prompt
    response: float  # mean tokens of what is trained on
    new_tokens: int  # decoding steps of a batch; 0: nothing is sampled
    teacher_prompt: float
    teacher_passes: int  # forward passes with the teacher's prompt
    initial_passes: int  # forward passes with the student's prompt and without gradient
    updates: int  # student passes with an optimiser step each
    output_products: float  # products with the output layer in an update, in units of one forward product
    logit_sets: int  # distributions over the vocabulary in the loss

    @property
    def longest_prompt(self) -> float:
        """Tokens of the longest prompt: the teacher's, if it has one."""
        return max(self.prompt, self.teacher_prompt if self.teacher_passes else 0)

    @property
    def longest(self) -> float:
        """Tokens of the longest row."""
        return self.longest_prompt + (self.new_tokens or self.response)

    @property
    def trained_tokens(self) -> float:
        """Tokens of all sequences of the student."""
        return self.sequences * (self.prompt + self.response)


def workload_of(settings: Settings, lengths: Lengths) -> Workload:
    """The step of these settings."""
    needs, objective = settings.needs, settings.objective
    samples = needs.samples_per_problem
    new_tokens = settings.rollout.max_new_tokens if samples else 0
    response = float(lengths.response or settings.rollout.max_new_tokens) if samples else float(lengths.solution)
    response = min(response, float(new_tokens)) if samples else response
    shown = needs.masker and objective.reveal.solution not in ("none", "reference_free")
    full = needs.masker and objective.loss.partner == "full_teacher"
    teachers = needs.teacher + full if needs.masker else 0
    references = int(needs.initial) if needs.masker else int(needs.teacher)
    trained = 1 if settings.model.lora is not None else 2  # gradients of the hidden states, and of the output layer
    return Workload(
        sequences=settings.data.problems_per_step * max(samples, 1),
        prompt=float(lengths.prompt),
        response=response,
        new_tokens=new_tokens,
        teacher_prompt=float(lengths.prompt + (lengths.solution if shown else 0)),
        teacher_passes=int(teachers),
        initial_passes=references,
        updates=objective.grpo.updates_per_batch if objective.name == "grpo" else 1,
        output_products=1.0 + trained + teachers + references,
        logit_sets=1 + int(teachers) + references,
    )
