"""Triton device functions shared by the rules that read class probabilities."""

from __future__ import annotations

from earlyexit_kernels.backends import jit, tl


@jit
def shifted_exp(z, cols, classes):
    """Return ``z - max z`` and its exponential over the classes; the maximum gives 0 even where it is +inf."""
    real = cols < classes
    top = tl.max(tl.where(real, z, -float("inf")), 0)
    d = tl.where(z == top, 0.0, z - top)
    e = tl.where(real, tl.exp(d), 0.0)
    return d, e


@jit
def argmax_lowest(z, cols, classes):
    """Return the index of the largest logit; ties go to the lowest class."""
    real = cols < classes
    top = tl.max(tl.where(real, z, -float("inf")), 0)
    return tl.min(tl.where(real & (z == top), cols, classes), 0)


@jit
def entropy_nats_of(z, cols, classes):
    """Return the entropy of the class probabilities in nats, with 0 log 0 = 0."""
    d, e = shifted_exp(z, cols, classes)
    total = tl.sum(e, 0)
    return tl.log(total) - tl.sum(tl.where(e > 0, e * d, 0.0), 0) / total
