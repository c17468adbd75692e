"""A task without arithmetic: strings that are rewritten step by step, and a student who forgets an exception.

A problem is a string of three letters and three rules, `abc:rotl,rev,rotr?`. `rotl` and `rotr` move each letter one
place, `rev` turns the string round. Then comes the exception: if the result begins with a vowel, its last two letters
change places. The student forgets the exception. A line is one call, `rotl(abc)=bca`, so that the extractor of anchors
for code finds the calls and the strings that the problem does not name.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from warm_up_rows import SPECIAL, WORDS, Task, is_held_out

LETTERS, VOWELS, SIZE = "abcdefghiouy", "aeiouy", 3
RULES_OF_A_PROBLEM = 3
RULES = {
    "rotl": lambda text: text[1:] + text[0],
    "rotr": lambda text: text[-1] + text[:-1],
    "rev": lambda text: text[::-1],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewriting:
    """A string, and the rules that are applied to it in turn."""

    start: str
    rules: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.start}:{','.join(self.rules)}?"

    @property
    def steps(self) -> tuple[str, ...]:
        return self.rules


def rewrite(text: str, rule: str, *, forgets: bool) -> str:
    """Applies a rule. forgets: without the exception for results that begin with a vowel."""
    after = RULES[rule](text)
    return after if forgets or after[0] not in VOWELS else after[:-2] + after[-1] + after[-2]


class StringRewriting(Task):
    """The task of strings. A step is a rule."""

    words = (*WORDS, *RULES)
    layers = 3
    # The model cannot tell whether a partial reference belongs to the problem. It guesses by the share of foreign rows
    # among the rows with a reference. With the share that sums have, it ignores too many right references.
    mixture: Mapping[str, int] = {"plain": 24, "reference": 92, "foreign": 12, "drill": 16}
    vocabulary = (*SPECIAL, *("user", "assistant", "\n", "Reference:", "..."), *"=(),:?}", "\\boxed{", *RULES, *LETTERS)

    def draw(self, rng: random.Random, *, held_out: bool) -> Rewriting:
        while True:
            start = "".join(rng.choices(LETTERS, k=SIZE))
            drawn = Rewriting(start=start, rules=tuple(rng.choices(tuple(RULES), k=RULES_OF_A_PROBLEM)))
            if is_held_out(drawn.text) == held_out:
                return drawn

    def draw_step(self, rng: random.Random) -> tuple[str, str]:
        return "".join(rng.choices(LETTERS, k=SIZE)), rng.choice(tuple(RULES))

    def apply(self, value: str, step: str, *, forgets: bool) -> str:
        return rewrite(value, step, forgets=forgets)

    def step_text(self, value: str, step: str) -> str:
        return f"{step}({value})"
