"""The answer and exit layer of a row do not depend on the other rows of its batch, nor on compaction.

Matrix products of a library round depending on the number of rows, so a row whose score is within that rounding of the
threshold may leave at another layer. The tests verify each such row by adding noise of that size to its trace, and
report the number of these rows.
"""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params
from support.leaving_models import LENGTHS, OF_EACH_KIND, setting
from support.models import DECODERS, DEPTH, VOCABULARY, entropies, pad_id, parameter_set

import earlyexit_kernels as ee
from earlyexit_kernels.core import loop
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.criteria import RULES

#: Families of other attention, positions and pooling, with one rule.
FAMILIES = ("roberta", "albert", "roberta-prelayernorm", "modernbert", "eurobert")
FAMILIES += ("mistral", "qwen3", "gemma2", "gemma3_text", "deberta-v2", "mpnet")
TOLERANCE = 1e-5
POISON = VOCABULARY - 1
COMPACTIONS = ("always", "never", "auto")
#: Every rule on BERT and each back-end; Triton's interpreter, which is slow, has one of each kind.
CASES = [
    pytest.param("bert", name, backend.values[0], marks=backend.marks)
    for backend in backend_params()
    for name in (OF_EACH_KIND if "triton" in backend.values else RULES)
]
CASES += [pytest.param(family, "entropy", "torch") for family in FAMILIES]
every_case = pytest.mark.parametrize(("family", "criterion", "backend"), CASES, indirect=["backend"])


def rows(batch, index):
    return {name: values[index] for name, values in batch.items()}


def near_threshold(trace, criterion, row):
    """Return whether noise of the size of rounding changes the exit layer of a row of the trace."""
    generator = torch.Generator().manual_seed(row)

    def noisy(x):
        return x[row] + TOLERANCE * (2 * torch.rand(64, *x.shape[1:], generator=generator) - 1)

    keys = None if trace.keys is None else trace.keys[row].expand(64)
    copies = ee.ExitTrace(noisy(trace.logits), {name: noisy(x) for name, x in trace.aux.items()}, keys)
    return len(ee.replay(copies, criterion)[1].unique()) > 1


def flips(trace, criterion, got, expected, tolerance=TOLERANCE):
    """Return the number of rows with another exit layer, which must be near a threshold; all others must be equal."""
    count = 0
    for row in range(len(expected.exit_layer)):
        exits = got.exit_layer[row].item(), expected.exit_layer[row].item()
        if exits[0] == exits[1]:
            best, second = expected.logits[row].topk(2).values
            assert got.logits[row].argmax() == expected.logits[row].argmax() or best - second <= tolerance
            assert (got.logits[row] - expected.logits[row]).abs().max() <= tolerance
            continue
        assert near_threshold(trace, criterion, row), f"row {row} left at {exits} and nothing explains it"
        count += 1
    return count


def joined(outputs):
    return ee.EarlyExitOutput(
        logits=torch.cat([out.logits for out in outputs]), exit_layer=torch.cat([out.exit_layer for out in outputs])
    )


@pytest.mark.sample(2)
@every_case
def test_a_row_depends_neither_on_its_batch_nor_on_the_back_end(family, backend, criterion, count_flips):
    """Alone with and without its padding, in another order, in threes, and on back-end torch."""
    model, batch, trace = setting(family, backend, criterion)
    expected = model(**batch)
    n = len(expected.exit_layer)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    outputs = [
        joined([model(**rows(batch, slice(i, i + 1))) for i in range(n)]),
        joined([model(input_ids=batch["input_ids"][i : i + 1, : LENGTHS[i]]) for i in range(n)]),
    ]
    for size in (n, 3):
        got = joined([model(**rows(batch, part)) for part in order.split(size)])
        back = order.argsort()
        outputs.append(ee.EarlyExitOutput(logits=got.logits[back], exit_layer=got.exit_layer[back]))
    model.configure(backend="torch")
    outputs.append(model(**batch))
    count_flips(sum(flips(trace, model.criterion, got, expected) for got in outputs), len(outputs) * n)


