"""The status page: it loads nothing from elsewhere, fits a phone, and shows the numbers of a live server."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.fake_worker import CALIBRATION, DEPTH
from support.html_pages import BROWSER, FLAGS, Page, overflow
from support.servers import client_of, fake_server

import earlyexit_kernels as ee
from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http.status_page import HEADERS, PAGE

TEXTS = [f"the plot was {word}" for word in ("dull", "witty", "funny", "superb", "lovely", "weak")]
NOW = {
    "model": "a_model_of_a_long_name_" * 4,
    "criterion": "Entropy(threshold=0.5025, normalized=False)",
    "uptime_seconds": 1.0,
    "ready": 1,
    "workers": 2,
    "restarts": 1,
    "queue_rows": 100_000,
    "requests": {"200": 10**9, "503": 3},
    "latency_ms": {"requests": 1000, "p50": 1234.56, "p99": 99999.9},
    "rows": 10**9,
    "exit_rows": [10**9 - 11, *range(1, 12)],
    "calibrated_shares": [0.5, 0.5, *[0] * 10],
    "drifting": True,
}
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def test_page_is_whole_and_loads_nothing():
    page = Page(PAGE)
    assert not page.problems and not page.loaded
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "prefers-color-scheme: dark" in PAGE and "innerHTML" not in PAGE
    named = set(re.findall(r'part\("(\w+)"\)', PAGE))
    assert named <= {values["id"] for _, values in page.elements if "id" in values}
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_the_window(width, tmp_path):
    answer = f"window.fetch = async () => ({{ok: true, status: 200, json: async () => ({json.dumps(NOW)})}})"
    source = PAGE.replace("<script>", f"<script>{answer}</script><script>")
    contents, window, charts, logged = overflow(source, width, tmp_path)
    assert window == width and contents <= width and charts == 2 and not logged


@needs_browser
def test_page_shows_a_live_server(tmp_path):
    toy.toy_tokenizer().save_pretrained(tmp_path)
    labels = torch.arange(200) % 2
    trace = ee.ExitTrace(torch.nn.functional.one_hot(labels, 2)[:, None] * 2.0 + torch.randn(200, DEPTH, 2))
    found = ee.calibrate(trace, labels, target=ee.SpeedUp(1.2))
    (tmp_path / CALIBRATION).write_text(json.dumps(found.to_dict()))
    with fake_server(tmp_path) as url, client_of(url) as client:
        assert client.get("/").headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        client.post("/predict", json={"inputs": TEXTS})
        now = client.get("/metrics.json").json()
        shown, logged = dumped(url, tmp_path)
    assert not logged
    assert shown["workers"] == "1 of 1" and shown["requests"] == "1" and shown["refused"] == "0"
    mean = sum(layer * rows for layer, rows in enumerate(now["exit_rows"], start=1)) / len(TEXTS)
    assert shown["mean"] == f"{mean:.2f} of {DEPTH}" and float(shown["median"]) > 0
    for rows in now["exit_rows"]:
        assert f"{100 * rows / len(TEXTS):.1f} %, {rows}</text>" in shown["page"]
    assert shown["page"].count('<line class="mark"') == DEPTH


@needs_browser
def test_page_of_a_server_with_a_key(tmp_path):
    toy.toy_tokenizer().save_pretrained(tmp_path)
    with fake_server(tmp_path, api_key="key") as url:
        shown, _ = dumped(url, tmp_path)  # the browser logs the refusal
    assert "This server expects an API key." in shown["page"] and '<form id="ask">' in shown["page"]


def dumped(url, folder):
    """Open a page in Chromium; return its text by id, the page itself as "page", and what was logged."""
    done = subprocess.run(
        [str(BROWSER), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", f"{url}/"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = dict(re.findall(r'<dd id="(\w+)">([^<]*)</dd>', done.stdout))
    return {**shown, "page": done.stdout}, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
