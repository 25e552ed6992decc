"""The ways to run the layers of a model: the family's own, fused ones (CPU), captured ones (CUDA)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from earlyexit_kernels.core.encoder import Encoder, family_encoder
from earlyexit_kernels.core.loop import Pass
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.errors import BackendUnavailableError

#: Reason of a choice that the user made.
REQUESTED = "it was requested"


class Found(NamedTuple):
    """How the layers of a path would run.

    Attributes:
        reason: to take the path.
        products: what computes the matrix products of fused layers: ``"avx512"`` or ``"avx2"`` (the vector kernels of
            the package), ``"onednn"`` or ``"torch"``; None for other layers.
        why: the reason for these products.
        weights: type in which fused layers store their weights, such as ``"float32"``; None for other layers.
    """

    reason: str
    products: str | None = None
    why: str = ""
    weights: str | None = None


class Path(Protocol):
    """A way to run the layers of a model in eval mode."""

    name: str

    def check(self, view: View) -> Found:
        """Return how the layers would run; packs and captures nothing.

        Raises:
            Unsupported: they cannot; the message says why.
        """

    def encoder(self, view: View) -> Encoder:
        """Return what embeds and runs all rows, as for a trace; raises as `check`."""

    def begin(self, view: View, inputs: Inputs) -> Pass:
        """Return the pass of a batch of at least one row; raises as `check`."""


class Eager:
    """The layers of the family, called one by one; a `Path` that any model has."""

    name = "eager"

    def check(self, view: View) -> Found:
        """Return how the layers run."""
        return Found("they run anywhere")

    def encoder(self, view: View) -> Encoder:
        """Return the modules of the family."""
        return family_encoder(view)

    def begin(self, view: View, inputs: Inputs) -> Pass:
        """Return the pass of a batch."""
        return Pass(view, family_encoder(view), inputs)


def refusal(view: View, reason: str) -> BackendUnavailableError:
    """Return the error that says why the path that was asked for cannot run."""
    narrow = "" if view.settings.weights == "float32" else "weights='float32', or path "
    return BackendUnavailableError(
        f"path {view.settings.path!r} cannot run here: {reason}; use {narrow}'auto' or 'eager'"
    )


class Explanation(NamedTuple):
    """How a model would run a batch.

    Attributes:
        path: ``"eager"``, ``"fused"`` or ``"captured"``.
        reason: for the path, or against the ones before it.
        products: what computes the matrix products of fused layers, as `Found.products`.
        why: the reason for these products.
        weights: type in which fused layers store their weights, or None.
        backend: of the exits.
    """

    path: str
    reason: str
    backend: str
    products: str | None = None
    why: str = ""
    weights: str | None = None

    def __str__(self) -> str:
        lines = [f"path {self.path!r}: {self.reason}"]
        if self.products is not None:
            lines += [f"products of the layers {self.products!r}: {self.why}", f"weights stored in {self.weights!r}"]
        return "\n".join([*lines, f"back-end of the exits {self.backend!r}"])
