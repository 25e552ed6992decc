"""The thread that runs the model: answers are those of `forward`, and cancelled, late and failing rows."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from support.faulty_model import ORDERS, faulty_model
from support.servers import SECONDS
from support.text_models import answers_one_by_one, model_and_tokenizer, texts

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, SkipGate
from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.batcher import FAILED, LATE, Answer, Batcher, QueueFullError

ROWS = texts(30)
MAX_TOKENS = 40
SLOW = f"the {ORDERS['slow']}"


@pytest.fixture(scope="module")
def varied():
    return model_and_tokenizer(ROWS)


@pytest.fixture(scope="module")
def faulty():
    return faulty_model(), toy.toy_tokenizer()


def started(pair, **options):
    return Batcher(lambda: pair, **{"max_tokens": MAX_TOKENS, "max_rows": 1000, **options})


def encoded(words, rows):
    return [dict(words(row)) for row in rows]


def answers_of(batcher, rows):
    async def main():
        return await asyncio.gather(*batcher.submit(rows))

    return asyncio.run(main())


def test_answers_are_those_of_forward(varied):
    long = " ".join(["good"] * (MAX_TOKENS + 5))  # a batch of its own
    rows, batches = [*ROWS[:10], long, *ROWS[10:]], []
    batcher = started(varied)
    pad = batcher._pad
    batcher._pad = lambda rows: batches.append([len(row["input_ids"]) for row in rows]) or pad(rows)
    found = answers_of(batcher, encoded(varied[1], rows))
    for answer, (logits, layer) in zip(found, answers_one_by_one(*varied, rows), strict=True):
        assert answer.exit_layer == layer
        torch.testing.assert_close(torch.tensor(answer.logits).float(), logits, rtol=1e-4, atol=1e-5)
        assert answer.scores == pytest.approx(logits.double().softmax(-1).tolist(), abs=1e-5)
    assert all(sum(batch) <= MAX_TOKENS or len(batch) == 1 for batch in batches)
    lengths = [len(row["input_ids"]) for row in encoded(varied[1], rows)]
    assert [length for batch in batches for length in batch] == lengths, "the oldest rows come first"
    assert all(sum(a) + b[0] > MAX_TOKENS for a, b in pairwise(batches)), "batches are full"


def test_rows_are_answered_as_they_leave(varied):
    """Rows of one batch that leave at an earlier layer have their answers before the batch has ended."""
    parts = []
    batcher = started(varied, max_tokens=10_000)
    batcher.count = lambda rows, part: parts.append(set(part.exit_layer.tolist()))
    answers_of(batcher, encoded(varied[1], ROWS))
    assert len(parts) >= 3 and all(len(layers) == 1 for layers in parts)


def test_cancelled_rows_do_not_run(faulty):
    batcher, ran = started(faulty, max_tokens=20), []
    batcher.count = lambda rows, part: ran.extend(rows)

    async def main():
        futures = batcher.submit(encoded(faulty[1], [SLOW] * 40))
        await futures[0]
        for future in futures[5:]:
            future.cancel()
        (last,) = await asyncio.gather(*batcher.submit(encoded(faulty[1], ["dull"])))
        assert isinstance(last, Answer) and batcher.waiting == 0

    asyncio.run(main())
    assert len(ran) <= 16  # two batches of five may have begun


def test_a_row_that_fails_leaves_its_neighbours_alone(faulty, caplog):
    rows = ["the plot was dull", f"the {ORDERS['fail']}", "the cast was witty", "the plot was weak"]
    first, failed, *others = answers_of(started(faulty), encoded(faulty[1], rows))
    assert failed == FAILED and "a row of 4 tokens" in caplog.text and "secret of the server" in caplog.text
    for answer, (_, layer) in zip([first, *others], answers_one_by_one(*faulty, [rows[0], *rows[2:]]), strict=True):
        assert answer.exit_layer == layer


def test_rows_that_wait_too_long(faulty):
    batcher = started(faulty, max_tokens=20, max_wait=0.1)
    found = answers_of(batcher, encoded(faulty[1], [SLOW] * 60))
    late = [answer for answer in found if answer == LATE]
    assert 5 <= len(found) - len(late) < 60 and found[-1] == LATE and isinstance(found[0], Answer)


def test_a_full_queue(faulty):
    batcher = started(faulty, max_tokens=4, max_rows=10)

    async def main():
        futures = batcher.submit(encoded(faulty[1], [SLOW] * 10))
        with pytest.raises(QueueFullError):
            batcher.submit(encoded(faulty[1], [SLOW] * 10))
        assert len(await asyncio.gather(*futures)) == 10

    asyncio.run(main())


@pytest.mark.parametrize(
    ("order", "stall_seconds", "logged"),
    [("device", 10_000.0, "the device is lost"), ("hang", 0.5, "has not answered for 0.5 s")],
)
def test_the_process_ends_where_nothing_can_run(faulty, monkeypatch, caplog, order, stall_seconds, logged):
    """After an error of the device, and where a batch stalls; its supervisor starts another process."""
    ended = threading.Event()
    batcher = started(faulty, stall_seconds=stall_seconds)

    def end(code):
        assert code == 1
        ended.set()
        threading.Event().wait()  # the thread does nothing more

    monkeypatch.setattr("earlyexit_kernels.serving.batcher.os._exit", end)

    async def main():
        batcher.submit(encoded(faulty[1], [f"the {ORDERS[order]}"]))
        assert await asyncio.to_thread(ended.wait, SECONDS)

    asyncio.run(main())
    assert logged in caplog.text


def test_rows_that_skip_layers():
    model = ee.to_early_exit(toy.toy_model(layers=3, hidden=8), method="smartbert").eval()
    model.set_criterion(SkipGate(threshold=0.5, exit=Entropy(threshold=0.5)))
    words = toy.toy_tokenizer()
    assert len(answers_of(started((model, words)), encoded(words, ["the plot was dull ."] * 5))) == 5


def test_several_event_loops_share_a_thread(varied):
    batcher = started(varied)
    rows = encoded(varied[1], ROWS)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda n: [a.exit_layer for a in answers_of(batcher, rows[n::4])], range(4)))
    expected = [layer for _, layer in answers_one_by_one(*varied, ROWS)]
    assert found == [expected[n::4] for n in range(4)]


def test_errors_of_loading_are_raised():
    def load():
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        Batcher(load, max_tokens=1, max_rows=1)
