"""The server over a real socket: requests and refusals, with workers whose answers follow from the token ids."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.fake_worker import DEPTH, LABELS, answer_to
from support.servers import ORDERS, client_of, fake_server

from earlyexit_kernels.data import toy

ROWS = toy.write_splits(train_rows=0, dev_rows=400, test_rows=0)["dev"]
TEXTS = [row.text for row in ROWS if not set(row.text.split()) & set(ORDERS.values())]
KEY = "right-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    toy.toy_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(folder):
    with fake_server(folder, max_inputs=256, max_body_bytes=2**21) as url, client_of(url) as found:
        yield found


@pytest.fixture(scope="module")
def words():
    return toy.toy_tokenizer()


def expected(words, *texts):
    """What the fake worker answers to a text or a pair."""
    layer, logits = answer_to(words(*texts)["input_ids"])
    scores = np.exp(logits) / np.exp(logits).sum()
    rows = zip(LABELS, scores.tolist(), strict=True)
    return [{"label": name, "score": score, "exit_layer": layer} for name, score in sorted(rows, key=lambda r: -r[1])]


def same(found, wanted):
    assert [(one["label"], one["exit_layer"]) for one in found] == [(one["label"], one["exit_layer"]) for one in wanted]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in wanted])


def test_a_text_gets_a_list_and_several_get_a_list_of_lists(client, words):
    same(client.post("/predict", json={"inputs": TEXTS[0]}).json(), expected(words, TEXTS[0]))
    (one,) = client.post("/predict", json={"inputs": [TEXTS[0]]}).json()
    same(one, expected(words, TEXTS[0]))


def test_texts_and_pairs_keep_their_order(client, words):
    inputs = [TEXTS[0], [TEXTS[1], TEXTS[2]], [TEXTS[3]], [TEXTS[4], TEXTS[5]]]
    found = client.post("/predict", json={"inputs": inputs}).json()
    for one, item in zip(found, inputs, strict=True):
        same(one, expected(words, *([item] if isinstance(item, str) else item)))


def test_raw_scores_are_the_logits(client, words):
    (one,) = client.post("/predict", json={"inputs": [TEXTS[0]], "raw_scores": True}).json()
    logits = answer_to(words(TEXTS[0])["input_ids"])[1]
    assert [row["score"] for row in one] == sorted(logits, reverse=True)


def test_lines_come_as_soon_as_rows_are_final(client, words):
    inputs = [TEXTS[0], f"a {ORDERS['fail']}", f"a {ORDERS['slow']}", TEXTS[1]]
    lines = {}
    with client.stream("POST", "/predict", json={"inputs": inputs}, headers={"Accept": "application/x-ndjson"}) as got:
        assert got.status_code == 200 and got.headers["content-type"].startswith("application/x-ndjson")
        for line in got.iter_lines():
            one = json.loads(line)
            lines[one.pop("index")] = one
            if len(lines) == 1:  # the slow row has not been answered yet
                assert client.get("/metrics.json").json()["rows"] >= 1
    assert sorted(lines) == [0, 1, 2, 3]
    assert lines[1] == {"error": "the model failed on this input", "error_type": "Backend"}
    for index in (0, 2, 3):
        same(lines[index]["predictions"], expected(words, inputs[index]))


def test_long_inputs_are_refused_or_shortened(client, words):
    long = "dull " * 100
    refused = client.post("/predict", json={"inputs": [TEXTS[0], long]})
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("inputs.1: expected at most 64 tokens, got 102")
    (found,) = client.post("/predict", json={"inputs": [long], "truncate": True}).json()
    layer, _ = answer_to(words(long, truncation=True, max_length=64)["input_ids"])
    assert found[0]["exit_layer"] == layer


def test_a_row_on_which_the_model_fails_leaves_its_neighbours_alone(client, words):
    found = client.post("/predict", json={"inputs": [TEXTS[0], f"the {ORDERS['fail']}", TEXTS[1]]})
    assert found.status_code == 200
    first, failed, last = found.json()
    assert failed == {"error": "the model failed on this input", "error_type": "Backend"}
    same(first, expected(words, TEXTS[0]))
    same(last, expected(words, TEXTS[1]))
    assert client.post("/predict", json={"inputs": f"the {ORDERS['fail']}"}).status_code == 424


#: Name -> body of a request, its status, and words of its error.
REFUSED = {
    "malformed": (b'{"inputs": "a', 400, "Invalid JSON"),
    "empty body": (b"", 400, "Invalid JSON"),
    "bad UTF-8": (b'{"inputs": "\xff\xfe"}', 400, "unicode"),
    "half a character": (b'{"inputs": "\\ud800"}', 400, "JSON"),
    "not an object": (b"[1]", 422, "body"),
    "no inputs": (b"{}", 422, "inputs: Field required"),
    "number": (b'{"inputs": 3}', 422, "inputs: expected a text"),
    "numbers": (b'{"inputs": ["a", 3]}', 422, "inputs: expected a text"),
    "null": (b'{"inputs": null}', 422, "inputs: expected a text"),
    "unknown field": (b'{"inputs": "a", "path": "/etc/passwd"}', 422, "path: Extra inputs"),
    "text as a flag": (b'{"inputs": "a", "truncate": "yes"}', 422, "truncate"),
    "empty text": (b'{"inputs": ""}', 422, "inputs.0: expected some text"),
    "white space": (b'{"inputs": ["a", " \\n"]}', 422, "inputs.1: expected some text"),
    "empty list": (b'{"inputs": []}', 422, "at least one"),
    "three texts": (b'{"inputs": [["a", "b", "c"]]}', 422, "inputs.0: expected 1 or 2"),
    "10,000 inputs": (json.dumps({"inputs": ["a"] * 10_000}).encode(), 413, "at most 256, got 10000"),
    "1 MB text": (
        json.dumps({"inputs": "dull " * 200_000}).encode(),
        422,
        "at most 4096 characters .64 tokens., got 1000000",
    ),
    "65 tokens": (json.dumps({"inputs": "dull " * 65}).encode(), 422, 'at most 64 tokens.*set "truncate": true'),
    "long body": (json.dumps({"inputs": "a" * 2**21}).encode(), 413, "at most 2097152 bytes"),
    "threshold": (b'{"inputs": "a", "threshold": 0.3}', 422, "accepts no threshold"),
    "nested": (b'{"inputs":' + b"[" * 100_000 + b"}", 400, "JSON"),
}


def test_long_texts_are_cut_before_they_are_tokenised(client, words):
    """A text of a megabyte would keep the tokenizer from those of other requests for a second."""
    long, cut = "dull " * 200_000, words.tokenize("dull " * 64)[:62]
    found = client.post("/predict", json={"inputs": [long, [long, "witty"]], "truncate": True})
    assert found.status_code == 200, found.text
    same(found.json()[0], expected(words, " ".join(cut)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(client, name):
    body, status, text = REFUSED[name]
    found = client.post("/predict", content=body)
    assert found.status_code == status and set(found.json()) == {"error", "error_type"}
    assert re.search(text, found.json()["error"], re.IGNORECASE), found.text
    assert "Traceback" not in found.text and len(found.text) < 500


def test_a_long_body_without_its_length_is_refused(client):
    found = client.post("/predict", content=(b"a" * 2**16 for _ in range(40)))
    assert found.status_code == 413


@pytest.mark.parametrize("path", ["/nowhere", "/../../etc/passwd", "/predict/", "/static/%2e%2e/x"])
def test_unknown_paths_and_methods(client, path):
    assert client.get(path).status_code == 404
    assert client.get("/predict").status_code == 405


def test_health_info_and_metrics(client):
    assert client.get("/health").json() == {"ready": True, "workers": 1, "workers_ready": 1}
    info = client.get("/info").json()
    assert info["labels"] == LABELS and info["depth"] == DEPTH and info["limits"]["max_inputs"] == 256
    assert info["max_length"] == 64 and "/" not in info["model"] and info["versions"]["torch"]
    client.post("/predict", json={"inputs": TEXTS[:20]})
    text = client.get("/metrics").text
    assert 'earlyexit_requests_total{path="/predict",status="200"}' in text
    for layer in range(1, DEPTH + 1):
        assert f'earlyexit_rows_total{{exit_layer="{layer}"}}' in text
    assert "earlyexit_predict_seconds_bucket" in text and "earlyexit_tokens_total" in text
    assert "earlyexit_exit_share" not in text  # this model has no calibration
    now = client.get("/metrics.json").json()
    assert sum(now["exit_rows"]) == now["rows"] >= 20 and now["latency_ms"]["p50"] > 0
    fields = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(fields["application/json"]["schema"]["properties"]) == {"inputs", "truncate", "raw_scores", "threshold"}


def test_answers_of_200_clients_are_neither_mixed_nor_lost(client, words):
    before = client.get("/metrics.json").json()["rows"]

    def ask(number):
        own = [TEXTS[(number * 7 + n) % len(TEXTS)] for n in range(1 + number % 3)]
        return own, many.post("/predict", json={"inputs": own}).json()

    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    with client_of(str(client.base_url), limits=limits) as many, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for own, found in answers:
        for one, text in zip(found, own, strict=True):
            same(one, expected(words, text))
    rows = client.get("/metrics.json").json()["rows"] - before
    assert rows == sum(len(own) for own, _ in answers)


def test_key(folder):
    with fake_server(folder, api_key=KEY) as url, client_of(url) as asked:
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}]
        wrong += [{"Authorization": b"Bearer \xe9"}, {"Authorization": f"Bearer {KEY}x"}]
        for path in ("/predict", "/info", "/metrics", "/metrics.json", "/openapi.json", "/nowhere"):
            for headers in wrong:
                refused = asked.get(path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                assert KEY not in refused.text
        right = {"Authorization": f"Bearer {KEY}"}
        assert asked.post("/predict", json={"inputs": "a"}, headers=right).status_code == 200
        assert asked.get("/health").status_code == 200 and asked.get("/").status_code == 200
        assert KEY not in asked.get("/info", headers=right).text + asked.get("/").text
