"""What a search checks before its first trial, so that a mistake costs no GPU time."""

from collections.abc import Sequence

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.settings import Settings
from megatron_paint.grading.grade import Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.planning.layout import check_model, data_parallel_size, trainer_samples
from megatron_paint.planning.local_model import with_local_model
from megatron_paint.search.final import Problems
from megatron_paint.search.space import Space, trial_tree
from megatron_paint.search.trial_run import Place
from megatron_paint.training.inputs import check_inputs, fit_answers


def check_trials(space: Space, problems: Problems, *, processes: int) -> tuple[str, ...]:
    """Checks what trial 0 and the final comparison need, except the weights. Returns lines for the console.

    processes: ranks of a trial. UserError: the layout, a problem file, a prompt or a user's grader does not fit.
    """
    settings = with_local_model(trial_0(space))
    shape = check_model(settings.model, settings.megatron, settings.rollout, samples=trainer_samples(settings))
    data_parallel_size(processes, settings.megatron)
    inputs = check_inputs(settings, shape, run_folder=False)
    if problems.test is not None:
        given, rules = space.given.evaluation, Rules(box_in_thought=settings.grading.box_in_thought)
        fit_answers(given, shape, inputs.prompts, problems.test.problems)
        with Graders(settings.domains, seconds=given.grading_seconds, rules=rules) as graders:
            graders.check(problems.test.problems)
    return inputs.summary()


def trial_0(space: Space) -> Settings:
    """The settings of trial 0: the given ones, with the length and the evaluation of a trial."""
    return settings_of(trial_tree(space, space.default, run_dir=space.given.run.dir))


def check_places(places: Sequence[Place], *, gpus: Sequence[str], asked: int | None) -> None:
    """UserError: there are fewer GPUs than trials side by side, or than ranks of one of them.

    gpus: those of this machine; asked: `--processes`.
    """
    if not gpus:
        return
    share = len(gpus) // len(places)
    if not share:
        raise UserError(f"--jobs={len(places)} is above the number of GPUs here, {len(gpus)}: give at most as many")
    if asked is not None and asked > share:
        raise UserError(
            f"--processes={asked} is above the number of GPUs of a trial, {share}: {count_text(len(places), 'trial')} "
            f"side by side divide {count_text(len(gpus), 'GPU')}, and each process drives one. Give at most {share}, "
            "or fewer --jobs"
        )
