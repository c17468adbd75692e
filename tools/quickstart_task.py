"""The quickstart's task: running sums, worked line by line, and a student who forgets to carry.

A problem is a two-digit start and two or three one-digit operands, `47+8-9?`. Every partial result has two digits. The
solution has one line for each step, `47+8=55`, and ends with the box. The student makes a mistake that is common in
arithmetic lessons: if a step crosses a ten, it does not change the tens digit (47+8=45). It calculates right if its
prompt shows a complete or cut reference solution of the same problem. This is the gap between teacher and student.
"""

import json
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.data.prompts import Prompts
from megatron_paint.masker.reveal import cut_solution
from megatron_paint.records import Overlap, Problem, Reveal, Rollout, Sample, TokenIds

HELD_OUT_SHARE = 5  # one in five problems, chosen by checksum, is held out
VOCABULARY = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "\n", "Reference:", "..."),
    *("\\boxed{", "}", "=", "+", "-", "?", *"0123456789"),
)
SPECIAL = VOCABULARY[:4]
VOCABULARY_ROWS = 32  # of the model; enough for 4 tensor-parallel ranks; the last rows have no token, as in Qwen3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningSum:
    """A start in 10..99, and operands with a sign and a size in 1..9."""

    start: int
    operands: tuple[int, ...]

    @property
    def text(self) -> str:
        return f"{self.start}{''.join(f'{operand:+d}' for operand in self.operands)}?"

    @property
    def is_held_out(self) -> bool:
        """Tells the side of the split, which depends only on the text."""
        return zlib.crc32(self.text.encode()) % HELD_OUT_SHARE == 0


def result(value: int, operand: int, *, forgets: bool) -> int:
    """Does one step from a two-digit value to a two-digit value.

    With `forgets`, a step across a ten does not change the tens digit. A step whose result is outside 10..99 never
    changes it. This happens only after a mistake.
    """
    right = value + operand
    if forgets or not 10 <= right <= 99:
        return value // 10 * 10 + right % 10
    return right


def work_out(problem: RunningSum, *, forgets: Sequence[bool]) -> list[str]:
    """Returns the lines of a solution and its box. forgets: for each step, whether its carry is forgotten."""
    lines, value = [], problem.start
    for operand, forgotten in zip(problem.operands, forgets, strict=True):
        after = result(value, operand, forgets=forgotten)
        lines.append(f"{value}{operand:+d}={after}\n")
        value = after
    return [*lines, f"\\boxed{{{value}}}"]


def solve(problem: RunningSum) -> str:
    """Returns the right solution."""
    return "".join(work_out(problem, forgets=[False] * len(problem.operands)))


