"""The server over a real socket: answers, refusals, the API key, clients that leave, metrics and the status page."""

from __future__ import annotations

import base64
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.faulty_model import MAX_LENGTH, ORDERS, FaultySource, faulty_model
from support.html_pages import BROWSER, Page, overflow
from support.servers import SECONDS, client_of, counted, thread_server, until

import earlyexit_kernels as ee
from earlyexit_kernels.data import toy
from earlyexit_kernels.serving import server
from earlyexit_kernels.serving.server import Options

ROWS = toy.write_splits(train_rows=0, dev_rows=400, test_rows=0)["dev"]
TEXTS = [row.text for row in ROWS if not set(row.text.split()) & set(ORDERS.values())]
SLOW, FAILS, GIVES_NAN = (f"the {ORDERS[order]}" for order in ("slow", "fail", "nan"))
FAILED = {"error": "the model failed on this input", "error_type": "Backend"}
LINES = {"Accept": "application/x-ndjson"}
KEY = "right-key"


class Calibrated(FaultySource):
    """The model with a calibration."""

    def load(self):
        model, words = super().load()
        rows, rule = [words(text) for text in TEXTS[:200]], model.criterion
        layers = ee.predict_with_exits(model, rows).exit_layer
        shares = tuple((np.bincount(layers, minlength=5)[1:] / len(layers)).tolist())
        found = ee.calibrate(model, rows, target=ee.SpeedUp(1.2))
        replace(found, criterion=rule, exit_shares=shares).apply(model)
        return model, words


@pytest.fixture(scope="module")
def client():
    with thread_server(max_body_bytes=2**21, max_length=MAX_LENGTH) as url, client_of(url) as found:
        yield found


@pytest.fixture(scope="module")
def scorer():
    return ee.Scorer(faulty_model(), toy.toy_tokenizer(), scores=True)


def same(answers, scorer, texts):
    """Check that answers are those of a scorer."""
    wanted = scorer(texts)
    assert [(one[0]["label"], one[0]["exit_layer"]) for one in answers] == list(
        zip(wanted["label"], wanted["exit_layer"], strict=True)
    )
    for one, scores in zip(answers, wanted["scores"], strict=True):
        assert [label["score"] for label in one] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


def connection(url):
    at = urlsplit(str(url))
    return socket.create_connection((at.hostname, at.port), timeout=SECONDS)


def request_of(inputs):
    body = json.dumps({"inputs": inputs}).encode()
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def test_answers_are_those_of_a_scorer(client, scorer):
    same(client.post("/predict", json={"inputs": TEXTS[:150]}).json(), scorer, TEXTS[:150])
    assert len(set(scorer(TEXTS[:150])["exit_layer"])) >= 2
    same([client.post("/predict", json={"inputs": TEXTS[0]}).json()], scorer, [TEXTS[0]])
    pairs = [(TEXTS[1], TEXTS[2]), (TEXTS[3], TEXTS[4])]
    mixed = client.post("/predict", json={"inputs": [list(pairs[0]), TEXTS[5], [TEXTS[6]], list(pairs[1])]}).json()
    same([mixed[0], mixed[3]], scorer, pairs)
    same(mixed[1:3], scorer, TEXTS[5:7])


def test_raw_scores_are_the_logits(client):
    (found,) = client.post("/predict", json={"inputs": [TEXTS[0]], "raw_scores": True}).json()
    out = faulty_model()(**toy.toy_tokenizer()([TEXTS[0]], return_tensors="pt"))
    assert [one["score"] for one in found] == pytest.approx(sorted(out.logits[0].tolist(), reverse=True), abs=1e-5)


class Reranker(FaultySource):
    """A model with one label."""

    def load(self):
        config = toy.toy_model(layers=2, hidden=16).config
        config.num_labels = 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ee.to_early_exit(BertForSequenceClassification(config), pooling="mean").eval()
        model.set_criterion(ee.criteria.Patience(patience=1, tolerance=1.0))
        return model, toy.toy_tokenizer()


#: Body of a request for a ranking -> status and words of the error.
NO_RANKING = {
    b'{"texts": ["a"]}': (422, "query: Field required"),
    b'{"query": "a", "texts": "b"}': (422, "texts: Input should be a valid array"),
    b'{"query": "a", "texts": []}': (422, "texts: expected at least one text"),
    b'{"query": " ", "texts": ["b", " "]}': (422, "texts.1: expected some text"),
    b'{"query": "a", "texts": ["b"], "top": 3}': (422, "top: Extra inputs"),
}


