"""Counts that arrive late: the bounds, and the whole loop with bounds against the loop with exact counts."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from support import reference_networks
from support.leaving_models import HEADS, LENGTHS, setting
from support.models import (
    DEPTH,
    VOCABULARY,
    batch_for,
    early_exit,
    parameter_set,
    varied_entropy,
)
from support.unknown_lengths import hide_lengths

import earlyexit_kernels as ee
from earlyexit_kernels.core import attention, counts, loop
from earlyexit_kernels.core.counts import HostCounts, LaggedCounts, Sent, counts_for
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.core.view import Inputs
from earlyexit_kernels.criteria import RULES

CPU = torch.device("cpu")
POISON = VOCABULARY - 1
NAN = float("nan")
COMPACTIONS = ("always", "never", "auto")
#: Layers that the loop may run ahead, and layers after which counts arrive; the last: at the end of the batch.
ARRIVALS = [(1, 1), (2, 1), (math.inf, math.inf)]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


class Delayed:
    """An event that is done when the test says so."""

    done = False

    def query(self):
        return self.done

    def synchronize(self):
        assert self.done, "the loop waits for counts that it need not know"


class Late(LaggedCounts):
    """Counts that arrive some layers after they were sent; until then the memory has others."""

    def __init__(self, depth, device, lag=1, delay=1):
        super().__init__(depth, device)
        self.lag, self.delay, self.layer = lag, delay, 0
        self.sent = deque()

    def after(self, layer, counts, bounds):
        self.layer = layer
        self.arrive(layer - self.delay)
        return super().after(layer, counts, bounds)

    def finish(self):
        self.arrive(math.inf)
        return super().finish()

    def _send(self, counts, memory):
        memory.fill_(-1)
        self.sent.append((self.layer, counts, memory, Delayed()))
        return memory, self.sent[-1][-1]

    def arrive(self, layer):
        while self.sent and self.sent[0][0] <= layer:
            _, counts, memory, arrival = self.sent.popleft()
            memory.copy_(counts)
            arrival.done = True


# the bounds


def test_bounds_are_the_latest_arrived_counts():
    late = Late(4, CPU)
    assert late.after(1, numbers(7, 50, 0), (9, 60)) == (9, 60)
    assert late.after(2, numbers(5, 30, 2), (9, 60)) == (7, 50)
    assert late.after(3, None, (7, 50)) == (5, 30), "a layer without an exit"
    assert late.after(4, numbers(0, 0, 1), (5, 30)) == (5, 30)
    assert late.finish() == [0, 2, 0, 1]


def test_batches_do_not_share_memory():
    """A stream that is left half-way may still be written to."""
    first, second = LaggedCounts(77, CPU), LaggedCounts(77, CPU)
    assert first._memory.data_ptr() != second._memory.data_ptr()


def test_counts_are_sent_on_the_current_stream(monkeypatch):
    """On a fake device: one copy and one event for each exit, and no wait before it is due."""
    done, log = [], []

    class Event:
        def record(self, stream):
            log.append(("record", stream))

        def query(self):
            return bool(done)

        def synchronize(self):
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    late = LaggedCounts(3, CPU)
    assert late.after(1, numbers(7, 50, 0), (9, 60)) == (9, 60) and log == [("record", "stream of cpu")]
    assert late.after(2, numbers(5, 30, 1), (9, 60)) == (7, 50) and log[1:] == [("record", "stream of cpu"), "wait"]
    done.append(True)
    assert late.after(2, None, (7, 50)) == (5, 30), "arrived, so known before it is due"
    assert late.finish() == [0, 1, 0]


def test_counts_in_inference_mode_and_under_a_default_device():
    with torch.inference_mode(), torch.device("meta"):
        batch = Late(78, CPU, delay=0)
        batch.after(1, torch.tensor([3, 9, 0], dtype=torch.int32, device="cpu"), (4, 12))
        batch.arrive(1)
        assert batch.after(1, None, (4, 12)) == (3, 9)


def test_counts_are_copied_to_pinned_memory(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory, **options: asked.append(pin_memory) or empty(*sizes))
    for device in ("cuda", "cpu"):
        LaggedCounts(1, torch.device(device))
    assert asked == [True, False]


@pytest.mark.parametrize("use", ["after", "finish", "new"])
def test_counts_are_not_compiled(use, monkeypatch):
    """Their memory changes by itself, which a compiled function would not see."""
    compiled, late = [], LaggedCounts(1, CPU)
    monkeypatch.setattr(
        LaggedCounts, "_send", lambda *_: compiled.append(torch.compiler.is_compiling()) or (None, Delayed())
    )
    monkeypatch.setattr(LaggedCounts, "_take", lambda *_: compiled.append(torch.compiler.is_compiling()))
    monkeypatch.setattr(
        counts, "LaggedCounts", lambda *_: compiled.append(torch.compiler.is_compiling()) or HostCounts(1)
    )
    late._sent.append(Sent(1, numbers(1, 1, 0), Delayed()))

    def run(x):
        if use == "after":
            late.after(1, x, (1, 1))
        elif use == "finish":
            late.finish()
        else:
            counts_for(1, torch.device("cuda"), exact=False)
        return x + 1

    torch.compile(run, backend="eager")(torch.zeros(3))
    assert compiled and not any(compiled)


def test_device_errors_end_the_wait():
    class Broken(Delayed):
        def synchronize(self):
            raise RuntimeError("an illegal memory access")

    late = Late(2, CPU, lag=0, delay=math.inf)
    late._send = lambda counts, memory: (memory, Broken())
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        late.after(1, numbers(1, 1, 0), (2, 2))


def test_counts_for():
    assert isinstance(counts_for(4, CPU, exact=False), HostCounts)
    assert isinstance(counts_for(4, torch.device("cuda"), exact=True), HostCounts)


# the whole loop


def exact_linear(x, weight, bias=None):
    """A linear whose rounding does not depend on the number of rows."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def as_on_cuda(monkeypatch):
    """Run as on CUDA: the host does not know lengths, spare tokens are NaN, and products of all sizes round the same.

    Returns a function that chooses the counts, and a list with the number of spare tokens after each compaction.
    """
    spare = []
    move = Rows._moved

    def into_full_memory(*arguments):
        moved, source = move(*arguments)
        end = int(moved.offsets[-1])
        moved.hidden[end:] = NAN
        spare.append(moved.hidden.shape[0] - end)
        return moved, source

    def choose(lag, delay):
        monkeypatch.setattr(loop, "counts_for", lambda depth, device, exact: Late(depth, device, lag, delay))
        spare.clear()

    monkeypatch.setattr(F, "linear", exact_linear)
    monkeypatch.setattr(attention, "_varlen", reference_networks.attended_by_row)
    hide_lengths(monkeypatch)
    monkeypatch.setattr(Rows, "_moved", into_full_memory)
    # with this cost, 'auto' compacts a model of this size where half of the tokens have left
    monkeypatch.setitem(loop.COMPACTION_COSTS, "cpu", loop.CompactionCost(value=4 * 64 + 2 * 96, fixed=0))
    return choose, spare


