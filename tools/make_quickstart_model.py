"""Makes the quickstart's checkpoint and problem files: `python tools/make_quickstart_model.py examples/quickstart`.

With --variant it makes those of the testbed. They start from the student at --start and learn another kind of teacher.

A Qwen3 of 0.3 million weights is trained with the project's policy and loss until it has the skill and the flaw of its
task (`quickstart_task.py`, `string_task.py`). The rounds of this warm-up end when the measured accuracies pass a check.
So every seed gives a model that PAINT can improve. It runs in one process and downloads nothing.
"""

import argparse
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from testbed_variants import DOMAINS, VARIANTS
from warm_up_rows import VOCABULARY_ROWS, RowMaker, Task, draw_problems, write_problems, write_tokenizer

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.config.settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    PromptSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.grading.graders import Graders
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Sample, TokenIds

TEMPLATES = Path(__file__).parents[1] / "examples" / "quickstart" / "templates"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 2000, 240
PROBLEM_SEED = 7  # the problem files do not depend on --seed
MEASURED_PROBLEMS = 150
THREADS = 1  # on a busy machine a second thread made these small products 10 times slower
PEAK_LR = 4.0e-3
DRILLS = 256  # rows in a step of drills
DRILLED_LOSS = 0.02  # nats a token; below it the model knows the steps
FIRST_ROUND_STEPS, ROUND_STEPS = 900, 300
MAX_DRILL_STEPS, MAX_ROUNDS = 5000, 40  # far above what any seed needed: 5 rounds
SHARES = (1.0, 0.65, 0.3)  # shares of the reference at which the model is measured as teacher


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Percent of right answers on held-out problems. They are sampled at temperature 1, except for `greedy`."""

    alone: float
    greedy: float
    with_reference: dict[float, float]  # by the shown share of the reference
    with_foreign: float  # with another problem's solution

    def passes(self, *, hidden_forget_share: float) -> bool:
        """Tells whether the student can still learn, the teacher is good and another problem's reference does not help.

        A teacher that forgets hidden steps must be good only with the complete reference.
        """
        shares = [1.0] if hidden_forget_share else SHARES
        taught = min(self.with_reference[share] for share in shares)
        return 30 <= self.alone <= 60 and taught > 88 and self.with_foreign < 60

    def __str__(self) -> str:
        shown = ", ".join(f"{share:g}: {percent:.1f}" for share, percent in self.with_reference.items())
        return (
            f"alone {self.alone:.1f} % (greedy {self.greedy:.1f}); with a share of the reference {shown}; "
            f"with another problem's {self.with_foreign:.1f}"
        )


class ReferencePrompts:
    """Prompts of an evaluation that show a share of the problem's solution, or of the next problem's."""

    def __init__(self, rows: RowMaker, problems: list[Problem], *, share: float, foreign: bool = False):
        self.rows, self.share = rows, share
        self.tokenizer, self.response_text = rows.prompts.tokenizer, rows.prompts.response_text
        shown = problems[1:] + problems[:1] if foreign else problems
        self.solution_of = {problem.id: other.solution for problem, other in zip(problems, shown, strict=True)}

    def evaluation_prompt(self, problem: Problem, thinking: bool) -> TokenIds:
        return self.rows.reference_prompt(problem, self.solution_of[problem.id], self.share)


class WarmUp:
    """A policy during its warm-up, with its training rows and the problems of its measurements."""

    def __init__(self, policy: Policy, rows: RowMaker, held_out: list[Problem], graders: Graders):
        self.policy, self.rows, self.graders = policy, rows, graders
        self.held_out = held_out[:MEASURED_PROBLEMS]
        self.loss = CrossEntropyLoss(chunk_bytes=1.0e9)
        self.started = time.monotonic()

    def log(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    def update(self, samples: list[Sample], *, lr: float) -> list[float]:
        """Does one step and returns the loss of each sample in nats a token."""
        report = self.policy.update(samples, self.loss, lr=lr)
        return [score.loss_sum / score.num_tokens for score in report.scores]

    def drill(self) -> None:
        """Trains single steps until the model knows them. Raises UserError if it does not learn them."""
        average = math.log(10)
        for step in range(1, MAX_DRILL_STEPS + 1):
            losses = self.update([self.rows.drill() for _ in range(DRILLS)], lr=PEAK_LR * min(1, step / 30))
            average += 0.1 * (sum(losses) / len(losses) - average)
            if step % 50 == 0:
                self.log(f"drill {step}: loss {average:.3f}")
            if average < DRILLED_LOSS:
                return self.log(f"drill {step}: loss {average:.3f}, the steps are known")
        raise UserError(f"the drills ended at {average:.3f} nats a token, above {DRILLED_LOSS}; try another --seed")

    def mixture_round(self, number: int, *, first: bool) -> Accuracy:
        """Trains one round over all kinds of rows and measures the model. The learning rate falls to a fiftieth."""
        kinds = [kind for kind, count in self.rows.variant.task.mixture.items() for _ in range(count)]
        steps, peak = (FIRST_ROUND_STEPS, PEAK_LR) if first else (ROUND_STEPS, PEAK_LR / 2)
        for step in range(1, steps + 1):
            lr = peak * min(1, step / 30) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            losses = self.update([getattr(self.rows, kind)() for kind in kinds], lr=lr)
            if step % 100 == 0:
                self.log(f"round {number}, step {step}: loss {_by_kind(kinds, losses)}")
        accuracy = self.measure()
        self.log(f"round {number}: {accuracy}")
        return accuracy

    def measure(self) -> Accuracy:
        """Measures the accuracy on held-out problems with every kind of prompt."""
        alone = self._evaluate(self.rows.prompts, greedy=True)
        return Accuracy(
            alone=100 * alone["avg"],
            greedy=100 * alone["greedy"],
            with_reference={share: self._with_reference(share=share) for share in SHARES},
            with_foreign=self._with_reference(share=1.0, foreign=True),
        )

    def _with_reference(self, *, share: float, foreign: bool = False) -> float:
        prompts = ReferencePrompts(self.rows, self.held_out, share=share, foreign=foreign)
        return 100 * self._evaluate(prompts)["avg"]

    def _evaluate(self, prompts: Prompts | ReferencePrompts, *, greedy: bool = False) -> dict[str, float]:
        settings = EvaluationSettings(samples=2, top_p=1.0, max_new_tokens=48, greedy=greedy)
        evaluator = Evaluator(settings, self.held_out, prompts, seed=1)
        answers = evaluator.sample(self.policy.sampler)
        return evaluator.report(answers, step=0, benchmark="held_out", graders=self.graders).metrics


def _by_kind(kinds: list[str], losses: list[float]) -> str:
    return ", ".join(
        f"{kind} {sum(kept) / len(kept):.3f}"
        for kind in dict.fromkeys(kinds)
        if (kept := [loss for name, loss in zip(kinds, losses, strict=True) if name == kind])
    )


def make_model(out: Path, *, seed: int, variant: str = "own", start: Path | None = None) -> None:
    """Writes `out`/model, `out`/train.jsonl and `out`/held_out.jsonl. Raises UserError if no round passes the check.

    start: a warmed-up model that is trained further with the rows of this variant; None starts from random weights.
    """
    kind = VARIANTS[variant]
    out.mkdir(parents=True, exist_ok=True)
    held_out = draw_problems(HELD_OUT_PROBLEMS, held_out=True, seed=PROBLEM_SEED, variant=kind)
    write_problems(out / "held_out.jsonl", held_out, **kind.columns)
    training = draw_problems(TRAINING_PROBLEMS, held_out=False, seed=PROBLEM_SEED, variant=kind)
    write_problems(out / "train.jsonl", training, **kind.columns)
    with tempfile.TemporaryDirectory() as random_model, Graders(DOMAINS, seconds=5.0) as graders:
        fresh = start is None
        if fresh:
            write_random_model(Path(random_model), kind.task, seed=seed)
        begin = str(start or random_model)
        settings = warm_up_settings(begin)
        prompts = Prompts(settings.prompts, load_tokenizer(begin))
        rows = RowMaker(prompts=prompts, rng=random.Random(seed), variant=kind)
        ranks = start_ranks(settings.megatron)  # hides Megatron's warnings about features that a CPU run does not need
        from megatron_paint.mcore.policy import MegatronPolicy

        policy = MegatronPolicy(settings, read_shape(begin), ranks)
        warm_up = WarmUp(policy, rows, held_out, graders)
        if fresh:
            warm_up.drill()
        for number in range(1, MAX_ROUNDS + 1):
            accuracy = warm_up.mixture_round(number, first=fresh and number == 1)
            if accuracy.passes(hidden_forget_share=kind.hidden_forget_share):
                break
        else:
            raise UserError(f"{MAX_ROUNDS} rounds of warm-up did not pass the check; try another --seed")
        policy.export(out / "model")
        stop_ranks()
    warm_up.log(f"written: {out}")


def warm_up_settings(start: str) -> Settings:
    """Returns the settings of the warm-up's policy. The paths of data and run are not used."""
    return Settings(
        model=ModelSettings(hf_path=start, dtype="float32"),
        data=DataSettings(train="unused", micro_batch_tokens=65536),
        run=RunSettings(dir="unused"),
        prompts=PromptSettings(
            student_template=str(TEMPLATES / "student.jinja"),
            teacher_template=str(TEMPLATES / "teacher.jinja"),
            evaluation_template=str(TEMPLATES / "evaluation.jinja"),
            teacher_thinking=False,
        ),
        objective=ObjectiveSettings(name="sft"),
        rollout=RolloutSettings(batch_size=512),
        optimizer=OptimizerSettings(lr=PEAK_LR, beta2=0.95, weight_decay=0.01, clip_grad=1.0),
        megatron=MegatronSettings(use_distributed_optimizer=False),
    )


def write_random_model(folder: Path, task: Task, *, seed: int) -> None:
    """Writes a Hugging Face folder with the task's tokenizer and random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=task.vocabulary.index("<|im_end|>"),
        pad_token_id=task.vocabulary.index("<|endoftext|>"),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for model/, train.jsonl and held_out.jsonl")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and the rows (default 1)")
    parser.add_argument("--variant", choices=VARIANTS, default="own", help="kind of teacher (default own)")
    parser.add_argument("--start", type=Path, help="warmed-up model to start from")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    make_model(options.out, seed=options.seed, variant=options.variant, start=options.start)


if __name__ == "__main__":
    main()