def test_texts_are_ranked_for_a_query(client):
    query, others = TEXTS[0], TEXTS[1:9]
    wanted = ee.Scorer(*Reranker().load())([(query, text) for text in others])
    with thread_server(Reranker()) as url, client_of(url) as reranker:
        found = reranker.post("/rerank", json={"query": query, "texts": others}).json()
        order = sorted(range(8), key=lambda row: -wanted["score"][row])
        assert [one["index"] for one in found] == order and all("text" not in one for one in found)
        assert [one["score"] for one in found] == pytest.approx([wanted["score"][row] for row in order], abs=1e-5)
        assert [one["exit_layer"] for one in found] == [wanted["exit_layer"][row] for row in order]
        (one,) = reranker.post("/rerank", json={"query": query, "texts": others[:1], "return_text": True}).json()
        assert one["text"] == others[0]
        for body, (status, words) in NO_RANKING.items():
            refused = reranker.post("/rerank", content=body)
            assert refused.status_code == status and words in refused.json()["error"]
    refused = client.post("/rerank", json={"query": query, "texts": others})
    assert refused.status_code == 422 and "expected a model with one label, this one has 2" in refused.json()["error"]


def test_lines_come_as_soon_as_rows_are_final(scorer):
    inputs = [TEXTS[0], FAILS, GIVES_NAN, *[SLOW] * 20, TEXTS[1]]
    lines = {}
    with thread_server(max_tokens=20) as url, client_of(url) as client:
        before = counted(client, "rows_total")
        with client.stream("POST", "/predict", json={"inputs": inputs}, headers=LINES) as got:
            assert got.status_code == 200 and got.headers["content-type"].startswith("application/x-ndjson")
            for line in got.iter_lines():
                if not lines:
                    assert counted(client, "rows_total") - before < len(inputs) - 1, "others have no answer yet"
                one = json.loads(line)
                lines[one.pop("index")] = one
    assert sorted(lines) == list(range(len(inputs))) and lines[1] == FAILED
    assert "not a finite number" in lines[2]["error"]
    same([lines[0]["predictions"], lines[len(inputs) - 1]["predictions"]], scorer, TEXTS[:2])


