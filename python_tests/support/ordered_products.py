"""Matrix products of Triton's interpreter whose rounding does not depend on their size, as on a GPU."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def products_in_order(monkeypatch) -> None:
    """Replace numpy's matrix product in the interpreter, the rounding of which depends on the number of rows."""

    def matmul(a, b, dtype):
        a, b, sums = a.astype(dtype), b.astype(dtype), np.zeros((len(a), b.shape[1]), dtype)
        for k in range(len(b)):
            sums += a[:, k, None] * b[k]
        return sums

    monkeypatch.setattr(np, "matmul", matmul)
