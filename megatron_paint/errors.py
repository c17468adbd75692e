"""The one error that a user can cause; everything else that is raised is a bug."""


class UserError(ValueError):
    """Bad input: names the setting, file or record, what it holds, what must hold and what to do.

    The command line prints it as one line and ends with exit code 2, without a traceback.
    """
