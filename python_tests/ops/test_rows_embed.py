"""rows_embed beside the modules of torch, and indices that a table does not have."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels import ops

EPS = 1e-12
on_both = pytest.mark.parametrize("backend", backend_params(("torch", "triton")))


def embedded(tokens, tables, norm, backend) -> torch.Tensor:
    """Embed all tokens ``[4, T]`` without the checks of the public function, into a buffer of NaN."""
    count, width = tokens.shape[1], tables[0].shape[1]
    offsets, out = torch.tensor([3, 3 + count], dtype=torch.int32), torch.full((count, width), torch.nan)
    ops.bare_op("rows_embed", backend, "cpu")(tokens, *tables, *norm, EPS, offsets, out)
    return out


@pytest.mark.parametrize("width", [1, 3, 128, 384, 768, 1000, 4096])
@on_both
def test_widths(backend, width):
    """Large values, so that their mean and variance lose digits if they are not summed well."""
    tables = [3 + torch.randn(size, width) for size in (50, 20, 2)]
    norm, indices = (torch.randn(width), torch.randn(width)), [torch.randint(0, len(t), (4,)) for t in tables]
    out = embedded(torch.stack((*indices, torch.zeros(4).long())), tables, norm, backend)
    total = sum(table.double()[index] for table, index in zip(tables, indices, strict=True))
    want = torch.nn.functional.layer_norm(total, (width,), *(x.double() for x in norm), EPS)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("index", [-1, -(2**40), 2, 2**40])
@pytest.mark.parametrize("table", [0, 1, 2])
@on_both
def test_a_token_that_a_table_does_not_have_is_nan(backend, table, index):
    """As on a GPU, where reading the indices would synchronise; other tokens do not notice."""
    tokens, tables, norm = torch.zeros(4, 3).long(), [torch.randn(2, 24) for _ in range(3)], torch.randn(2, 24)
    clean = embedded(tokens, tables, norm, backend)
    tokens[table, 1] = index
    out = embedded(tokens, tables, norm, backend)
    assert out[1].isnan().all() and not clean.isnan().any() and torch.equal(out[::2], clean[::2])
    tokens[:] = index
    tokens[0], tables[1], tables[2] = 0, None, None
    assert not embedded(tokens, tables, norm, backend).isnan().any(), "tables that are not there are not read"
