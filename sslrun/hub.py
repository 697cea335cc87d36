"""The Hugging Face hub: check whether it can be reached before a library tries.

Libraries retry for half a minute; this check takes a few seconds.
"""

from __future__ import annotations

import sys
import threading
import urllib.error
import urllib.request

NAME = r"\w[\w.-]*"
"""Pattern of an owner, or of what is theirs, on the hub; no path such as "..", which libraries
would take for a folder of this machine."""
PATIENCE = 4.0
"""Seconds to wait for an answer from the hub."""


def reach_hub() -> bool:
    """Return whether the hub can be reached; if not, switch its libraries to offline mode.

    The libraries are huggingface_hub, tokenizers, transformers and datasets. Otherwise they would
    retry for half a minute and print messages.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE and "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # a copy of the constant
    return not constants.HF_HUB_OFFLINE


def answers(url: str) -> bool:
    """Return whether `url` gives any answer within `PATIENCE` seconds.

    The request runs in a thread, because a resolver or a proxy may exceed the request's timeout.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=PATIENCE
            ).close()
        except urllib.error.HTTPError:
            pass  # an error status is an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()
