"""Target `hostile`: invalid arguments to the public ops.

Every back-end must refuse them with a ValueError or a TypeError before it writes anything. If the changed arguments are
still valid, the results must be correct.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from earlyexit_kernels import ops
from earlyexit_kernels.criteria import RULES
from fuzz import ops as valid
from fuzz import validity
from fuzz.case import AcceptedError, Case, WrongError
from fuzz.mutations import change

REFUSED = (ValueError, TypeError)


def run(case: Case) -> None:
    """Make one call with some arguments changed."""
    case.choice((exit_step, exit_step, exit_step, compact, gather_rows, criterion, bare))(case)


def judged(
    case: Case,
    op: str,
    given: dict[str, Any],
    verdict: bool | None,
    call: Callable[[str, dict[str, Any]], Any],
    changes: str,
    check: Callable[[str, dict[str, Any], Any], None],
) -> None:
    """Call an op on every back-end with copies of its arguments, and compare with the verdict.

    Args:
        op: name of the op, for messages.
        given: arguments by name.
        verdict: result of `validity`.
        call: ``(backend, arguments) -> result``.
        changes: the changed arguments, for messages.
        check: raises `WrongError` if the result of a valid call is wrong.
    """
    accepted = {}
    for backend in valid.BACK_ENDS:
        arguments = copied(given)
        before = {name: frozen(value) for name, value in arguments.items()}
        case.calls += 1
        try:
            result = call(backend, arguments)
        except REFUSED as error:
            accepted[backend] = False
            written = [name for name, value in arguments.items() if not same(before[name], frozen(value))]
            if written:
                raise AcceptedError(
                    f"{op} on {backend}: refused, but {written} were written\n  with {changes}: {error}"
                ) from None
            if verdict is True:
                raise WrongError(f"{op} on {backend}: valid, but refused: {error}\n  with {changes}") from None
            continue
        accepted[backend] = True
        if verdict is False:
            raise AcceptedError(f"{op} on {backend}: invalid, but accepted\n  with {changes}")
        if verdict is True:
            check(backend, arguments, result)
    if len(set(accepted.values())) > 1:
        raise WrongError(f"{op}: back-ends disagree, accepted: {accepted}\n  with {changes}")


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Copy the arguments with their strides, aliases and the memory around views."""
    storages: dict[int, torch.UntypedStorage] = {}
    found = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            storage = value.untyped_storage()
            copy = storages.setdefault(storage.data_ptr(), storage.clone())
            value = torch.empty(0, dtype=value.dtype).set_(copy, value.storage_offset(), value.shape, value.stride())
        found[name] = value
    return found


def frozen(value: Any) -> Any:
    """Return a copy of a dense CPU tensor, or None for values that ops cannot write."""
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        return value.detach().clone()
    return None


def same(before: Any, after: Any) -> bool:
    """Return whether the bytes are equal."""
    if before is None or after is None:
        return before is after
    return before.shape == after.shape and bytes_of(before) == bytes_of(after)


def bytes_of(tensor: Tensor) -> bytes:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def exit_step(case: Case) -> None:
    """Call `exit_step` at one layer of a random batch."""
    batch = valid.start(case)
    layer = case.integer(1, batch.depth)
    given = valid.given_at(case, batch, layer)
    names = [p for p in inspect.signature(ops.exit_step).parameters if p != "backend"]
    arguments = dict.fromkeys(names)
    arguments.update(criterion=batch.rule.criterion, layer=layer, depth=batch.depth, pooling="first")
    arguments.update(row_ids=batch.row_ids, **batch.memory)
    arguments.update(given)
    changes = change(case, arguments)
    untouched = all(arguments[k] is v for k, v in {**given, **batch.memory, "row_ids": batch.row_ids}.items())

    def check(backend: str, after: dict[str, Any], counts: Any) -> None:
        if untouched and arguments["layer"] == layer and arguments["depth"] == batch.depth:
            logits, tolerance = valid.exact_logits(batch, given)
            truth, step = valid.oracle_step(batch, given, layer, logits)
            written = {name: after[name] for name in valid.WRITTEN}
            valid.compare(batch, layer, written, counts, truth, step, logits, tolerance, backend)

    def call(backend: str, changed: dict[str, Any]) -> Any:
        return ops.exit_step(**{k: v for k, v in changed.items() if v is not None}, backend=backend)

    if any(arguments[k] is None for k in ("criterion", "layer", "depth", "row_ids", "state", "answers", "exit_layer")):
        verdict: bool | None = False
    else:
        arguments["pooling"] = "first" if arguments["pooling"] is None else arguments["pooling"]
        verdict = validity.exit_step(arguments)
    judged(case, "exit_step", arguments, verdict, call, changes, check)


