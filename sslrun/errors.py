"""Errors that the user sees as one line, without a traceback."""

import errno


class UserError(Exception):
    """A mistake that the user can correct; the command exits with code 2.

    The message says what is wrong, where, and what to do. Characters that a terminal would obey,
    which it may quote from a file, are escaped.
    """

    exit_code = 2

    def __str__(self) -> str:
        return "".join(map(_escaped, super().__str__()))


def _escaped(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode()


def describe_os_error(error: OSError) -> str:
    """Describe in one line a file that cannot be read or written, or that vanished."""
    place = error.filename if error.filename is not None else "a file"
    cause = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{place}: {cause}; check that it is there and that you may read and write it"


def disk_is_full(error: Exception) -> bool:
    """Return whether an error reports a full disk.

    safetensors, tokenizers and torch raise their own classes, which only the message identifies.
    """
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
