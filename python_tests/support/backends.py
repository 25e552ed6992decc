"""The back-ends of the ops as parameters of tests."""

from __future__ import annotations

import pytest

from earlyexit_kernels.backends import BACKENDS, available_backends


def backend_params(names=BACKENDS) -> list:
    """Parameters for the back-ends; one that can't run here is skipped with the reason the package gives.

    Triton carries its own mark: it runs on the CPU under its interpreter only, in a second pass of the suite.
    """
    reasons = available_backends("cpu")
    params = []
    for name in names:
        marks = [pytest.mark.skipif(bool(reasons[name]), reason=f"{name}: {reasons[name]}")]
        marks += [pytest.mark.triton] if name == "triton" else []
        params.append(pytest.param(name, marks=marks))
    return params
