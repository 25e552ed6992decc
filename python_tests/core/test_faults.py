"""Faults: invalid logits, invalid settings, interruptions, threads, missing parts of the environment."""

from __future__ import annotations

import json
import logging
import math
import threading

import pytest
import torch
import transformers as tf
from support.models import (
    DEPTH,
    VOCABULARY,
    early_exit,
    encoder_of,
    parameter_set,
    ragged,
    stock,
    varied_entropy,
)

import earlyexit_kernels as ee
from earlyexit_kernels.core import invalid
from earlyexit_kernels.criteria import Entropy, Margin, MaxProbability, QExit

NAN, INF = float("nan"), float("inf")
ROWS = [3, 5, 8, 9, 10, 11, 12, 14]


def leaving_at(layer):
    """Return an entropy rule by which every row with valid logits leaves at `layer`."""
    return Entropy(threshold=[0.0] * (layer - 1) + [100.0] * (DEPTH - layer))


def warnings_of(caplog):
    return [r for r in caplog.records if r.name == "earlyexit_kernels" and r.levelno >= logging.WARNING]


# invalid numbers


@pytest.mark.parametrize("compaction", ["always", "never"])
def test_row_with_nan_does_not_exit_there(caplog, compaction):
    model, batch = early_exit(criterion=leaving_at(2)), ragged()
    model.configure(compaction=compaction)
    assert model(**batch).exit_layer.tolist() == [2] * 4
    with parameter_set(model.heads.out[1].bias, 1, NAN):
        for calls in (1, 2):
            out = model(**batch)
            assert out.exit_layer.tolist() == [3] * 4 and torch.isfinite(out.logits).all()
            assert model.invalid_rows == 4 * calls
    assert len(warnings_of(caplog)) == 1
    assert "{2: 4}" in warnings_of(caplog)[0].getMessage() and "strict = True" in warnings_of(caplog)[0].getMessage()
    assert model(**batch).exit_layer.tolist() == [2] * 4 and model.invalid_rows == 8


def test_strict_model_raises_with_the_layer_and_the_stock_model_is_unaffected():
    base, batch = stock(), ragged()
    model = ee.to_early_exit(base, criterion=leaving_at(4), strict=True)
    expected, states = model(**batch), encoder_of(base)(**batch).last_hidden_state
    for layer in (1, 3, 4):
        refusal = pytest.raises(ee.InvalidLogitsError, match=rf"4 row\(s\).*at layer {layer} of 4.*strict=False")
        with parameter_set(model.heads.out[layer - 1].bias, 0, NAN), refusal:
            model(**batch)
    assert torch.equal(model(**batch).logits, expected.logits)
    assert torch.equal(encoder_of(base)(**batch).last_hidden_state, states)


def test_only_rows_with_nan_are_counted():
    model = early_exit(criterion=leaving_at(3))
    batch = ragged()
    batch["input_ids"][2, 1] = VOCABULARY - 1
    with parameter_set(model.get_input_embeddings().weight, VOCABULARY - 1, NAN):
        out = model(**batch)
    assert out.exit_layer.tolist() == [3, 3, 4, 3]
    assert out.logits[2].isnan().all() and torch.isfinite(out.logits[[0, 1, 3]]).all()
    assert model.invalid_rows == 4, "one row at each of four exits"


def test_rows_of_a_stream_are_counted():
    model, batch = early_exit(criterion=leaving_at(2)), ragged()
    with parameter_set(model.heads.out[1].bias, 1, NAN):
        exits = torch.cat([part.exit_layer for part in model.stream(**batch)])
    assert exits.tolist() == [3] * 4 and model.invalid_rows == 4


def test_training_counts_stay_on_the_device(monkeypatch, caplog):
    """On an asynchronous device counts are read every 100 steps, on request and in eval mode only."""
    monkeypatch.setattr(invalid, "SYNCHRONOUS_DEVICES", ())
    monkeypatch.setattr(invalid, "PASSES_BETWEEN_READS", 3)
    model = early_exit(dropout=0.0).train()
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    batch = {"input_ids": ragged("full")["input_ids"], "labels": torch.tensor([0, 1, 2, 0])}
    with parameter_set(model.heads.out[1].bias, 1, NAN):
        for _ in range(2):
            model(**batch).loss.backward()
        assert not reads and not warnings_of(caplog)
        assert model.invalid_rows == 8 and isinstance(model.invalid_rows, int) and len(reads) == 1
        assert "{2: 8}" in warnings_of(caplog)[0].getMessage()
        for _ in range(3):
            model(**batch)
        assert len(reads) == 2
        model(**batch)
    model.eval()
    model(**batch)
    assert not model.runner.invalid._waiting and model.invalid_rows == 24 and len(warnings_of(caplog)) == 1


def test_strict_model_raises_at_the_training_step(monkeypatch):
    monkeypatch.setattr(invalid, "SYNCHRONOUS_DEVICES", ())
    model = early_exit(strict=True).train()
    refusal = pytest.raises(ee.InvalidLogitsError, match=r"4 row\(s\).*at layer 2 of 4")
    with parameter_set(model.heads.out[1].bias, 1, NAN), refusal:
        model(**ragged())


