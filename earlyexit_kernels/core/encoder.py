"""The encoder of a pass: what embeds the packed tokens, and the layers that run on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from earlyexit_kernels.core.view import View

#: ``(ids, positions, types) ->`` the input of layer 1, ``[1, T, H]``; arguments ``[1, T]`` int64.
Embed = Callable[[Tensor, Tensor, Tensor], Tensor]


class Encoder(NamedTuple):
    """What runs before the exits.

    Attributes:
        embed: computes the input of layer 1.
        layers: L callables ``layer(hidden, plan=...)``.
    """

    embed: Embed
    layers: Sequence[Callable[..., Any]]


def family_encoder(view: View) -> Encoder:
    """Return the encoder that consists of the modules of the family."""
    return Encoder(functools.partial(view.adapter.first_states, view.backbone), view.layers)
