"""The hub without a network: it is asked once, and no request is repeated."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
from support.commands import error_of

from earlyexit_kernels.cli import base_model
from earlyexit_kernels.tasks import hub
from earlyexit_kernels.tasks.sources import DATA_VARIABLE


class Session:
    """Fake of the hub's HTTP client; counts its requests."""

    def __init__(self, answer) -> None:
        self.answer, self.requests = answer, 0

    def head(self, url, timeout):
        self.requests += 1
        return self.answer()


def _status(code):
    return lambda: type("Response", (), {"status_code": code})()


def _no_network():
    raise RuntimeError("no such host")


@pytest.mark.parametrize(
    ("answer", "reason"), [(_status(200), ""), (_status(403), ""), (_status(503), "503"), (_no_network, "no such host")]
)
def test_offline_mode_follows_the_answer_of_the_hub(monkeypatch, answer, reason):
    session = Session(answer)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    with hub.offline_if_unreachable() as why:
        assert (reason in why) if reason else why == ""
        assert bool(reason) == hub.constants.HF_HUB_OFFLINE
    assert session.requests == 1 and not hub.constants.HF_HUB_OFFLINE


def test_hub_that_does_not_answer_times_out(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", 0.01)
    monkeypatch.setattr(hub, "get_session", lambda: Session(answered.wait))
    assert "no answer" in hub.unreachable_reason()
    answered.set()


@pytest.mark.parametrize("what", ["--model", "--task"])
def test_without_a_network_requests_are_not_repeated(capsys, base, small_task, tmp_path, monkeypatch, what):
    if what == "--task":
        pytest.importorskip("datasets")

    def sleep(seconds):
        pytest.fail("waits to repeat a request")

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable_reason", lambda: "no such host")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)
    given = {"--model": str(base), "--task": "toy", what: {"--model": "nobody/nothing", "--task": "sst2"}[what]}
    arguments = [word for pair in given.items() for word in pair]
    message = error_of(capsys, ["train", *arguments, "--holdout", "24", "--output", str(tmp_path / "out")])
    assert "(no such host)" in message and "connect, or" in message


def test_train_asks_the_hub_once(capsys, tmp_path, monkeypatch):
    """The task and the model both come from the hub."""
    pytest.importorskip("datasets")
    session = Session(_status(200))
    rows = HubRows(sentence=["the plot was dull .", "the cast was witty ."], label=[0, 1])
    data = {"train": rows, "validation": rows}
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: data)
    monkeypatch.setattr(base_model, "_load_stock", _raise_os_error)
    arguments = ["--model", "nobody/nothing", "--task", "sst2", "--holdout", "0", "--output", str(tmp_path)]
    assert "no such model" in error_of(capsys, ["train", *arguments])
    assert session.requests == 1


class HubRows(dict):
    """Rows of a split as returned by `datasets`, without names of the classes."""

    features: ClassVar = {"label": None}


def _raise_os_error(name, task):
    raise OSError("no such model")