def test_rows_on_which_the_model_fails(client, scorer):
    found = client.post("/predict", json={"inputs": [*TEXTS[:3], FAILS, GIVES_NAN, *TEXTS[3:6]]})
    assert found.status_code == 200 and "secret" not in found.text
    answers = found.json()
    assert answers[3] == FAILED and "not a finite number" in answers[4]["error"]
    same(answers[:3] + answers[5:], scorer, TEXTS[:6])
    for text in (FAILS, GIVES_NAN):
        assert client.post("/predict", json={"inputs": text}).status_code == 424


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
    "threshold": (b'{"inputs": "a", "threshold": 0.3}', 422, "threshold: Extra inputs"),
    "long names": (json.dumps({"x" * 1000 + str(n): 1 for n in range(100)}).encode(), 422, "inputs: Field"),
    "text as a flag": (b'{"inputs": "a", "truncate": "yes"}', 422, "truncate"),
    "empty text": (b'{"inputs": ""}', 422, "inputs.0: expected some text"),
    "white space": (b'{"inputs": ["a", " \\n"]}', 422, "inputs.1: expected some text"),
    "empty list": (b'{"inputs": []}', 422, "at least one"),
    "no text in an item": (b'{"inputs": [[]]}', 422, "inputs.0: expected 1 or 2"),
    "three texts": (b'{"inputs": [["a", "b", "c"]]}', 422, "inputs.0: expected 1 or 2"),
    "10,000 inputs": (json.dumps({"inputs": ["a"] * 10_000}).encode(), 413, "at most 256, got 10000"),
    "1 MB text": (json.dumps({"inputs": "dull " * 200_000}).encode(), 422, "at most 4096 characters .64 tokens., got"),
    "65 tokens": (json.dumps({"inputs": "dull " * 65}).encode(), 422, 'at most 64 tokens.*set "truncate": true'),
    "10 MB": (json.dumps({"inputs": "a" * 10_000_000}).encode(), 413, "at most 2097152 bytes"),
    "nested": (b'{"inputs":' + b"[" * 100_000 + b"}", 400, "JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(client, name):
    body, status, text = REFUSED[name]
    found = client.post("/predict", content=body)
    assert found.status_code == status and set(found.json()) == {"error", "error_type"}
    assert re.search(text, found.json()["error"], re.IGNORECASE), found.text
    assert "Traceback" not in found.text and len(found.text) < 500


def test_a_long_body_without_its_length_is_refused(client):
    assert client.post("/predict", content=(b"a" * 2**16 for _ in range(40))).status_code == 413


def test_long_texts_are_cut_before_they_are_tokenised(client, scorer):
    """A text of a megabyte would keep the tokenizer from those of other requests for a second."""
    long, words = "dull " * 200_000, toy.toy_tokenizer()
    found = client.post("/predict", json={"inputs": [long, [long, "witty"], "dull " * 100], "truncate": True})
    assert found.status_code == 200, found.text
    cut = " ".join(words.tokenize("dull " * 100)[: MAX_LENGTH - 2])
    same([found.json()[0], found.json()[2]], scorer, [cut, cut])


@pytest.mark.parametrize("path", ["/nowhere", "/../../etc/passwd", "/predict/", "/docs", "/static/%2e%2e/x"])
def test_unknown_paths_and_methods(client, path):
    found = client.get(path)
    assert found.status_code == 404 and found.json()["error_type"] == "Validation"
    assert client.get("/predict").status_code == 405


def test_answers_of_200_clients_are_neither_mixed_nor_lost(client, scorer):
    def ask(number):
        texts = [TEXTS[(number * 7 + n) % len(TEXTS)] for n in range(1 + number % 3)]
        return texts, many.post("/predict", json={"inputs": texts}).json()

    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    with client_of(str(client.base_url), limits=limits) as many, ThreadPoolExecutor(200) as pool:
        for texts, found in pool.map(ask, range(200)):
            same(found, scorer, texts)


def test_key():
    def basic(password):
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}]
    wrong += [{"Authorization": b"Bearer \xe9"}, {"Authorization": f"Bearer {KEY}x"}, basic("wrong"), basic("\xe9")]
    with thread_server(api_key=KEY) as url, client_of(url) as asked:
        for path in ("/", "/predict", "/info", "/metrics", "/openapi.json", "/nowhere"):
            for headers in wrong:
                refused = asked.get(path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
                assert KEY not in refused.text
        for right in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY}"}, basic(KEY)):
            assert asked.post("/predict", json={"inputs": "a"}, headers=right).status_code == 200
            assert KEY not in asked.get("/info", headers=right).text + asked.get("/", headers=right).text
        assert asked.get("/health").status_code == 200


def test_key_of_the_environment(monkeypatch):
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    assert server.api_key() is None
    monkeypatch.setenv(server.KEY_VARIABLE, " secret \n")
    assert server.api_key() == "secret" and "secret" not in repr(Options(source=FaultySource(), api_key="secret"))
    for wrong in ("", " ", "two words", "schlüssel"):
        monkeypatch.setenv(server.KEY_VARIABLE, wrong)
        with pytest.raises(ValueError, match="EARLYEXIT_API_KEY: expected a key"):
            server.api_key()


def test_full_queue_and_rows_that_wait_too_long():
    with thread_server(max_queue=200, max_inputs=200, max_tokens=20) as url, client_of(url) as client:
        with connection(url) as busy:
            busy.sendall(request_of([SLOW] * 200))
            until(lambda: counted(client, "queue_rows") > 0)
            refused = client.post("/predict", json={"inputs": [SLOW] * 200})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "queue is full" in refused.json()["error"]
        until(lambda: client.post("/predict", json={"inputs": "a"}).status_code == 200)
    with thread_server(max_tokens=20, max_wait_ms=100) as url, client_of(url) as client:
        late = client.post("/predict", json={"inputs": [SLOW] * 100})
        assert late.status_code == 503 and "waited too long" in late.json()["error"]
        lines = client.post("/predict", json={"inputs": [SLOW] * 100}, headers=LINES).text.splitlines()
        errors = [json.loads(line).get("error_type") for line in lines]
        assert len(errors) == 100 and errors.count("Overloaded") > 50 and None in errors
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


@pytest.mark.parametrize("headers", [b"", b"Accept: application/x-ndjson\r\n"])
def test_rows_of_a_client_that_has_gone_are_dropped(headers):
    with thread_server(max_tokens=20) as url, client_of(url) as client:
        rows = counted(client, "rows_total")
        with connection(url) as gone:
            gone.sendall(request_of([SLOW] * 200).replace(b"\r\n", b"\r\n" + headers, 1))
            until(lambda: counted(client, "rows_total") > rows)
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200
        assert counted(client, "queue_rows") == 0 and counted(client, "rows_total") - rows < 100


