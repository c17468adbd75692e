"""Prompts and responses as token ids. In training, only this module uses the tokenizer and the chat template.

The wording is that of OPSD's third version (arXiv 2601.18734 and its code). The line that marks a hidden rest is ours,
and so is the wording around a worked example.
Text becomes ids once. A control token that is written in a problem or a solution stays text: its two parts are encoded
separately, so it can neither end a turn nor begin one. Text without control tokens is encoded as usual. A solution that
is a response (SFT) is encoded as the model writes it: <think>, <tool_call> and other added tokens become their ids.
Only special tokens, and tokens that mark turns, stay text there.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_paint.base.errors import UserError
from megatron_paint.data import thoughts
from megatron_paint.data.tokenizers import OffsetList, Tokenizer, read_template
from megatron_paint.data.turns import QUESTION
from megatron_paint.records import Problem, Reveal, TokenIds

if TYPE_CHECKING:
    from megatron_paint.config.settings import PromptSettings

CACHED_SOLUTIONS = 4096
# Code points that Unicode excludes from all text. One that no user text contains marks the seam inside a control token.
_SEAMS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Prompts:
    """Makes every prompt of a run, with one tokenizer and one set of templates.

    Raises UserError for a template that cannot be read, has a mistake, or does not use its variables.
    """

    def __init__(self, settings: "PromptSettings", tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._settings = settings
        self._student = _template("student", settings.student_template, {"problem"}, set())
        self._teacher = _template("teacher", settings.teacher_template, {"problem", "solution"}, {"hidden"})
        example = {"problem", "example_problem", "example_solution"}
        self._example = _template("example", settings.example_template, example, set())
        self._evaluation = _template("evaluation", settings.evaluation_template, {"problem"}, set())
        self.solution_offsets = lru_cache(CACHED_SOLUTIONS)(self._solution_offsets)
        self.prompt_end = cache(self._prompt_end)

    def student_prompt(self, problem: Problem) -> TokenIds:
        """Returns the prompt with the problem alone."""
        return self._chat(self._student, self._settings.student_thinking, problem=problem.problem)

    def teacher_prompt(self, problem: Problem, reveal: Reveal) -> TokenIds:
        """Returns the prompt with the problem and what the reveal shows.

        Without a reference it is the student's prompt. `reference_free`: the student's message, in the teacher's
        thinking mode. `other_example`: a worked example before the problem.
        """
        if reveal.solution == "reference_free":
            return self.problem_alone(problem)
        if reveal.example is not None:
            return self.example_prompt(problem, example=reveal.example, solution=reveal.shown_text)
        if not reveal.reference:
            return self.student_prompt(problem)
        hidden = bool(reveal.reference[len(reveal.shown_text) :].strip())
        return self._teacher_prompt(problem, shown=reveal.shown_text, hidden=hidden)

    def full_teacher_prompt(self, problem: Problem, reveal: Reveal | None = None) -> TokenIds:
        """Returns the prompt with the problem and its complete reference, or the complete reference of a reveal."""
        if reveal is None:
            return self._teacher_prompt(problem, shown=problem.reference, hidden=False)
        return self.teacher_prompt(problem, replace(reveal, shown_text=reveal.reference))

    def problem_alone(self, problem: Problem) -> TokenIds:
        """Returns the student's message in the teacher's thinking mode."""
        return self._chat(self._student, self._settings.teacher_thinking, problem=problem.problem)

    def example_prompt(self, problem: Problem, *, example: str, solution: str) -> TokenIds:
        """Returns the teacher's prompt with another problem and its solution as a worked example, then the problem."""
        thinking = self._settings.teacher_thinking
        texts = {"problem": problem.problem, "example_problem": example, "example_solution": solution}
        return self._chat(self._example, thinking, **texts)

    @property
    def times_shown(self) -> int:
        """Tells how often the teacher's message holds the reference."""
        return _rendered(self._teacher, {"problem": "", "solution": QUESTION}, hidden=True).count(QUESTION)

    def longest_prompt(self, problem: Problem) -> int:
        """Returns the number of tokens of the longest prompt that training can make of a problem and its reference."""
        teacher = self._teacher_prompt(problem, shown=problem.reference, hidden=True)
        return max(len(self.student_prompt(problem)), len(teacher))

    def evaluation_prompt(self, problem: Problem, thinking: bool) -> TokenIds:
        """Returns the prompt in the wording of OPSD's evaluation: the problem without "Problem:"."""
        return self._chat(self._evaluation, thinking, problem=problem.problem)

    def sft_response(self, problem: Problem) -> TokenIds:
        """Returns the solution as a response to the student's prompt. It ends as the chat template ends an answer.

        If the prompt ends inside a thought, the response continues it or closes it (`thoughts.continuation`). Raises
        UserError if the response would end inside a thought.
        """
        if (mistake := self.sft_mistake(problem)) is not None:
            raise UserError(f"{problem.source or problem.id}: {mistake}")
        end = self.prompt_end(self._settings.student_thinking)
        closing, text = thoughts.continuation(end, problem.solution)
        seam = _seam([text])
        tokenizer = self.tokenizer
        tags = {thoughts.THINK_START, thoughts.THINK_END}
        written = [t for t in tokenizer.control_tokens if t in tokenizer.special_tokens | tokenizer.turns.markers]
        text = self._protect(text, seam, [token for token in written if token not in tags])
        return (*self._encode(closing + text + tokenizer.turns.before_end, seam), tokenizer.stop_ids[0])

    def sft_mistake(self, problem: Problem) -> str | None:
        """Returns why the solution cannot be a response, or None."""
        end = self.prompt_end(self._settings.student_thinking)
        if thoughts.continuation(end, problem.solution) is None:
            return (
                f"the solution opens a thought ({thoughts.THINK_START}) and does not close it, so SFT would teach to "
                f"end a turn inside a thought; write {thoughts.THINK_END} where the thought ends"
            )
        return None

    def solution_ids(self, solution: str) -> TokenIds:
        """Returns the tokens of a solution. `solution_offsets` returns their positions in the text."""
        return self.tokenizer.encode_with_offsets(solution)[0]

    def shown_size(self, text: str) -> int:
        """Returns the number of tokens of a text as a prompt shows it: control tokens in it stay text."""
        seam = _seam([text])
        return len(self._encode(self._protect(text, seam, self.tokenizer.control_tokens), seam))

    def response_text(self, ids: TokenIds) -> str:
        """Returns the text of a response without special tokens, and without the token that ends it."""
        ids = ids[:-1] if ids and ids[-1] in self.tokenizer.stop_ids else ids
        return self.tokenizer.decode(ids, keep_special=False)

    @property
    def thinking_has_effect(self) -> bool:
        """Tells whether the chat template renders thinking and non-thinking prompts differently."""
        return self._rendered_question(True) != self._rendered_question(False)

    def _prompt_end(self, thinking: bool) -> str:
        """Returns what the chat template writes after the user's message."""
        return self._rendered_question(thinking).rpartition(QUESTION)[2]

    def _rendered_question(self, thinking: bool) -> str:
        return self.tokenizer.render_chat([{"role": "user", "content": QUESTION}], thinking)

    def _solution_offsets(self, solution: str) -> OffsetList:
        """Returns start and end of each token of a solution, in characters. The masker cuts there."""
        return self.tokenizer.encode_with_offsets(solution)[1]

    def _teacher_prompt(self, problem: Problem, *, shown: str, hidden: bool) -> TokenIds:
        thinking = self._settings.teacher_thinking
        return self._chat(self._teacher, thinking, hidden=hidden, problem=problem.problem, solution=shown)

    def _chat(self, template: jinja2.Template, thinking: bool, *, hidden: bool = False, **texts: str) -> TokenIds:
        seam = _seam(texts.values())
        tokens = self.tokenizer.control_tokens
        protected = {name: self._protect(text, seam, tokens) for name, text in texts.items()}
        content = _rendered(template, protected, hidden=hidden)
        rendered = self.tokenizer.render_chat([{"role": "user", "content": content}], thinking)
        return self._encode(rendered, seam)

    @staticmethod
    def _protect(text: str, seam: str, tokens: Iterable[str]) -> str:
        """Returns the text with a seam inside every one of the tokens that is written in it."""
        for token in tokens:
            while token in text:
                if len(token) < 2:
                    raise UserError(f"a problem or solution contains {token!r}, a control token of the tokenizer")
                text = text.replace(token, token[0] + seam + token[1:])
        return text

    def _encode(self, text: str, seam: str) -> TokenIds:
        return self.tokenizer.encode(*text.split(seam))


def _seam(texts: Collection[str]) -> str:
    """Returns a mark that no text contains."""
    for seam in _SEAMS:
        if not any(seam in text for text in texts):
            return seam
    raise UserError("a problem or solution contains all of U+FDD0 to U+FDEF; these are no characters, so remove them")


def _rendered(template: jinja2.Template, texts: Mapping[str, str], *, hidden: bool) -> str:
    try:
        return template.render(texts, hidden=hidden)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{template.filename}: the template cannot be rendered ({error})") from error


def _template(name: str, path: str | None, needed: set[str], optional: set[str]) -> jinja2.Template:
    setting = f"prompts.{name}_template"
    source = (
        (files("megatron_paint.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        if path is None
        else read_template(path, setting=setting)
    )
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{setting}: {path}:{error.lineno}: {error.message}") from error
    template.filename = path or f"{name}.jinja"
    if missing := needed - variables:
        raise UserError(f"{setting}: {path} does not use {{{{ {missing.pop()} }}}}, so no prompt would contain it")
    if unknown := variables - needed - optional:
        known = ", ".join(sorted(needed | optional))
        raise UserError(f"{setting}: {path} uses the unknown variable {{{{ {unknown.pop()} }}}}; known are {known}")
    return template
