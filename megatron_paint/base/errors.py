"""The one error that a user can cause; everything else that is raised is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: names the setting, file or record, what it holds, what must hold and what to do.

    The command line prints it as one line and ends with exit code 2, without a traceback.
    """


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Puts the name of the setting that is to blame before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error.__cause__
