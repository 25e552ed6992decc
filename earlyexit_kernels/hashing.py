"""Integer hashing on the device: numbers that look random and depend on their input alone."""

from __future__ import annotations

from torch import Tensor

#: The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its constants as signed 64-bit integers.
_GAMMA = -0x61C8864680B583EB
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_LAST_SHIFT = 31


def scrambled(x: Tensor) -> Tensor:
    """A one-to-one map of int64 onto int64 under which neighbours fall far apart."""
    x = x + _GAMMA
    for shift, factor in _ROUNDS:
        x = (x ^ shifted_right(x, shift)) * factor
    return x ^ shifted_right(x, _LAST_SHIFT)


def shifted_right(x: Tensor, bits: int) -> Tensor:
    """Shift the 64 bits to the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def token_keys(ids: Tensor, places: Tensor) -> Tensor:
    """A number for each token, from its id and its place among its row's tokens, both int64; a row's key is the sum."""
    return scrambled(ids + scrambled(places))