def answers(model, batch, compaction):
    model.configure(compaction=compaction)
    return model.runner.run(model.view(), Inputs(batch["input_ids"], batch["attention_mask"]))


def same(got, expected):
    assert got.logits.equal(expected.logits) or torch.equal(got.logits.isnan(), expected.logits.isnan())
    finite = ~expected.logits.isnan()
    assert torch.equal(got.logits[finite], expected.logits[finite])
    assert torch.equal(got.exit_layer, expected.exit_layer) and torch.equal(got.layers_run, expected.layers_run)
    assert got.invalid_rows == expected.invalid_rows


def with_poison(batch):
    """The batch with a row of NaN before and after the others."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    row = torch.full_like(ids[:1], POISON)
    return {"input_ids": torch.cat([row, ids, row]), "attention_mask": torch.cat([mask[1:2], mask, mask[:1]])}


@pytest.mark.sample(5)
@pytest.mark.parametrize(("lag", "delay"), ARRIVALS)
@pytest.mark.parametrize("criterion", RULES)
def test_bounds_and_exact_counts_give_equal_results(criterion, lag, delay, monkeypatch):
    """Equal bits of all results, with NaN rows at both ends, and for a single row."""
    model, batch, _ = setting("bert", "auto", criterion)
    model.configure(path="eager")
    choose, spare = as_on_cuda(monkeypatch)
    parts = with_poison(batch), batch, {name: values[1:2] for name, values in batch.items()}
    with parameter_set(model.get_input_embeddings().weight, POISON, NAN):
        expected = [answers(model, part, "never") for part in parts]
        assert sum(expected[0].invalid_rows) >= 2 and not any(expected[1].invalid_rows)
        choose(lag, delay)
        for compaction in COMPACTIONS:
            for part, wanted in zip(parts, expected, strict=True):
                same(answers(model, part, compaction), wanted)
    assert any(spare) or lag != 1 or len(expected[1].exit_layer.unique()) < 3, "no bound was one too many"


#: A family of each way to call attention: windows, soft-capped scores, shared heads, layers of their own.
OTHERS = ("modernbert", "gemma2", "qwen3", "deberta", "deberta-v2", "mpnet")


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_with_lengths_on_the_device(family, monkeypatch):
    """Windows and layers of their own attention run on one rectangle, with NaN in the tokens of no row."""
    model, batch, _ = setting(family, "auto", "entropy")
    model.configure(path="eager")
    expected = answers(model, batch, "never")
    choose, _ = as_on_cuda(monkeypatch)
    for arrival, compaction in zip(ARRIVALS, COMPACTIONS, strict=True):
        choose(*arrival)
        got = answers(model, batch, compaction)
        assert torch.equal(got.exit_layer, expected.exit_layer)
        assert (got.logits - expected.logits).abs().max() <= 1e-5


def test_stream_with_late_counts(monkeypatch):
    """Each row comes once, with equal bits, although layers run after the last row has left."""
    model, batch, _ = setting("bert", "auto", "entropy")
    model.configure(path="eager", compaction="always")
    choose, _ = as_on_cuda(monkeypatch)
    for rule in (varied_entropy(model.trace(**batch)), ee.criteria.Entropy(threshold=9.0)):
        model.set_criterion(rule)
        monkeypatch.setattr(loop, "counts_for", lambda depth, device, exact: HostCounts(depth))
        expected = model(**batch)
        for arrival in ARRIVALS:
            choose(*arrival)
            parts = list(model.stream(**batch))
            rows = torch.cat([part.rows for part in parts])
            assert torch.equal(rows.sort().values, torch.arange(len(LENGTHS)))
            assert torch.equal(torch.cat([part.logits for part in parts]), expected.logits[rows])
            assert torch.equal(torch.cat([part.exit_layer for part in parts]), expected.exit_layer[rows])


def test_every_back_end_supports_bounds(backend, monkeypatch):
    """Kernels run on rows without tokens and tokens without rows; all tokens are moved at each exit."""
    model, batch, _ = setting("bert", backend)
    model.configure(path="eager")
    choose, spare = as_on_cuda(monkeypatch)
    expected = answers(model, batch, "never")
    choose(1, 1)
    same(answers(model, batch, "always"), expected)
    assert any(spare)


def leaving(arguments, kind="right"):
    """A model with these heads and a batch whose rows leave at different layers."""
    model = early_exit(**arguments)
    model.set_criterion(None)
    batch = batch_for(model, kind, lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    model.configure(path="eager")
    return model, batch


@pytest.mark.sample(2)
@pytest.mark.parametrize("heads", HEADS)
def test_all_heads_support_bounds(heads, monkeypatch):
    model, batch = leaving(HEADS[heads], kind="holes")
    rules = [model.criterion, ee.criteria.HiddenCosine(threshold=0.9)]
    rules += [ee.criteria.QExit(q=0.5)] * ("halting" in model.heads.aux_names)
    choose, _ = as_on_cuda(monkeypatch)
    for rule in rules:
        model.set_criterion(rule)
        expected = answers(model, batch, "never")
        choose(1, 1)
        same(answers(model, batch, "always"), expected)


@pytest.mark.parametrize("layer", [3, DEPTH])
def test_strict_model_names_the_layer(layer, monkeypatch):
    """At the end of the batch at the latest."""
    model, batch = leaving({"strict": True})
    model.set_criterion(None if layer == DEPTH else ee.criteria.Entropy(threshold=0.0))
    choose, _ = as_on_cuda(monkeypatch)
    for arrival in ARRIVALS:
        choose(*arrival)
        refusal = pytest.raises(ee.InvalidLogitsError, match=rf"16 row\(s\).*at layer {layer} of {DEPTH}")
        with parameter_set(model.heads.out[layer - 1].bias, 0, NAN), refusal:
            model(**batch)
    assert torch.isfinite(model(**batch).logits).all()


def test_loop_runs_at_most_one_extra_layer(monkeypatch):
    model, batch = leaving({})
    model.set_criterion(ee.criteria.Entropy(threshold=100.0))
    choose, _ = as_on_cuda(monkeypatch)
    run = []
    for module in model.backbone.encoder.layer:
        module.register_forward_hook(lambda *_: run.append(1))
    for lag, delay, layers in ((1, 1, 2), (2, 2, 3), (math.inf, math.inf, DEPTH)):
        choose(lag, delay)
        run.clear()
        assert model(**batch).exit_layer.tolist() == [1] * len(LENGTHS) and len(run) == layers


def test_gates_use_exact_counts(monkeypatch):
    """The host selects the rows that skip, so bounds are not enough on any device."""
    asked = []

    def watched(depth, device, exact):
        asked.append(exact)
        return HostCounts(depth)

    monkeypatch.setattr(loop, "counts_for", watched)
    model, batch = leaving({"method": "smartbert"})
    model(**batch)
    model.set_criterion(ee.criteria.SkipGate(threshold=0.5, exit=model.criterion))
    model(**batch)
    assert asked == [False, True]


def test_costs_of_a_compaction_are_those_of_the_device():
    """On a GPU a few tokens are not worth the time that a compaction takes on its host."""
    width, macs = 768, 12 * 768**2
    assert loop.compaction_pays(64, 8, width, macs, torch.device("cpu"))
    assert not loop.compaction_pays(64, 8, width, macs, torch.device("cuda"))
    assert loop.compaction_pays(4096, 1024, width, macs, torch.device("cuda"))
    for live in range(64):
        measured = (64 - live) * macs > live * width * 60 + 10_000_000
        assert loop.compaction_pays(64, live, width, macs, torch.device("cpu")) == measured
        assert loop.compaction_pays(64, live, width, macs, torch.device("xpu")) == measured
