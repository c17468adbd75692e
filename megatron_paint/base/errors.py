"""The one error that a user can cause. Every other exception is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message names the setting, file or record, its value, what is allowed and what to do.

    The command line prints it as one line without a traceback. The exit code is then 2.
    """


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Puts the name of the setting at fault in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{setting}: {error}") from error.__cause__