def bare(case: Case) -> None:
    """Call the compiled op without the checks in Python; it may refuse any call, but must not crash."""
    if "cpp" not in valid.BACK_ENDS:
        return
    batch = valid.start(case)
    given = valid.given_at(case, batch, 1)
    names = ("hidden", "offsets", "weight", "bias", "logits", "aux", *valid.WRITTEN)
    arguments: dict[str, Any] = {**dict.fromkeys(names), **given, **batch.memory, "row_ids": batch.row_ids}
    pooling = arguments.pop("pooling", "none")
    change(case, arguments)
    arguments = copied(arguments)
    rule = batch.rule.criterion
    case.calls += 1
    with contextlib.suppress(*REFUSED, RuntimeError):
        ops.raw("exit_step", "cpp", "cpu")(
            *(arguments[name] for name in names), rule.name, rule.params(1), pooling, 1, batch.depth
        )


def compact(case: Case) -> None:
    """Call `compact` on random rows."""
    batch = valid.start(case)
    lengths = torch.randint(0, 4, (len(batch.row_ids),), generator=torch.Generator().manual_seed(case.integer(0, 999)))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(torch.int32)
    arguments = {"row_ids": batch.row_ids, "offsets": offsets}
    changes = change(case, arguments)

    def check(backend: str, after: dict[str, Any], planned: Any) -> None:
        expected = valid.oracle.compact(after["row_ids"].tolist(), after["offsets"].tolist())
        if [t.tolist() for t in planned] != [list(x) for x in expected]:
            raise WrongError(f"compact on {backend} with {changes}: got {planned}, expected {expected}")

    verdict = validity.compact(arguments)
    judged(case, "compact", arguments, verdict, lambda b, given: ops.compact(**given, backend=b), changes, check)


def gather_rows(case: Case) -> None:
    """Call `gather_rows` after a compaction."""
    rows = case.choice(valid.ROWS)
    lengths = case.arrays.integers(0, 4, rows)
    offsets = np.concatenate(([0], lengths.cumsum()))
    row_ids = np.where(case.arrays.random(rows) < 0.4, -1, np.arange(rows))
    _, new_offsets, source = valid.oracle.compact(row_ids.tolist(), offsets.tolist())
    hidden = torch.from_numpy(case.normal(int(offsets[-1]) + case.integer(0, 2), case.choice((0, 1, 8, 17))))
    out = torch.full((int(new_offsets[-1]) + case.integer(0, 2), hidden.shape[1]), valid.UNTOUCHED)
    arguments: dict[str, Any] = {"hidden": hidden, "out": out}
    for name, values in (("offsets", offsets), ("source", source), ("new_offsets", new_offsets)):
        arguments[name] = torch.tensor(np.asarray(values), dtype=torch.int32)
    changes = change(case, arguments)

    def check(backend: str, after: dict[str, Any], _: Any) -> None:
        expected = arguments["out"].double().numpy().copy()
        valid.oracle.gather_rows(
            arguments["hidden"].double().numpy(),
            *(arguments[k].tolist() for k in ("offsets", "source", "new_offsets")),
            expected,
        )
        if not np.array_equal(after["out"].double().numpy(), expected, equal_nan=True):
            raise WrongError(f"gather_rows on {backend} with {changes}: wrong rows")

    verdict = validity.gather_rows(arguments)
    judged(
        case, "gather_rows", arguments, verdict, lambda b, given: ops.gather_rows(**given, backend=b), changes, check
    )


#: Values that are invalid for most arguments of criteria.
INVALID = (float("nan"), float("inf"), -1.0, -7, "0.5", None, [], [float("nan")], {}, True, 1 + 1j, [[0.5]], object())


def criterion(case: Case) -> None:
    """Build a criterion with one invalid argument."""
    built = valid.drawn_setting(case.choice(sorted(RULES)), case, 3, 4).criterion
    fields = {k: v for k, v in built.to_dict().items() if k != "name"}
    if not fields:
        return
    name, value = case.choice(sorted(fields)), case.choice(INVALID)
    allowed = (
        (value is None and name == "tolerance")
        or (value is True and name == "normalized")
        or (name == "threshold" and built.name == "hidden_cosine" and value == -1.0)
        or (name == "threshold" and value == [])  # of a model with one exit
    )
    if allowed or name == "normalized":
        return
    case.calls += 1
    try:
        type(built)(**{**fields, name: value})
    except REFUSED:
        return
    raise AcceptedError(f"criteria.{type(built).__name__}({name}={value!r}): accepted")
