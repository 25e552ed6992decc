"""The host reads no value from the device between ids and answers, except once for an attention mask.

Most of these tests run on fake tensors, which have no values, so that reading one raises an error. Counts and lengths
are handled as on CUDA.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.leaving_models import HEADS, LENGTHS, setting
from support.models import early_exit, ragged
from support.unknown_lengths import hide_lengths
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import earlyexit_kernels as ee
from earlyexit_kernels.core import attention, inputs, loop, packing
from earlyexit_kernels.core.counts import HostCounts
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.hf.labels import check_labels


class FromHost(TorchFunctionMode):
    """Refuses synchronising copies from the host to the device, which fake tensors allow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.cpu), function
        return function(*args, **(kwargs or {}))


class ScriptedCounts:
    """Scripted counts for fake tensors."""

    def __init__(self, depth):
        self.invalid = [0] * depth

    def after(self, layer, counts, bounds):
        assert counts is None or (counts.shape, counts.dtype) == ((3,), torch.int32)
        return BOUNDS[layer - 1]

    def finish(self):
        return self.invalid


#: Live rows and their tokens after each layer, for a batch of three rows of five tokens.
BOUNDS = [(3, 15), (2, 10), (2, 10), (1, 5)]


def compactions(model, monkeypatch, counts=ScriptedCounts, mask=None):
    """Run a model on fake tensors, where reading values raises; return the rows and tokens after each compaction."""
    met = []
    moved = Rows._moved

    def watched(self, batch, live, tokens, backend):
        met.append((live, tokens))
        return moved(self, batch, live, tokens, backend)

    with monkeypatch.context() as patch:
        hide_lengths(patch)
        patch.setattr(Rows, "_moved", watched)
        patch.setattr(loop, "counts_for", lambda depth, device, exact: counts(depth))
        patch.setattr(model, "settings", dataclasses.replace(model.settings, path="eager", compaction="always"))
        patch.setattr(attention, "capability", lambda device: (9, 0))
        # the values of ids are not checked on CUDA; fake tensors have no addresses by which to distinguish them
        patch.setattr(inputs, "_check_ids", lambda *_: None)
        patch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, FromHost():
            ids = mode.from_tensor(torch.zeros(3, 5, dtype=torch.int64))
            out = model(input_ids=ids, attention_mask=None if mask is None else mode.from_tensor(mask))
    assert out.logits.shape == (3, 3) and out.exit_layer.shape == (3,)
    return met


@pytest.mark.sample(4)
@pytest.mark.parametrize("criterion", RULES)
def test_rules_do_not_synchronize(criterion, monkeypatch):
    model, _, _ = setting("bert", "auto", criterion)
    assert compactions(model, monkeypatch) == [(2, 10)]


#: Families, and heads of each kind, some in half precision, which uses another attention kernel.
MODELS = [(family, {}, torch.float32) for family in ("roberta", "albert", "distilbert")]
MODELS += [("bert", heads, (torch.float16, torch.float32)[n % 2]) for n, heads in enumerate(HEADS.values())]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "heads", "dtype"), MODELS)
def test_families_and_heads_do_not_synchronize(family, heads, dtype, monkeypatch):
    model = early_exit(family, **heads, criterion=ee.criteria.HiddenCosine(threshold=0.5)).to(dtype)
    assert compactions(model, monkeypatch) == [(2, 10)]


@pytest.mark.parametrize(
    ("counts", "mask"),
    [(HostCounts, None), (ScriptedCounts, torch.ones(3, 5, dtype=torch.int64))],
    ids=["exact counts", "a mask"],
)
def test_synchronization_is_found(counts, mask, monkeypatch):
    """Reading values raises in this setup, so the tests above can fail."""
    model = early_exit(criterion=ee.criteria.Patience(patience=1))
    with pytest.raises(DataDependentOutputException):
        compactions(model, monkeypatch, counts, mask)


#: Words of an error about values -> the check that raises it, of ids, padding and labels.
VALUES = {
    "expected ids in": lambda ids: inputs._check_ids("input_ids", ids - 1, ids.shape, 9),
    "is masked": lambda ids: packing.up_to_last(ids, ids, 1),
    "expected classes in": lambda ids: check_labels(ids[:, 0] + 2, "single_label_classification", 3, 2),
}


@pytest.mark.parametrize("words", VALUES)
def test_values_are_read_on_the_cpu_only(words):
    """Tensors on the device meta have no values, so that reading one raises."""
    ids = torch.tensor([[2, 0, 0, 0, 0]] * 3)
    with pytest.raises(ValueError, match=words):
        VALUES[words](ids)
    VALUES[words](ids.to("meta"))


def test_values_are_not_read_while_compiling():
    @torch.compile(backend="eager", fullgraph=True)
    def run(ids, mask, labels):
        return packing.up_to_last(ids, mask, 1), check_labels(labels, "single_label_classification", 3, 2)

    keep, labels = run(torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5), torch.tensor([0, 1, 1]))
    assert keep.all() and labels.tolist() == [0, 1, 1]


# packing


class SynchronizationCounter(TorchFunctionMode):
    """Counts the calls that would synchronise with the device."""

    WAIT = (
        *(torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__index__),
        *(torch.Tensor.nonzero, torch.nonzero, torch.equal, torch.tensor, torch.as_tensor, torch.Tensor.cpu),
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.WAIT:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def masks():
    for kind in ("full", "right", "left", "holes", "real_ids_masked"):
        yield ragged(kind, lengths=LENGTHS)["attention_mask"]
    empty = ragged("right", lengths=LENGTHS)["attention_mask"]
    empty[1:3] = 0
    yield empty
    yield torch.tensor([[1, 1, 1, 1, 0, 0]])
    yield torch.ones(1, 1, dtype=torch.int64)


@pytest.mark.parametrize("mask", list(masks()), ids=lambda mask: f"{list(mask.shape)}, {int(mask.sum())} tokens")
def test_packing_on_the_device_synchronizes_once(mask):
    expected = packing._pack_on_host(mask != 0, False)
    with SynchronizationCounter() as counter:
        got = packing._pack_on_device(mask != 0, False)
    assert counter.seen == ["tolist"]
    if expected is None:
        assert got is None and mask.all()
        return
    for name in ("tokens", "offsets", "row_ids"):
        a, b = getattr(got, name), getattr(expected, name)
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert got.lengths is None and got.longest == max(expected.lengths) <= expected.longest == mask.shape[1]


@pytest.mark.parametrize("pack", [packing._pack_on_host, packing._pack_on_device])
def test_packing_refuses_a_masked_first_token(pack):
    left = ragged("left")["attention_mask"] != 0
    with pytest.raises(ValueError, match="the first token of row 1 is masked"):
        pack(left.clone(), True)
    assert pack(left.clone(), False).offsets[-1] == left.sum()
    empty = ragged("right")["attention_mask"] != 0
    empty[2] = False
    assert pack(empty.clone(), True).offsets.diff()[2] == 1, "a row without tokens is let through"
