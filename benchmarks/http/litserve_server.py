"""The model behind LitServe, which answers a batch when it ends; its workers load the class by name."""

from __future__ import annotations

import argparse
from typing import Any

import litserve

import earlyexit_kernels as ee


class Api(litserve.LitAPI):
    """A scorer behind LitServe.

    Args:
        model: folder of the model.
        largest: rows of a batch.
    """

    def __init__(self, model: str, largest: int) -> None:
        super().__init__(max_batch_size=largest, batch_timeout=0.002)
        self.folder = model

    def setup(self, device: str) -> None:
        """Load the model."""
        self.scorer = ee.Scorer(self.folder, drift_window=None)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe makes a query field of a type
        """Return the text."""
        return request["inputs"]

    def predict(self, texts: list[str]) -> dict[str, Any]:
        """Return the columns of the answers."""
        return self.scorer(list(texts))

    def unbatch(self, output: dict[str, Any]) -> Any:
        """Return one answer for each text."""
        return [dict(zip(output, row, strict=True)) for row in zip(*output.values(), strict=True)]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return an answer."""
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--largest", type=int, required=True)
    args = parser.parse_args()
    server = litserve.LitServer(Api(args.model, args.largest), accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False)