def test_nan_halting_does_not_exit_and_keeps_its_state():
    model, batch = early_exit(criterion=QExit(q=0.3), halting=True), ragged()
    with torch.no_grad():
        for head in model.heads.halting:
            head.out.weight.zero_()
            head.out.bias.fill_(math.log(0.2 / 0.8))
    assert model(**batch).exit_layer.tolist() == [2] * 4, "1 - .8 ** 2 = .36"
    with parameter_set(model.heads.halting[1].out.bias, 0, NAN):
        assert model(**batch).exit_layer.tolist() == [3] * 4, "layer 2 is ignored"


SURE = [Entropy(threshold=1e-6), MaxProbability(threshold=0.99), Margin(threshold=0.99)]
#: Bias of the first exit, rules, and the exit at which all rows leave.
LIMITS = {
    "one infinite logit dominates": ([0.0, INF, 0.0], SURE, 1),
    "zero probabilities": ([0.0, 1e4, -1e4], SURE, 1),
    "0 log 0 is 0": ([0.0, 1e4, -INF], SURE, 1),
    "several infinities": ([INF, INF, 0.0], [leaving_at(1)], 2),
    "all negative infinite": ([-INF, -INF, -INF], [leaving_at(1)], 2),
}


@pytest.mark.parametrize("case", LIMITS)
def test_infinite_logits(case):
    """One dominates; several are invalid, and no row leaves there."""
    bias, rules, layer = LIMITS[case]
    model, batch = early_exit(), ragged()
    for rule in rules:
        model.set_criterion(rule)
        with parameter_set(model.heads.out[0].bias, slice(None), torch.tensor(bias)):
            out = model(**batch)
        assert out.exit_layer.tolist() == [layer] * 4 and not out.logits.isnan().any()
        assert model.invalid_rows == 4 * (layer - 1)
        assert layer > 1 or (out.logits.argmax(-1) == 1).all()


@pytest.mark.parametrize("everything", [False, True])
def test_half_precision_overflow(everything):
    """Logits above the fp16 range are finite in float32: the decision is correct and the answer has a softmax."""
    model, batch = early_exit(criterion=Entropy(threshold=[0.0, 1e-3, 0.0])).half(), ragged()
    with torch.no_grad():
        model.heads.dense[0].bias.fill_(20.0)
        model.heads.out[1].weight.copy_(torch.tensor([2e3, 3e3, 2.5e3])[:, None].expand(3, 64))
    out = model(**batch, output_all_logits=everything)
    assert out.exit_layer.tolist() == [2] * 4 and model.invalid_rows == 0
    assert not out.logits.float().softmax(-1).isnan().any()
    assert out.logits.argmax(-1).tolist() == [1] * 4


# invalid settings


def test_a_criterion_that_does_not_fit_is_refused_and_not_set():
    for rule, words in ((QExit(q=0.5), "needs heads with the output 'halting'"), (Margin(threshold=[0.5]), "3 exits")):
        with pytest.raises(ValueError, match=words):
            ee.to_early_exit(stock(), criterion=rule)
        model = ee.to_early_exit(stock())
        with pytest.raises(ValueError, match=words):
            model.set_criterion(rule)
        assert model.criterion is None and model.config.criterion is None


def test_model_with_one_layer():
    model = ee.to_early_exit(stock(num_hidden_layers=1), criterion=Entropy(threshold=[]))
    assert model(**ragged()).exit_layer.tolist() == [1] * 4


# interruptions and threads


@pytest.mark.parametrize(
    ("error", "compaction"), [(RuntimeError("out of memory"), "never"), (KeyboardInterrupt(), "always")]
)
def test_call_after_an_exception(error, compaction):
    model, batch = early_exit(), ragged(lengths=ROWS)
    model.configure(compaction=compaction)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    expected = model(**batch)

    def fail(*args):
        raise error

    hook = model.backbone.encoder.layer[2].register_forward_hook(fail)
    with pytest.raises(type(error)):
        model(**batch)
    hook.remove()
    out = model(**batch)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.exit_layer, expected.exit_layer)


def test_many_threads_on_one_model():
    model = early_exit()
    model.configure(compaction="always")
    batches = [ragged(kind, lengths=ROWS[: 3 + i], seed=i) for i, kind in enumerate(["right", "holes", "full"] * 2)]
    model.set_criterion(varied_entropy(model.trace(**ragged(lengths=ROWS))))
    expected = [model(**batch) for batch in batches]
    wrong, start = [], threading.Barrier(len(batches))

    def call(i):
        start.wait()
        for turn in range(25):
            at = (i + turn) % len(batches)
            out = model(**batches[at])
            same = torch.equal(out.logits, expected[at].logits)
            if not (same and torch.equal(out.exit_layer, expected[at].exit_layer)):
                wrong.append((i, turn))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


# environment


def test_remote_code_is_not_run(tmp_path):
    early_exit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model) is ee.EarlyExitForSequenceClassification and not (tmp_path / "ran").exists()
