"""Find out with one request whether the Hugging Face hub answers, before its client retries for a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

#: Maximum wait for the answer of the hub, in seconds.
TIMEOUT = 5.0


def unreachable_reason() -> str:
    """Ask the hub once, for at most `TIMEOUT` seconds; return why it cannot be reached, or an empty string."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=TIMEOUT).status_code
        except Exception as error:  # of the HTTP library, which differs between versions of the client
            answers.append(f"{type(error).__name__}: {error}")
        else:
            answers.append("" if status < 500 else f"{constants.ENDPOINT} answers with status {status}")

    # in a thread, because the timeout does not cover the look-up of the host name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return answers[0] if answers else f"no answer from {constants.ENDPOINT} in {TIMEOUT:g} seconds"


@contextmanager
def offline_if_unreachable(ask_hub: Callable[[], str] | None = None) -> Iterator[str]:
    """Put the hub's client in offline mode within the block if the hub does not answer.

    Files that were downloaded before are still found; everything else fails at once.

    Args:
        ask_hub: returns why the hub cannot be reached, or an empty string (default: `unreachable_reason`; cached, it
            asks once for several blocks).

    Yields:
        why the hub cannot be reached, or an empty string.
    """
    before, reason = constants.HF_HUB_OFFLINE, (ask_hub or unreachable_reason)()
    constants.HF_HUB_OFFLINE = before or bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before
