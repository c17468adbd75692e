"""The rows of a warm-up, which teach a small model a skill, a flaw, and how to use a reference that it is shown.

A task draws problems that are solved line by line. The student makes a certain mistake in most of the steps where it
can be made. It works right if its prompt shows a complete or cut reference of the same problem. A variant is a kind of
teacher: a task, the style of its references, and what a reference does to the model that sees it.
"""

import json
import random
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_paint.data.prompts import Prompts
from megatron_paint.masker.reveal import cut_solution
from megatron_paint.records import Overlap, Problem, Reveal, Rollout, Sample, TokenIds

HELD_OUT_SHARE = 5  # one in five problems, chosen by checksum, is held out
WORDS = ("\\boxed{", "Reference:", "user", "assistant", "...")  # tokens of several characters, of every task
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")  # the first tokens of every vocabulary
VOCABULARY_ROWS = 32  # of the model; enough for 4 tensor-parallel ranks; the last rows have no token, as in Qwen3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


class Drawn(Protocol):
    """A problem of a task: a value, and the steps that change it in turn."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> Any: ...
    @property
    def steps(self) -> Sequence[Any]: ...


class Task(ABC):
    """Problems that are solved in steps, and a mistake that a step may have."""

    vocabulary: tuple[str, ...]
    words: tuple[str, ...] = WORDS  # the tokens of several characters
    layers = 2  # of its model
    mixture: Mapping[str, int] = {"plain": 24, "reference": 64, "foreign": 24, "drill": 32}  # rows in a step of a round

    @abstractmethod
    def draw(self, rng: random.Random, *, held_out: bool) -> Drawn:
        """Draws a problem of one side of the split."""

    @abstractmethod
    def draw_step(self, rng: random.Random) -> tuple[Any, Any]:
        """Draws a value and a step that can be done from it."""

    @abstractmethod
    def apply(self, value: Any, step: Any, *, forgets: bool) -> Any:
        """Does a step. forgets: with the student's mistake."""

    @abstractmethod
    def step_text(self, value: Any, step: Any) -> str:
        """Returns a step as text, which the line of a solution begins with."""

    def work_out(self, problem: Drawn, *, forgets: Sequence[bool]) -> list[str]:
        """Returns a line for each step, `...=RESULT`, and the box. forgets: the steps with the student's mistake."""
        lines, value = [], problem.start
        for step, forgotten in zip(problem.steps, forgets, strict=True):
            after = self.apply(value, step, forgets=forgotten)
            lines.append(f"{self.step_text(value, step)}={after}\n")
            value = after
        return [*lines, f"\\boxed{{{value}}}"]

    def drill(self, rng: random.Random) -> tuple[str, str]:
        """Returns one right step alone, as a prompt and its response."""
        value, step = self.draw_step(rng)
        return f"{self.step_text(value, step)}=", str(self.apply(value, step, forgets=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A kind of teacher: the style of its references, and how the model uses a shown reference."""

    task: Task
    start: str | None = None  # the variant whose warmed-up model is trained further; None: random weights
    terse: bool = False  # references have results alone, a style that the student cannot work in
    jump_share: float = 0.0  # chance at each step that a model that sees the box writes the box at once
    hidden_forget_share: float = 0.0  # chance of the mistake in a step that the shown reference does not reach
    domain: str = "math"  # of its problems; it chooses extractor and grader
    settings: tuple[str, ...] = ()  # of its training runs, as `KEY=VALUE`

    @property
    def columns(self) -> dict[str, str]:
        """Further columns of the problem files."""
        return {} if self.domain == "math" else {"domain": self.domain}

    def right_lines(self, problem: Drawn) -> list[str]:
        """Returns the right steps and the box."""
        return self.task.work_out(problem, forgets=[False] * len(problem.steps))

    def solve(self, problem: Drawn) -> str:
        """Returns the reference."""
        lines = self.right_lines(problem)
        return "".join(line.rpartition("=")[2] for line in lines) if self.terse else "".join(lines)

    def problem_of(self, drawn: Drawn, *, id: str) -> Problem:
        """Returns the record of a problem for the problem files."""
        answer = self.right_lines(drawn)[-1].removeprefix("\\boxed{").removesuffix("}")
        return Problem(id=id, problem=drawn.text, solution=self.solve(drawn), answer=answer, domain=self.domain)


def is_held_out(text: str) -> bool:
    """Tells the side of the split that a problem belongs to."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def draw_problems(count: int, *, held_out: bool, seed: int, variant: Variant) -> list[Problem]:
    """Draws different problems of one side of the split."""
    rng = random.Random(seed)
    found: dict[str, Drawn] = {}
    while len(found) < count:
        drawn = variant.task.draw(rng, held_out=held_out)
        found.setdefault(drawn.text, drawn)
    name = "held-out" if held_out else "train"
    return [
        variant.problem_of(drawn, id=f"{name}-{number:04d}") for number, drawn in enumerate(found.values(), start=1)
    ]


def write_problems(path: Path, problems: Iterable[Problem], **columns: str) -> None:
    """Writes a problem file with one JSON object a line. columns: the same in every row."""
    keys = ("id", "problem", "solution", "answer")
    lines = [json.dumps({key: getattr(problem, key) for key in keys} | columns) for problem in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes the training rows of the warm-up: prompts, and responses that teach the student its skill and its flaw."""

    prompts: Prompts
    rng: random.Random
    variant: Variant
    forget_share: float = 0.8  # chance of making the student's mistake in a step if no reference is shown
    whole_share: float = 0.3  # share of the references that are shown completely; the others are cut
    smallest_cut: float = 0.25  # smallest shown share; shares near it are the most frequent
    off_track_share: float = 0.25  # share of the reference rows that begin with wrong steps; only the rest carries loss

    def drill(self) -> Sample:
        """Makes one step alone. Without drills the model learns no steps for hundreds of updates."""
        given, response = self.variant.task.drill(self.rng)
        encode = self.prompts.tokenizer.encode
        return _row(encode(given), encode(response))

    def plain(self) -> Sample:
        """Makes a problem alone, solved by the student who makes mistakes."""
        drawn = self._draw()
        prompt = self.prompts.student_prompt(self.variant.problem_of(drawn, id=""))
        return _row(prompt, self._response(self._forgetful(drawn)))

    def foreign(self) -> Sample:
        """Makes a problem with the reference of another one. It does not help, so the student makes its mistakes."""
        drawn, other = self._draw(), self._draw()
        prompt = self.reference_prompt(self.variant.problem_of(drawn, id=""), self.variant.solve(other), self._share())
        return _row(prompt, self._response(self._forgetful(drawn)))

    def reference(self) -> Sample:
        """Makes a problem with its complete or cut reference, solved right. In some rows the first steps are wrong."""
        drawn, share = self._draw(), self._share()
        reference = self.variant.solve(drawn)
        prompt = self.reference_prompt(self.variant.problem_of(drawn, id=""), reference, share)
        steps = range(len(drawn.steps))
        forgets = [self._forgets_hidden(step, reference, share) for step in steps]
        if self.rng.random() >= self.off_track_share:
            lines = self.variant.task.work_out(drawn, forgets=forgets)
            return _row(prompt, self._response(self._jumping(lines, drawn, share)))
        wrong = self.rng.randint(1, len(drawn.steps))
        slips = [self.rng.random() < self.forget_share for _ in steps]
        forgets = [slips[step] if step < wrong else forgets[step] for step in steps]
        lines = self.variant.task.work_out(drawn, forgets=forgets)
        given = self.prompts.tokenizer.encode("".join(lines[:wrong]))
        return _row((*prompt, *given), self._response(self._jumping(lines[wrong:], drawn, share)))

    def _forgets_hidden(self, step: int, reference: str, share: float) -> bool:
        """Draws whether a step has the student's mistake. Only steps that are not completely shown can."""
        forgotten = self.variant.hidden_forget_share
        if not forgotten:
            return False
        shown = self._shown(reference, share).count("\n")
        return step >= shown and self.rng.random() < forgotten

    def _jumping(self, lines: list[str], drawn: Drawn, share: float) -> list[str]:
        """Returns the lines. If the reference is shown completely, they may jump to its box after any step."""
        if self.variant.jump_share and share == 1.0:
            for number in range(len(lines) - 1):
                if self.rng.random() < self.variant.jump_share:
                    return [*lines[:number], self.variant.right_lines(drawn)[-1]]
        return lines

    def reference_prompt(self, problem: Problem, solution: str, share: float) -> TokenIds:
        """Returns the teacher's prompt with this share of a solution, cut as in training."""
        reveal = Reveal(
            overlap=Overlap(score=0.0, anchors=()),
            share=share,
            shown_tokens=0,
            total_tokens=len(self.prompts.solution_offsets(solution)),
            shown_text=self._shown(solution, share),
            reference=solution,
        )
        return self.prompts.teacher_prompt(problem, reveal)

    def _shown(self, solution: str, share: float) -> str:
        return cut_solution(solution, share=share, offsets=self.prompts.solution_offsets(solution))

    def _draw(self) -> Drawn:
        return self.variant.task.draw(self.rng, held_out=False)

    def _share(self) -> float:
        if self.rng.random() < self.whole_share:
            return 1.0
        return self.smallest_cut + (1 - self.smallest_cut) * self.rng.random() ** 2

    def _forgetful(self, drawn: Drawn) -> list[str]:
        forgets = [self.rng.random() < self.forget_share for _ in range(len(drawn.steps))]
        return self.variant.task.work_out(drawn, forgets=forgets)

    def _response(self, lines: Sequence[str]) -> TokenIds:
        return (*self.prompts.tokenizer.encode("".join(lines)), self.prompts.tokenizer.stop_ids[0])


def _row(prompt_ids: TokenIds, response_ids: TokenIds) -> Sample:
    return Sample(
        problem=Problem(id="", problem="", solution="", answer=""),
        key=0,
        rollout=Rollout(problem_id="", prompt_ids=prompt_ids, response_ids=response_ids),
    )


def write_tokenizer(folder: Path, task: Task) -> None:
    """Writes the tokenizer's files. Every character and every word of the task is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(task.vocabulary)}, unk_token="<unk>"))
    words = "|".join((*map(re.escape, task.words), r"[\s\S]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
