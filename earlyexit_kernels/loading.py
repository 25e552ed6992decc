"""What a checkpoint must hold: every weight, in place, in a safetensors file that is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from earlyexit_kernels.errors import MissingHeadsError


def check_loaded(info: Mapping[str, Any], source: Any, *, allow_new_heads: bool) -> None:
    """Raise where transformers had to make weights up, or to leave some out.

    Args:
        info: the loading info of transformers.
        source: of the checkpoint, for the message.
        allow_new_heads: accept missing weights, which are then freshly initialised.

    Raises:
        MissingHeadsError: the checkpoint lacks weights.
        RuntimeError: weights have another shape, or no place in the model.
    """
    missing = sorted(info["missing_keys"])
    if missing and not allow_new_heads:
        raise MissingHeadsError(
            f"the checkpoint {str(source)!r} lacks {_listed(missing)}, which would be random numbers. Train and save "
            "the model, or pass allow_new_heads=True to start with fresh ones"
        )
    wrong = {
        "have another shape than the config says": [str(key[0]) for key in info["mismatched_keys"]],
        "have no place in the model the config describes": info["unexpected_keys"],
    }
    for problem, keys in wrong.items():
        if keys:
            raise RuntimeError(
                f"the checkpoint {str(source)!r}: {_listed(sorted(keys))} {problem}; config.json and the weights are "
                "of different models"
            )


def _listed(keys: list[str]) -> str:
    more = "" if len(keys) <= 5 else f" and {len(keys) - 5} more"
    return f"{len(keys)} weight(s): {', '.join(keys[:5])}{more}"


def corrupt_files(source: Any) -> str:
    """Names of the safetensors files in a local folder that can't be opened, or the source's own name."""
    folder = Path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    broken = []
    for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            broken.append(str(path))
    return ", ".join(broken) or str(source)