def solve_tersely(problem: RunningSum) -> str:
    """Returns the right solution with results alone. The student cannot calculate in this style."""
    return "".join(line.rpartition("=")[2] for line in work_out(problem, forgets=[False] * len(problem.operands)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A kind of teacher: the style of its references, and how the model uses a shown reference."""

    terse: bool = False  # references have results alone
    jump_share: float = 0.0  # chance at each step that a model that sees the box writes the box at once
    hidden_forget_share: float = 0.0  # chance of forgetting a carry in a step that the shown reference does not reach

    def solve(self, problem: RunningSum) -> str:
        """Returns the reference."""
        return solve_tersely(problem) if self.terse else solve(problem)


VARIANTS = {
    "own": Variant(),
    "terse": Variant(terse=True),
    "leaky": Variant(jump_share=0.3),
    "weak": Variant(hidden_forget_share=0.5),
}


def draw_sum(rng: random.Random, *, held_out: bool) -> RunningSum:
    """Draws a problem of one side of the split. Every right partial result is in 10..99."""
    while True:
        operands = tuple(rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(rng.randint(2, 3)))
        drawn = RunningSum(start=rng.randint(10, 99), operands=operands)
        partial = [drawn.start + sum(operands[: n + 1]) for n in range(len(operands))]
        if drawn.is_held_out == held_out and all(10 <= value <= 99 for value in partial):
            return drawn


def problem_of(drawn: RunningSum, *, id: str, variant: Variant = VARIANTS["own"]) -> Problem:
    """Returns the record of a problem for the problem files."""
    answer = str(drawn.start + sum(drawn.operands))
    return Problem(id=id, problem=drawn.text, solution=variant.solve(drawn), answer=answer)


def draw_problems(count: int, *, held_out: bool, seed: int, variant: Variant = VARIANTS["own"]) -> list[Problem]:
    """Draws different problems of one side of the split."""
    rng = random.Random(seed)
    found: dict[str, RunningSum] = {}
    while len(found) < count:
        drawn = draw_sum(rng, held_out=held_out)
        found.setdefault(drawn.text, drawn)
    name = "held-out" if held_out else "train"
    return [
        problem_of(drawn, id=f"{name}-{number:04d}", variant=variant)
        for number, drawn in enumerate(found.values(), start=1)
    ]


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Writes a problem file with one JSON object a line."""
    keys = ("id", "problem", "solution", "answer")
    lines = [json.dumps({key: getattr(problem, key) for key in keys}) for problem in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes the training rows of the warm-up: prompts, and responses that teach the student its skill and its flaw."""

    prompts: Prompts
    rng: random.Random
    variant: Variant = VARIANTS["own"]
    forget_share: float = 0.8  # chance of forgetting a carry if no reference of the problem is shown
    whole_share: float = 0.3  # share of the references that are shown completely; the others are cut
    smallest_cut: float = 0.25  # smallest shown share; shares near it are the most frequent
    off_track_share: float = 0.25  # share of the reference rows that begin with wrong steps; only the rest carries loss

    def drill(self) -> Sample:
        """Makes one step alone, `47+8=` -> `55`. Without drills the model learns no sums for hundreds of steps."""
        value, operand = self.rng.randint(10, 99), self.rng.choice((1, -1)) * self.rng.randint(1, 9)
        while not 10 <= value + operand <= 99:
            value, operand = self.rng.randint(10, 99), self.rng.choice((1, -1)) * self.rng.randint(1, 9)
        encode = self.prompts.tokenizer.encode
        return _row(encode(f"{value}{operand:+d}="), encode(str(value + operand)))

    def plain(self) -> Sample:
        """Makes a problem alone, solved by the student who forgets."""
        drawn = self._draw()
        return _row(self.prompts.student_prompt(problem_of(drawn, id="")), self._response(self._forgetful(drawn)))

    def foreign(self) -> Sample:
        """Makes a problem with the reference of another one. It does not help, so the student forgets."""
        drawn, other = self._draw(), self._draw()
        prompt = self.reference_prompt(problem_of(drawn, id=""), self.variant.solve(other), self._share())
        return _row(prompt, self._response(self._forgetful(drawn)))

    def reference(self) -> Sample:
        """Makes a problem with its complete or cut reference, solved right. In some rows the first steps are wrong."""
        drawn, share = self._draw(), self._share()
        reference = self.variant.solve(drawn)
        prompt = self.reference_prompt(problem_of(drawn, id=""), reference, share)
        steps = range(len(drawn.operands))
        forgets = [self._forgets_hidden(step, reference, share) for step in steps]
        if self.rng.random() >= self.off_track_share:
            return _row(prompt, self._response(self._jumping(work_out(drawn, forgets=forgets), drawn, share)))
        wrong = self.rng.randint(1, len(drawn.operands))
        slips = [self.rng.random() < self.forget_share for _ in steps]
        forgets = [slips[step] if step < wrong else forgets[step] for step in steps]
        lines = work_out(drawn, forgets=forgets)
        given = self.prompts.tokenizer.encode("".join(lines[:wrong]))
        return _row((*prompt, *given), self._response(self._jumping(lines[wrong:], drawn, share)))

    def _forgets_hidden(self, step: int, reference: str, share: float) -> bool:
        """Draws whether a step forgets its carry. Only steps that are not completely shown can."""
        forgotten = self.variant.hidden_forget_share
        if not forgotten:
            return False
        shown = self._shown(reference, share).count("\n")
        return step >= shown and self.rng.random() < forgotten

    def _jumping(self, lines: list[str], drawn: RunningSum, share: float) -> list[str]:
        """Returns the lines. If the reference is shown completely, they may jump to its box after any step."""
        if self.variant.jump_share and share == 1.0:
            for number in range(len(lines) - 1):
                if self.rng.random() < self.variant.jump_share:
                    return [*lines[:number], work_out(drawn, forgets=[False] * len(drawn.operands))[-1]]
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

    def _draw(self) -> RunningSum:
        return draw_sum(self.rng, held_out=False)

    def _share(self) -> float:
        if self.rng.random() < self.whole_share:
            return 1.0
        return self.smallest_cut + (1 - self.smallest_cut) * self.rng.random() ** 2

    def _forgetful(self, drawn: RunningSum) -> list[str]:
        return work_out(drawn, forgets=[self.rng.random() < self.forget_share for _ in drawn.operands])

    def _response(self, lines: Sequence[str]) -> TokenIds:
        return (*self.prompts.tokenizer.encode("".join(lines)), self.prompts.tokenizer.stop_ids[0])


def _row(prompt_ids: TokenIds, response_ids: TokenIds) -> Sample:
    return Sample(
        problem=Problem(id="", problem="", solution="", answer=""),
        key=0,
        rollout=Rollout(problem_id="", prompt_ids=prompt_ids, response_ids=response_ids),
    )


def write_tokenizer(folder: Path) -> None:
    """Writes the tokenizer's files. Every character and every word of the prompts is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words = r"\\boxed\{|Reference:|user|assistant|\.\.\.|[\s\S]"
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
