"""resident_exit against exit_step, compact and gather_rows."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.backends import backend_params
from support.compaction_cases import PATTERNS

from earlyexit_kernels.criteria import Entropy, Patience
from earlyexit_kernels.ops import bare_op, exit_step, resident_exit

WIDTH, CLASSES, DEAD = 8, 3, -777


@pytest.fixture(params=backend_params(("torch", "triton")))
def backend(request) -> str:
    return request.param


def resident(rows: int, present: int, side: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A buffer with `present` rows of different lengths on one side, every third of which has left; the rest is NaN."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.zeros(rows, dtype=torch.int64)
    lengths[:present] = torch.randint(1, 6, (present,), generator=g)
    capacity = 6 * rows
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    offsets += side * capacity
    row_ids = torch.full((rows,), -1, dtype=torch.int32)
    row_ids[:present] = torch.randperm(present, generator=g).to(torch.int32)
    row_ids[1:present:3] = -1
    hidden = torch.full((2 * capacity, WIDTH), torch.nan)
    hidden[offsets[0] : offsets[-1]] = torch.randn(int(lengths.sum()), WIDTH, generator=g)
    return {
        "hidden": hidden,
        "weight": torch.randn(CLASSES, WIDTH, generator=g),
        "bias": torch.randn(CLASSES, generator=g),
        "row_ids": row_ids,
        "offsets": offsets,
        "old_offsets": torch.full_like(offsets, DEAD),
        "source": torch.full_like(row_ids, DEAD),
        "counts": torch.tensor([DEAD] * 4 + [0] * 4, dtype=torch.int32),
        "answers": torch.zeros(rows, CLASSES),
        "exit_layer": torch.zeros(rows, dtype=torch.int64),
    }


def leave(x, backend, rule, *, tile=1, capacity=None, layer=1, depth=3, pooling="first", handle=None):
    """Run the op on a clone of `x`, and return the clone with the state."""
    x = {name: tensor.clone() for name, tensor in x.items()}
    capacity = x["hidden"].shape[0] // 2 if capacity is None else capacity
    x["state"] = rule.new_state(x["answers"].shape[0], x["answers"].device, CLASSES)
    resident_exit(
        **x, criterion=rule, layer=layer, depth=depth, pooling=pooling, tile=tile, capacity=capacity, handle=handle,
        backend=backend,
    )  # fmt: skip
    return x


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("rows", "present"), [(1, 1), (4, 3), (37, 37), (64, 40)])
def test_equals_exit_step_and_compact(backend, rows, present, side, pooling):
    rule, x = Entropy(threshold=0.8), resident(rows, present, side)
    found = leave(x, backend, rule, pooling=pooling)
    row_ids, state = x["row_ids"].clone(), found["state"].clone()
    answers, exit_layer = x["answers"].clone(), x["exit_layer"].clone()
    relative = x["offsets"] - x["offsets"][0]
    live_side = x["hidden"][x["offsets"][0] : x["offsets"][-1]]
    counts = exit_step(
        criterion=rule, layer=1, depth=3, row_ids=row_ids, state=state, answers=answers, exit_layer=exit_layer,
        hidden=live_side, offsets=relative, weight=x["weight"], bias=x["bias"], pooling=pooling, backend="torch",
    )  # fmt: skip
    torch.testing.assert_close(found["answers"], answers, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["exit_layer"], exit_layer)
    assert found["counts"][:3].tolist() == counts.tolist()
    before = int(relative[-1])
    ids, ends, source = oracle.compact(row_ids.tolist(), relative.tolist())
    if int(counts[1]) < before:
        base = 0 if side else 6 * rows
        assert found["row_ids"].tolist() == ids and found["source"].tolist() == source
        assert found["offsets"].tolist() == [base + end for end in ends]
        assert torch.equal(found["old_offsets"], x["offsets"])
        assert found["counts"][3] == counts[1]
    else:
        assert torch.equal(found["row_ids"], row_ids) and torch.equal(found["offsets"], x["offsets"])
        assert found["source"].tolist() == [-1] * rows and found["counts"][3] == before


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_move_only_if_tiles_are_saved(backend, pattern):
    x = resident(33, 33, 0)
    x["row_ids"] = torch.arange(33, dtype=torch.int32).masked_fill(~PATTERNS[pattern](33), -1)
    lengths, live = x["offsets"].diff(), x["row_ids"] >= 0
    tokens, total = int(lengths[live].sum()), int(lengths.sum())
    for tile in (1, 7, 32, 1000):
        found = leave(x, backend, Patience(patience=2), tile=tile)
        moved = -(-tokens // tile) < -(-total // tile)
        assert (int(found["offsets"][0]) != 0) == moved
        counts = [int(live.sum()), tokens, 0, tokens if moved else total]
        assert found["counts"].tolist() == [*counts, int(live.any()), 0, 0, 0]


def test_rows_move_to_the_other_side_and_back(backend):
    x = resident(9, 9, 0)
    rule = Patience(patience=5)
    for layer in (1, 2):
        before = x
        x = leave(x, backend, rule, layer=layer)
        hidden = x["hidden"].clone()
        bare_op("gather_rows", backend, "cpu")(hidden, x["old_offsets"], x["source"], x["offsets"], hidden)
        for row in range(int(x["counts"][0])):
            old = int(x["source"][row])
            mine = before["hidden"][before["offsets"][old] : before["offsets"][old + 1]]
            assert torch.equal(hidden[x["offsets"][row] : x["offsets"][row + 1]], mine)
        x["hidden"] = hidden
        x["row_ids"][0] = -1
    assert int(x["offsets"][0]) == 0


def test_invalid_rows_are_counted_and_stay(backend):
    x = resident(6, 6, 1)
    row = next(i for i in range(6) if x["row_ids"][i] >= 0)
    x["hidden"][x["offsets"][row]] = torch.nan
    found = leave(x, backend, Entropy(threshold=5.0))
    assert found["counts"].tolist()[:3] == [1, int(x["offsets"].diff()[row]), 1]
    assert found["row_ids"].tolist()[0] == x["row_ids"][row]


def test_all_rows_leave(backend):
    found = leave(resident(5, 4, 0), backend, Entropy(threshold=5.0))
    assert found["counts"].tolist() == [0] * 8
    assert found["row_ids"].tolist() == found["source"].tolist() == [-1] * 5
    assert found["offsets"].tolist() == [30] * 6


def test_handle_requires_the_compiled_op(backend):
    with pytest.raises(ValueError, match="only back-end 'cpp' sets a graph's handle, got 7"):
        leave(resident(2, 2, 0), backend, Entropy(threshold=0.5), handle=7)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"tile": 24, "capacity": 11}, r"expected hidden of shape \[22, '\*'\], got \[24, 8\]"),
        ({"tile": 0}, "expected capacity >= 0 and tile >= 1 token, got 12 and 0"),
    ],
    ids=["capacity", "tile"],
)
def test_invalid_numbers_are_refused(backend, numbers, message):
    with pytest.raises(ValueError, match=f"resident_exit: {message}"):
        leave(resident(2, 2, 0), backend, Entropy(threshold=0.5), **numbers)
