"""The package's own error classes: each message says what was expected, what came and what to do."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A back-end was asked for by name and cannot run here; the message carries the reason and the cure."""


class AttentionReplacedError(RuntimeError):
    """The backbone's effective attention is not the packed one, so rows of a batch would attend to each other."""


class InvalidLogitsError(RuntimeError):
    """An exit head produced logits without a meaning (NaN, several +inf) while ``strict=True``."""


class MissingHeadsError(RuntimeError):
    """A checkpoint lacks weights of the exit heads, which must never be filled with random numbers silently."""
