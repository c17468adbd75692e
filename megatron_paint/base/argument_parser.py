"""The argument parser of every command."""

import argparse
from typing import NoReturn

from megatron_paint.base.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
