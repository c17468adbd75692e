"""The quickstart's task: running sums, worked line by line, and a student who forgets to carry.

A problem is a two-digit start and two or three one-digit operands, `47+8-9?`. Every partial result has two digits. The
solution has one line for each step, `47+8=55`, and ends with the box. The student makes a mistake that is common in
arithmetic lessons: if a step crosses a ten, it does not change the tens digit (47+8=45). It calculates right if its
prompt shows a complete or cut reference solution of the same problem. This is the gap between teacher and student.
"""

import random
from dataclasses import dataclass

from warm_up_rows import Task, is_held_out

VOCABULARY = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "\n", "Reference:", "..."),
    *("\\boxed{", "}", "=", "+", "-", "?", *"0123456789"),
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
        return is_held_out(self.text)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.operands


def result(value: int, operand: int, *, forgets: bool) -> int:
    """Does one step from a two-digit value to a two-digit value.

    With `forgets`, a step across a ten does not change the tens digit. A step whose result is outside 10..99 never
    changes it. This happens only after a mistake.
    """
    right = value + operand
    if forgets or not 10 <= right <= 99:
        return value // 10 * 10 + right % 10
    return right


class RunningSums(Task):
    """The task of running sums. A step is an operand."""

    vocabulary = VOCABULARY

    def draw(self, rng: random.Random, *, held_out: bool) -> RunningSum:
        """Draws a problem of one side of the split. Every right partial result is in 10..99."""
        while True:
            operands = tuple(rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(rng.randint(2, 3)))
            drawn = RunningSum(start=rng.randint(10, 99), operands=operands)
            partial = [drawn.start + sum(operands[: n + 1]) for n in range(len(operands))]
            if drawn.is_held_out == held_out and all(10 <= value <= 99 for value in partial):
                return drawn

    def draw_step(self, rng: random.Random) -> tuple[int, int]:
        while True:
            value, operand = rng.randint(10, 99), rng.choice((1, -1)) * rng.randint(1, 9)
            if 10 <= value + operand <= 99:
                return value, operand

    def apply(self, value: int, step: int, *, forgets: bool) -> int:
        return result(value, step, forgets=forgets)

    def step_text(self, value: int, step: int) -> str:
        return f"{value}{step:+d}"