def test_half_requests_and_a_client_that_does_not_read(client):
    whole, url, gone = request_of("a"), client.base_url, counted(client, "requests_total", status="499")
    with connection(url) as half:
        half.sendall(whole[:-3])
    until(lambda: counted(client, "requests_total", status="499") > gone)
    with connection(url) as wrong:
        wrong.sendall(b"no HTTP\r\n\r\n")
        assert wrong.recv(2**16).startswith(b"HTTP/1.1 400 ")
    with connection(url) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(10):
            lazy.sendall(request_of(TEXTS[:100]))
        for _ in range(5):
            assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_health_info_and_metrics():
    # the servers of one process write to the same counts, of which those of the newest are right
    with thread_server() as url, client_of(url) as client:
        assert client.get("/health").json() == {"ready": True}
        info = client.get("/info").json()
        assert info["labels"] == ["negative", "positive"] and info["depth"] == 4 and info["limits"]["max_inputs"] == 256
        assert info["max_length"] == MAX_LENGTH and info["model"] == "faulty" and info["versions"]["torch"]
        assert info["criterion"]["name"] == "max_probability" and info["calibration"] is None
        before = counted(client, "rows_total"), counted(client, "requests_total", path="/predict", status="200")
        assert client.post("/predict", json={"inputs": TEXTS[:20]}).status_code == 200
        client.get("/nowhere")
        assert counted(client, "rows_total") == before[0] + 20
        assert counted(client, "requests_total", path="/predict", status="200") == before[1] + 1
        assert counted(client, "requests_total", path="other", status="404") >= 1
        text = client.get("/metrics").text
        assert "earlyexit_predict_seconds_bucket" in text and "earlyexit_tokens_total" in text
        assert "/nowhere" not in text and "earlyexit_calibrated_share" not in text  # this model has no calibration
        fields = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
        assert set(fields["application/json"]["schema"]["properties"]) == {"inputs", "truncate", "raw_scores"}


def test_status_page_and_drift(tmp_path, caplog):
    with thread_server(Calibrated()) as url, client_of(url) as client:
        shares = client.get("/info").json()["calibration"]["exit_shares"]
        odd = [TEXTS[0]] * 100
        for _ in range(11):  # one layer only, for more than a window of the comparison
            client.post("/predict", json={"inputs": odd}).raise_for_status()
        for layer, share in enumerate(shares, start=1):
            assert counted(client, "calibrated_share", exit_layer=str(layer)) == pytest.approx(share)
        assert counted(client, "recent_rows") == 1000 and counted(client, "exit_drift") == 1
        answer = client.get("/")
        rows = counted(client, "rows_total")
    text, page = answer.text, Page(answer.text)
    assert answer.headers["content-security-policy"] == server.PAGE_HEADERS["Content-Security-Policy"]
    assert not page.problems and not page.loaded and "<script" not in text
    assert ("meta", {"http-equiv": "refresh", "content": "2"}) in page.elements
    tiles = dict(re.findall(r'<dd id="(\w+)">([^<]*)</dd>', text))
    assert tiles["workers"] == "1 of 1" and int(tiles["requests"]) >= 11 and float(tiles["median"]) > 0
    assert float(tiles["rate"]) > 0 and tiles["mean"].endswith(" of 4") and tiles["queue"] == "0"
    assert text.count('class="mark"') == 2 * sum(share > 0 for share in shares)
    assert "faulty, " in text and "other layers than in the calibration" in text
    shown = [int(number) for number in re.findall(r"%, (\d+)</td>", text)]
    assert sum(shown[:4]) == rows and sum(shown[4:8]) == 1000 and f">{'layer 4'}<" in text
    if BROWSER is not None:
        for width in (360, 1200):
            contents, window, _, logged = overflow(text.replace('content="2"', 'content="99"'), width, tmp_path)
            assert window == width and contents <= width and not logged


def test_options_are_checked():
    with pytest.raises(ValueError, match="--max-inputs: expected at most --max-queue = 5, got 10"):
        Options(source=FaultySource(), max_inputs=10, max_queue=5)
    with pytest.raises(ValueError, match="port"):
        Options(source=FaultySource(), port=70_000)
