"""The parts of a server that belong together: application, tokenizer, workers and counts."""

from __future__ import annotations

from typing import Any

import prometheus_client

from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.serving.http.app import create_app
from earlyexit_kernels.serving.http.metrics import Metrics
from earlyexit_kernels.serving.http.pool import Pool
from earlyexit_kernels.serving.http.requests import Tokenizer
from earlyexit_kernels.serving.http.settings import Settings


class Service:
    """An application that answers once it has started.

    Args:
        settings: of the server.

    Attributes:
        app: ASGI application.
        pool: the workers.

    Raises:
        OSError: the folder has no tokenizer.
        ValueError: the tokenizer cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        prometheus_client.disable_created_metrics()  # a second line for each, of which nothing here makes use
        self._settings, self._metrics, self._tokenizer = settings, Metrics(), Tokenizer(settings.model)
        self.pool = Pool(settings, self._metrics.rows)
        self.app = create_app(self.pool, self._tokenizer, self._metrics)

    async def start(self) -> None:
        """Start the workers and wait until all are ready.

        Raises:
            ValueError: the model cannot be loaded, or has no threshold that requests may choose.
        """
        await self.pool.start()
        check_thresholds(self._settings, self.pool.info)
        self._metrics.begin(self.pool)
        longest, tokenizer = self.pool.info["max_length"], self._tokenizer
        tokenizer.max_length = min(self._settings.max_length or longest, longest, tokenizer.max_length)

    async def stop(self) -> None:
        """End the workers; inputs without an answer are lost."""
        await self.pool.stop()


def check_thresholds(settings: Settings, info: dict[str, Any]) -> None:
    """Check that requests can choose a threshold, if the settings let them.

    Raises:
        ValueError: the criterion of the model has no threshold, one for each layer, or not these.
    """
    for end in (settings.min_threshold, settings.max_threshold):
        if end is None:
            return
        rule = info["criterion"]
        if not isinstance(rule.get("threshold"), float) or info["skips_layers"]:
            raise ValueError(
                "--min-threshold: expected a model whose criterion has one threshold and skips no layers, its own is "
                f"{from_dict(rule)}"
            )
        from_dict({**rule, "threshold": end})
