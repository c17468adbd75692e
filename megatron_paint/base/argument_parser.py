"""The argument parser of every command."""

import argparse
from typing import NoReturn

from megatron_paint.base.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a wrong command line, so that it is printed in one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
