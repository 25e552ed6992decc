"""Without a network: the hub is asked once, and nothing is tried again."""

from __future__ import annotations

import threading

import pytest
from support.commands import error_of

from earlyexit_kernels.tasks import hub
from earlyexit_kernels.tasks.sources import DATA_VARIABLE


class Session:
    """Stands in for the hub's HTTP client."""

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, 0

    def head(self, url, timeout):
        self.asked += 1
        return self.answer()


def _status(code):
    return lambda: type("Response", (), {"status_code": code})()


def _no_network():
    raise RuntimeError("no such host")


@pytest.mark.parametrize(
    ("answer", "reason"), [(_status(200), ""), (_status(403), ""), (_status(503), "503"), (_no_network, "no such host")]
)
def test_the_hub_is_asked_once(monkeypatch, answer, reason):
    session = Session(answer)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    with hub.offline_if_unreachable() as found:
        assert (reason in found) if reason else found == ""
        assert bool(reason) == hub.constants.HF_HUB_OFFLINE
    assert session.asked == 1 and not hub.constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.01)
    monkeypatch.setattr(hub, "get_session", lambda: Session(answered.wait))
    assert "no answer" in hub.unreachable_reason()
    answered.set()


@pytest.mark.parametrize("what", ["--model", "--task"])
def test_without_a_network_nothing_is_tried_again(capsys, base, small_task, tmp_path, monkeypatch, what):
    if what == "--task":
        pytest.importorskip("datasets")

    def again(seconds):
        pytest.fail("waits to try again")

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable_reason", lambda: "no such host")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", again)
    given = {"--model": str(base), "--task": "toy", what: {"--model": "nobody/nothing", "--task": "sst2"}[what]}
    arguments = [word for pair in given.items() for word in pair]
    message = error_of(capsys, ["train", *arguments, "--holdout", "24", "--output", str(tmp_path / "out")])
    assert "(no such host)" in message and "connect, or" in message
