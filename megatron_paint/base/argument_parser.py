"""The argument parser of every command."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_paint.base.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a wrong command line, so that it is printed in one line like every other error.

    A wrong command or choice gets the nearest right one. `options.parser` is the parser of the command that was given.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(*values, **named)
        self.set_defaults(parser=self)  # that of a command replaces the one above it

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        name = "/".join(action.option_strings) or "command"
        known = list(map(str, action.choices))
        near = did_you_mean(str(value), known) or f"choose from {', '.join(known)}"
        self.error(f"unknown {name} {str(value)!r}: {near}")

    def nearest_option(self, argument: str) -> str:
        """A question that suggests the nearest option, or for --KEY=VALUE the setting; "" if no option is near."""
        name, equals, value = argument.partition("=")
        if equals and "." in name:  # --optimizer.lr=1e-5
            return f"did you mean {name.lstrip('-')}={value}?"
        return did_you_mean(name, self._option_string_actions)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the known word that is nearest to a wrong one; "" if none is near."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.65)
    return f"did you mean {close[0]}?" if close else ""
