"""The Hugging Face hub: one request shows whether it answers, before its client retries for a minute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

#: Longest wait for the hub's first answer.
SECONDS = 5.0


@contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """Put the hub's client in offline mode within the block if the hub does not answer.

    Files downloaded before are still found; anything else fails at once.

    Yields:
        why the hub cannot be reached, or an empty string.
    """
    before, reason = constants.HF_HUB_OFFLINE, unreachable_reason()
    constants.HF_HUB_OFFLINE = before or bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable_reason() -> str:
    """Why the hub cannot be reached, or an empty string; asked once, for at most `SECONDS` seconds."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
        except Exception as error:  # of the HTTP library, which differs between versions of the client
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("" if status < 500 else f"{constants.ENDPOINT} answers with status {status}")

    # in a thread, because the timeout does not cover the look-up of the host's name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else f"no answer from {constants.ENDPOINT} in {SECONDS:g} seconds"
