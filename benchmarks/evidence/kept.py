"""What is kept of a trained model: the answers of all exits on its rows, so that a later question needs no training.

A file holds for the rows to choose settings on (``tuning``) and the rows to report on (``reporting``):

- ``{split}_logits`` ``[N, L, K]`` float16: for numbers K = 1; for classes K = C - 1, with those of the first one
  subtracted and left out, since only differences of logits are read;
- ``{split}_halting``, ``{split}_uncertainty`` ``[N, L]`` float16, logits, of models that have them;
- ``{split}_labels`` ``[N]``, ``{split}_tokens`` ``[N]`` uint16;
- ``{split}_{draw}_logits``, as ``{split}_logits``, of the same rows with changed words;
- ``{split}_{arm}_answers``, ``_exit_layer``, ``_layers_run`` ``[settings, N]`` uint8: of runs that skip layers, which a
  replay cannot know; the settings of an arm are in ``meta``;
- ``meta``: JSON, see `Kept`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import harness
from earlyexit_kernels.types import ExitTrace

FOLDER = harness.RESULTS / "kept"
SPLITS = ("tuning", "reporting")
AUX = ("halting", "uncertainty")
REGRESSION = "regression"


class DamagedError(ValueError):
    """A file of kept answers cannot be read."""


@dataclass(frozen=True)
class Costs:
    """Multiply-adds as polynomials of the tokens S of a row: coefficients of 1, S and S S.

    Attributes:
        embedding, layer, gate: of the projection of the embeddings, one layer, and one gate.
        exits: of one exit, by the scalar that is computed with it, ``""`` for none.
    """

    embedding: tuple[float, ...]
    layer: tuple[float, ...]
    gate: tuple[float, ...]
    exits: Mapping[str, tuple[float, ...]]

    @staticmethod
    def of(coefficients: tuple[float, ...], tokens: NDArray) -> NDArray:
        """Return the multiply-adds of rows with `tokens` ``[N]``."""
        return np.polynomial.polynomial.polyval(tokens.astype(np.float64), coefficients)


@dataclass(frozen=True)
class Kept:
    """The answers of a trained model.

    Attributes:
        name: of the training.
        metric, problem_type: of the task.
        method: settings of the training method.
        rule: that the method is made for.
        command: that trains the model.
        costs: of its parts.
        arms: settings of each arm that skips layers.
        data: SHA-256 of the files of rows, by name.
        seconds: of the training.
        environment: machine, versions and commit.
        arrays: as in the docstring of this module.
    """

    name: str
    metric: str
    problem_type: str
    method: dict[str, Any]
    rule: str
    command: str
    costs: Costs
    arms: dict[str, list[dict[str, Any]]]
    data: dict[str, str]
    seconds: dict[str, int]
    environment: dict[str, Any]
    arrays: dict[str, NDArray]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.arrays["tuning_logits"].shape[1]

    def labels(self, split: str) -> NDArray:
        """Return the labels ``[N]`` of a split."""
        return self.arrays[f"{split}_labels"]

    def tokens(self, split: str) -> NDArray:
        """Return the tokens ``[N]`` of the rows of a split."""
        return self.arrays[f"{split}_tokens"]

    def draws(self, split: str, kind: str) -> list[str]:
        """Return the names of the draws of a kind of changed words, as `trace` takes them."""
        prefix, end = f"{split}_", "_logits"
        names = (name.removeprefix(prefix).removesuffix(end) for name in self.arrays if name.startswith(prefix + kind))
        return sorted(names)

    def trace(self, split: str, draw: str = "") -> ExitTrace:
        """Return the trace of a split, or of one of its draws of changed words; keys number the rows."""
        kept = torch.from_numpy(self.arrays[f"{split}_{draw}_logits" if draw else f"{split}_logits"]).float()
        logits = kept if self.problem_type == REGRESSION else torch.cat((torch.zeros_like(kept[..., :1]), kept), dim=-1)
        aux = {} if draw else {n: self.arrays[f"{split}_{n}"] for n in AUX if f"{split}_{n}" in self.arrays}
        keys = torch.arange(len(logits)) if "halting" in aux else None
        tensors = {name: torch.from_numpy(values).float() for name, values in aux.items()}
        return ExitTrace(logits, tensors, keys, problem_type=self.problem_type)

    def save(self, folder: Path = FOLDER) -> Path:
        """Write the file, whole or not at all, and return its path."""
        meta = dataclasses.asdict(dataclasses.replace(self, arrays={}))
        del meta["arrays"]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **self.arrays)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.npz"
        beside = path.with_suffix(f".{os.getpid()}.part")
        beside.write_bytes(buffer.getvalue())
        beside.replace(path)
        return path


def packed_logits(logits: torch.Tensor, problem_type: str) -> NDArray:
    """Return the logits ``[N, L, C]`` of a trace as they are kept."""
    kept = logits if problem_type == REGRESSION else logits[..., 1:] - logits[..., :1]
    return kept.to(torch.float16).numpy()


def load(path: Path) -> Kept:
    """Read a file of `Kept.save`.

    Raises:
        DamagedError: it is cut short or not such a file.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(bytes(arrays.pop("meta")))
        costs = meta.pop("costs")
        exits = {name: tuple(values) for name, values in costs.pop("exits").items()}
        made = Costs(**{name: tuple(values) for name, values in costs.items()}, exits=exits)
        return Kept(**meta, costs=made, arrays=arrays)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and `make evidence` trains it again"
        ) from error
