"""The errors that are told to the user in one line, without a traceback."""

import errno


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do; the exit code is 2."""

    exit_code = 2


def disk_is_full(error: Exception) -> bool:
    """Whether that is what it reports; safetensors, tokenizers and torch do so in errors of their own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
