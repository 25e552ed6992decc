"""Deterministic integer hashing on the device."""

from __future__ import annotations

from torch import Tensor

#: Constants of the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers.
_GAMMA = -0x61C8864680B583EB
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_LAST_SHIFT = 31


def scrambled(x: Tensor) -> Tensor:
    """Return the SplitMix64 finaliser of each int64, a bijection that maps neighbours far apart."""
    x = x + _GAMMA
    for shift, factor in _ROUNDS:
        x = (x ^ shifted_right(x, shift)) * factor
    return x ^ shifted_right(x, _LAST_SHIFT)


def shifted_right(x: Tensor, bits: int) -> Tensor:
    """Return `x` shifted to the right logically: zeros are shifted in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def token_keys(ids: Tensor, positions: Tensor) -> Tensor:
    """Return a hash of each token's id and position within its row, all int64; the key of a row is their sum."""
    return scrambled(ids + scrambled(positions))
