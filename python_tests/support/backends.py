"""The back-ends of the ops as parameters of tests."""

from __future__ import annotations

import pytest

from earlyexit_kernels.backends import BACKENDS, available_backends


def backend_params(names=BACKENDS) -> list:
    """Return test parameters for the back-ends; missing ones are skipped with the reason from the package.

    Triton has its own mark: on CPU it runs only with its interpreter, in a second pass of the suite.
    """
    reasons = available_backends("cpu")
    params = []
    for name in names:
        reason = missing_reason(reasons[name])
        marks = [pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}")]
        marks += [pytest.mark.triton] if name == "triton" else []
        params.append(pytest.param(name, marks=marks))
    return params


def missing_reason(reason: str) -> str:
    """Return why a back-end is missing; one that is there and fails its self-test fails its tests too."""
    return "" if reason.startswith("its self-test failed") else reason