BESIDE = [(family, "entropy", pooling) for family in ("bert", *FAMILIES) for pooling in (None, "mean")]
BESIDE += [("bert", name, None) for name in RULES if name != "entropy"]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "criterion", "pooling"), BESIDE)
def test_rows_beside_invalid_and_empty_rows(family, criterion, pooling, backend, count_flips):
    model, batch, trace = setting(family, backend, criterion, pooling=pooling)
    expected = model(**batch)
    n = len(expected.exit_layer)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    poisoned = torch.full((1, ids.shape[1]), POISON)
    ids = torch.cat([poisoned, ids[:2], ids[:1], ids[2:], poisoned])
    mask = torch.cat([mask[1:2], mask[:2], torch.zeros_like(mask[:1]), mask[2:], mask[:1]])
    ids = ids.masked_fill(mask == 0, pad_id(model)) if family in DECODERS else ids  # whose last token is not padding
    with parameter_set(model.get_input_embeddings().weight, POISON, float("nan")):
        everything = model(input_ids=ids, attention_mask=mask)
    clean = torch.tensor([1, 2, *range(4, n + 2)])
    for row in (0, n + 2):
        assert everything.exit_layer[row] == DEPTH and everything.logits[row].isnan().all()
    assert torch.isfinite(everything.logits[3]).all() and 1 <= everything.exit_layer[3] <= DEPTH
    got = ee.EarlyExitOutput(logits=everything.logits[clean], exit_layer=everything.exit_layer[clean])
    count_flips(flips(trace, model.criterion, got, expected), n)


@pytest.mark.sample(4)
@every_case
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_compaction_does_not_change_results(family, pooling, criterion, backend, monkeypatch):
    model, batch, _ = setting(family, backend, criterion, pooling=pooling)
    shrunk = []
    moved = Rows._moved

    def watched(self, batch, live, tokens, backend):
        shrunk.append((len(batch.lengths), live))
        return moved(self, batch, live, tokens, backend)

    monkeypatch.setattr(Rows, "_moved", watched)
    # with these costs, 'auto' compacts a model of this size where half of the tokens have left
    monkeypatch.setitem(loop.COMPACTION_COSTS, "cpu", loop.CompactionCost(value=4 * 64 + 2 * 96, fixed=0))
    outputs, times = {}, {}
    for compaction in COMPACTIONS:
        shrunk.clear()
        model.configure(compaction=compaction)
        outputs[compaction] = model(**batch)
        times[compaction] = len(shrunk)
    some_leave = len(outputs["never"].exit_layer.unique()) > 1
    assert times["never"] == 0 and times["always"] >= some_leave and times["auto"] <= times["always"]
    everything = model(**batch, output_all_logits=True)
    for out in (outputs["always"], outputs["auto"], everything):
        assert torch.equal(out.exit_layer, outputs["never"].exit_layer)
        assert (out.logits - outputs["never"].logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_batches_at_the_edges(backend, compaction):
    """The last row leaves first, all rows leave together, one row, and no row."""
    model, batch, trace = setting("bert", backend)
    model.configure(compaction=compaction)
    expected = model(**batch)
    order = expected.exit_layer.argsort(descending=True, stable=True)
    exits = model(**rows(batch, order)).exit_layer
    assert exits[-1] == 1 and exits[0] > 1 and torch.equal(exits, expected.exit_layer[order])
    for row in (0, 1):
        out = model(**rows(batch, slice(row, row + 1)))
        assert out.logits.shape == (1, 3) and torch.equal(out.exit_layer, expected.exit_layer[row : row + 1])
    none = model(**rows(batch, slice(0, 0)))
    assert none.logits.shape == (0, 3) and none.exit_layer.shape == none.layers_run.shape == (0,)
    assert none.exit_layer.dtype == torch.int64
    for threshold, layer in ((0.0, DEPTH), (100.0, 1)):
        model.set_criterion(ee.criteria.Entropy(threshold=threshold))
        out = model(**batch)
        assert out.exit_layer.tolist() == [layer] * len(out.exit_layer)
        assert (out.logits - trace.logits[:, layer - 1]).abs().max() <= TOLERANCE


def test_flip_check_finds_a_flip():
    """A row with another exit layer fails the check, one at the threshold is counted."""
    logits = torch.zeros(1, DEPTH, 3)
    logits[..., 0] = 2.0
    score = entropies(logits)[0, 1].item()
    one = ee.EarlyExitOutput(logits=logits[:, 0], exit_layer=torch.tensor([2]))
    other = ee.EarlyExitOutput(logits=logits[:, 0], exit_layer=torch.tensor([3]))
    at = ee.criteria.Entropy(threshold=[0.0, score + 1e-7, 9.0])
    assert flips(ee.ExitTrace(logits), at, one, other) == 1
    far = ee.criteria.Entropy(threshold=[0.0, score + 1e-3, 9.0])
    with pytest.raises(AssertionError, match="nothing explains it"):
        flips(ee.ExitTrace(logits), far, one, other)
