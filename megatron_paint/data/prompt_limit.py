"""How long the prompts of a problem may be, and the error if they are longer."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_paint.records import Problem


@dataclass(frozen=True, kw_only=True)
class PromptLimit:
    """How long a problem's prompts may be: the tokens that a row may have, less those of a response."""

    length: Callable[[Problem], int]  # returns the tokens of a problem's longest prompt, without responses in it
    positions: int  # of the model
    max_tokens: int | None = None  # data.max_tokens
    response: int = 0  # most tokens of a response that follows the prompt
    setting: str = ""  # the key of the setting with `response`
    shown: int = 0  # responses that the prompt holds

    @property
    def row_tokens(self) -> int:
        """The most tokens of a prompt with its responses."""
        return self.max_tokens if self._is_set else self.positions

    @property
    def _is_set(self) -> bool:
        """Whether data.max_tokens is the limit, and not the model's positions."""
        return self.max_tokens is not None and self.max_tokens < self.positions

    @property
    def most(self) -> int:
        """The most tokens of a prompt, without responses in it."""
        return self.row_tokens - self.response * (1 + self.shown)

    def longest_response(self, length: int) -> int:
        """The most tokens that a response may have after a prompt of so many tokens."""
        return (self.row_tokens - length) // (1 + self.shown)

    @property
    def positions_text(self) -> str:
        """The part of an error that names the limit."""
        return f"data.max_tokens is {self.max_tokens}" if self._is_set else f"the model has {self.positions} positions"

    def raised_text(self, needed: int) -> str:
        """What an error advises on data.max_tokens; empty if it is not the limit, or if the model has no room."""
        can_rise = self._is_set and needed <= self.positions
        return f"data.max_tokens to at least {needed}" if can_rise else ""

    @property
    def shown_text(self) -> str:
        """The part of an error that tells that responses are shown."""
        return ", without the response that it shows" if self.shown else ""

    def message(self, length: int, *, source: str, where: str) -> str:
        """The error if the longest prompt leaves too few positions for the response, which is the setting's fault."""
        raised = self.raised_text(length + self.response * (1 + self.shown))
        return (
            f"{self.setting}={self.response} is too large: the longest prompt of {source} has {length} tokens ({where})"
            f"{self.shown_text}, and {self.positions_text}; set {self.setting} to at most "
            f"{self.longest_response(length)}{raised and f', or {raised}'}"
        )
