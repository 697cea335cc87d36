"""The errors that are told to the user in one line, without a traceback."""


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do; the exit code is 2."""

    exit_code = 2
