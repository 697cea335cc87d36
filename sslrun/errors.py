"""Errors that are reported to the user in one line, without a traceback."""

import errno


class UserError(Exception):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do; the exit code is 2."""

    exit_code = 2


def disk_is_full(error: Exception) -> bool:
    """Whether an error reports a full disk; safetensors, tokenizers and torch have error classes of their own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(
        error
    )
