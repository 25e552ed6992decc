"""Users of locust who ask for one text after the other, without a pause."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from locust import FastHttpUser, constant, task

_TEXTS = Path(os.environ["TEXTS"]).read_text(encoding="utf-8").splitlines()
_NEXT = itertools.count()


class User(FastHttpUser):
    """A client with one request under way."""

    wait_time = constant(0)

    @task
    def predict(self) -> None:
        """Ask for a text."""
        with self.client.post(
            "/predict", json={"inputs": _TEXTS[next(_NEXT) % len(_TEXTS)]}, catch_response=True
        ) as answer:
            if answer.status_code == 200 and "exit_layer" not in answer.text:
                answer.failure("no exit layer")
