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
from earlyexit_kernels.core.view import Settings
from earlyexit_kernels.criteria import RULES

FAMILIES = ("bert", "roberta", "albert", "roberta-prelayernorm")
#: Families of other attention, positions and pooling, with one rule.
OTHERS = ("modernbert", "eurobert", "mistral", "qwen3", "gemma2", "gemma3_text", "deberta-v2", "mpnet")
TOLERANCE = 1e-5
POISON = VOCABULARY - 1
COMPACTIONS = ("always", "never", "auto")
#: Every rule on one family, and one of each kind on all; Triton's interpreter, which is slow, has these on one.
CASES = [
    pytest.param(family, name, backend.values[0], marks=backend.marks)
    for backend in backend_params()
    for family in FAMILIES
    for name in RULES
    if (family == "bert", name in OF_EACH_KIND).count(True) >= (2 if "triton" in backend.values else 1)
]
CASES += [pytest.param(family, "entropy", "torch") for family in OTHERS]
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


def flips(trace, criterion, got, expected):
    """Return the number of rows with another exit layer, which must be near a threshold; all others must be equal."""
    count = 0
    for row in range(len(expected.exit_layer)):
        exits = got.exit_layer[row].item(), expected.exit_layer[row].item()
        if exits[0] == exits[1]:
            best, second = expected.logits[row].topk(2).values
            assert got.logits[row].argmax() == expected.logits[row].argmax() or best - second <= TOLERANCE
            assert (got.logits[row] - expected.logits[row]).abs().max() <= TOLERANCE
            continue
        assert near_threshold(trace, criterion, row), f"row {row} left at {exits} and nothing explains it"
        count += 1
    return count


def joined(outputs):
    return ee.EarlyExitOutput(
        logits=torch.cat([out.logits for out in outputs]), exit_layer=torch.cat([out.exit_layer for out in outputs])
    )


def report(count_flips, found, total):
    print(f"{found} flips of {total} rows")
    count_flips(found, total)


@pytest.mark.sample(3)
@every_case
def test_one_row_at_a_time(family, backend, criterion, count_flips):
    model, batch, trace = setting(family, backend, criterion)
    expected = model(**batch)
    n = len(expected.exit_layer)
    padded = joined([model(**rows(batch, slice(i, i + 1))) for i in range(n)])
    trimmed = joined([model(input_ids=batch["input_ids"][i : i + 1, : LENGTHS[i]]) for i in range(n)])
    found = sum(flips(trace, model.criterion, got, expected) for got in (padded, trimmed))
    report(count_flips, found, 2 * n)


@pytest.mark.sample(3)
@every_case
def test_shuffled_and_regrouped_rows(family, backend, criterion, count_flips):
    model, batch, trace = setting(family, backend, criterion)
    expected = model(**batch)
    n, found = len(expected.exit_layer), 0
    seeds = 1 if backend == "triton" else 2
    for seed in range(seeds):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        back = order.argsort()
        for size in (n, 3):
            outputs = [model(**rows(batch, part)) for part in order.split(size)]
            got = joined(outputs)
            got = ee.EarlyExitOutput(logits=got.logits[back], exit_layer=got.exit_layer[back])
            found += flips(trace, model.criterion, got, expected)
    report(count_flips, found, 2 * seeds * n)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("family", "criterion", "pooling"),
    [
        *((family, "entropy", pooling) for family in FAMILIES for pooling in (None, "first", "mean")),
        *((family, "entropy", pooling) for family in OTHERS for pooling in (None, "mean")),
        *(("bert", name, None) for name in RULES if name != "entropy"),
    ],
)
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
    report(count_flips, flips(trace, model.criterion, got, expected), n)


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


@every_case
def test_back_ends_agree(family, backend, criterion, count_flips):
    model, batch, trace = setting(family, backend, criterion)
    got = model(**batch)
    model.configure(backend="torch")
    report(count_flips, flips(trace, model.criterion, got, model(**batch)), len(got.exit_layer))


@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_rows_leave_from_the_end_of_the_batch(backend, compaction):
    """The last row leaves first, then the one before it."""
    model, batch, _ = setting("bert", backend)
    model.configure(compaction=compaction)
    order = model(**batch).exit_layer.argsort(descending=True, stable=True)
    exits = model(**rows(batch, order)).exit_layer
    assert exits[-1] == 1 and exits[0] > 1
    assert torch.equal(exits, exits.sort(descending=True).values)
    assert torch.equal(exits, model(**batch).exit_layer[order])


@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_batches_of_one_row_and_no_row(backend, compaction):
    model, batch, _ = setting("bert", backend)
    model.configure(compaction=compaction)
    expected = model(**batch)
    for row in (0, 1):
        out = model(**rows(batch, slice(row, row + 1)))
        assert out.logits.shape == (1, 3) and torch.equal(out.exit_layer, expected.exit_layer[row : row + 1])
    none = model(**rows(batch, slice(0, 0)))
    assert none.logits.shape == (0, 3) and none.exit_layer.shape == none.layers_run.shape == (0,)
    assert none.exit_layer.dtype == torch.int64


@pytest.mark.parametrize("compaction", COMPACTIONS)
@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_all_rows_leave_together(backend, compaction, threshold):
    model, batch, trace = setting("bert", backend)
    model.configure(compaction=compaction)
    model.set_criterion(ee.criteria.Entropy(threshold=threshold))
    out = model(**batch)
    layer = 1 if threshold else DEPTH
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


def test_unknown_compaction_is_refused():
    with pytest.raises(ValueError, match=r"compaction: expected one of \('auto', 'always', 'never'\), got 'alwys'"):
        Settings(compaction="alwys")
