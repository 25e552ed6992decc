"""What a request must pass: the rate of its client, and the API key; and the reading of bodies."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi")

from earlyexit_kernels.serving.http import guard
from earlyexit_kernels.serving.http.guard import RateLimit, check_key, read_body
from earlyexit_kernels.serving.http.lines import ClientGoneError
from earlyexit_kernels.serving.http.requests import RefusedError


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_rate_of_a_client():
    clock = Clock()
    limit = RateLimit(2.0, clock)
    assert [limit.wait("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    assert limit.wait("b") == 0.0
    clock.now = 0.25
    assert limit.wait("a") == pytest.approx(0.25)
    clock.now = 0.5
    assert limit.wait("a") == 0.0 and limit.wait("a") == pytest.approx(0.5)
    clock.now = 1000.0
    assert [limit.wait("a") for _ in range(3)] == [0.0, 0.0, 0.5]


def test_a_rate_below_one_a_second_lets_one_pass():
    clock = Clock()
    limit = RateLimit(0.1, clock)
    assert limit.wait("a") == 0.0 and limit.wait("a") == pytest.approx(10.0)


def test_the_clients_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(guard, "CLIENTS", 3)
    limit = RateLimit(1.0, Clock())
    for name in "abcd":
        limit.wait(name)
    assert limit.wait("d") > 0 and limit.wait("a") == 0.0


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "key", "Basic key", "Bearer key key"])
def test_wrong_keys(given):
    with pytest.raises(RefusedError, match="expected the header Authorization") as refused:
        check_key("key", given)
    assert refused.value.status == 401 and refused.value.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(("expected", "given"), [(None, None), (None, "x"), ("key", "Bearer key"), ("k", "bearer  k ")])
def test_right_keys(expected, given):
    check_key(expected, given)


def body_of(*messages, seconds=60.0, declared=None):
    waiting = list(messages)

    async def receive():
        if not waiting:
            await asyncio.sleep(3600)
        return waiting.pop(0)

    return asyncio.run(read_body(receive, declared, max_bytes=8, seconds=seconds))


def test_bodies():
    more = {"type": "http.request", "body": b"1234", "more_body": True}
    last = {"type": "http.request", "body": b"5678"}
    assert body_of(more, last) == b"12345678" and body_of({"type": "http.request"}) == b""
    for refused, status in (((more, more, last), 413), ((more,), 408)):
        with pytest.raises(RefusedError) as error:
            body_of(*refused, seconds=0.01)
        assert error.value.status == status
    with pytest.raises(RefusedError, match="at most 8 bytes"):
        body_of(last, declared="9")
    with pytest.raises(ClientGoneError):
        body_of(more, {"type": "http.disconnect"})
