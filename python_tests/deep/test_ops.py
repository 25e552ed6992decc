"""Valid calls of `exit_step`, `compact` and `gather_rows` on every back-end, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle

from deep.op_calls import BACK_ENDS, WRITTEN, batches, check_exit_step, compactions, moves
from earlyexit_kernels import ops


@given(batches(), st.data())
def test_exit_step_at_all_layers(batch, data):
    """Each back-end starts a layer from the same buffers; the next layer continues with the results of one."""
    for layer in range(1, len(batch.layers) + 1):
        before, results = batch.arguments(layer), {}
        for backend in BACK_ENDS:
            after = batch.arguments(layer)
            counts = ops.exit_step(**after, backend=backend)
            check_exit_step(batch.rule, before, after, counts, f"exit_step on {backend}, layer {layer}")
            results[backend] = after
        present = np.flatnonzero(before["row_ids"].numpy() >= 0)
        if len(present) > 1:
            check_alone(before, results, data.draw(st.sampled_from(present.tolist()), label="row"))
        batch.take(results[data.draw(st.sampled_from(BACK_ENDS), label="continue with")])


def check_alone(before: dict, results: dict, row: int) -> None:
    """Fail if the bits of a row are others without the other rows of its batch."""
    alone = {name: before[name][row : row + 1] for name in ("row_ids", "logits", "aux") if name in before}
    if "offsets" in before:
        alone["offsets"] = before["offsets"][row : row + 2]
    if "hidden" in before and (before["pooling"] == "none" or "offsets" not in before):
        alone["hidden"] = before["hidden"][row : row + 1]
    n = int(before["row_ids"][row])
    for backend, after in results.items():
        arguments = before | alone
        arguments.update({name: arguments[name].clone() for name in WRITTEN})
        ops.exit_step(**arguments, backend=backend)
        for name, got, expected in (
            ("row_ids", arguments["row_ids"][0], after["row_ids"][row]),
            ("state", arguments["state"][:, n], after["state"][:, n]),
            ("answers", arguments["answers"][n], after["answers"][n]),
        ):
            same = np.array_equal(got.numpy(), expected.numpy(), equal_nan=True)
            assert same, f"exit_step on {backend}: {name} of row {row} alone is {got}, in the batch {expected}"


@given(compactions())
def test_compact(arguments):
    expected = [list(values) for values in oracle.compact(*(t.tolist() for t in arguments.values()))]
    for backend in BACK_ENDS:
        planned = ops.compact(**arguments, backend=backend)
        assert [t.tolist() for t in planned] == expected and {t.dtype for t in planned} == {torch.int32}, backend


@given(moves())
def test_gather_rows(arguments):
    hidden, *places, out = arguments.values()
    expected = out.double().numpy()
    oracle.gather_rows(hidden.double().numpy(), *(t.tolist() for t in places), expected)
    for backend in BACK_ENDS:
        got = out.clone()
        ops.gather_rows(**(arguments | {"out": got}), backend=backend)
        assert np.array_equal(got.double().numpy(), expected, equal_nan=True), backend
