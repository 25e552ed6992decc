"""Checks of a checkpoint: all weights are present, in complete safetensors files of the same save as the config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from earlyexit_kernels.errors import MissingHeadsError
from earlyexit_kernels.hf.weight_files import StoredTensor, digest, find_file

CONFIG = "config.json"
#: Entry of the saved config: the digest of the weights it was saved with.
DIGEST = "weights_digest"


def check_loaded(
    info: Mapping[str, Any], source: Any, tensors: Mapping[str, StoredTensor], *, allow_new_heads: bool
) -> None:
    """Refuse a load in which transformers initialised missing weights or ignored some of the checkpoint.

    Args:
        info: the loading info of transformers.
        source: of the checkpoint, for the message.
        tensors: tensors in its files, for the message.
        allow_new_heads: accept missing weights of the exits, which are then randomly initialised.

    Raises:
        MissingHeadsError: the checkpoint lacks weights.
        RuntimeError: weights have another shape, or are not part of the model.
    """
    missing = sorted(info["missing_keys"])
    encoder = [name for name in missing if not name.startswith("heads.")]
    if encoder:
        raise MissingHeadsError(
            f"the checkpoint {str(source)!r} lacks {_listed(encoder)} of the encoder, which would be random; "
            "copy the whole checkpoint again, or save the model again"
        )
    if missing and not allow_new_heads:
        raise MissingHeadsError(
            f"the checkpoint {str(source)!r} lacks {_listed(missing)}, which would be random. Train and save "
            "the model, or pass allow_new_heads=True to start with fresh ones"
        )
    mismatched = [
        f"{key} {tuple(found)} in {_file_of(key, tensors)}, {tuple(expected)} by the config"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    wrong = {
        "have another shape than in the config": mismatched,
        "are not part of the model in the config": sorted(info["unexpected_keys"]),
    }
    for problem, keys in wrong.items():
        if keys:
            raise RuntimeError(
                f"the checkpoint {str(source)!r}: {_listed(keys)} {problem}; config.json and the weights are "
                "of different models, use the two files of one save"
            )


def record_digest(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the digest of the weights into the config saved with them."""
    path = folder / CONFIG
    if tensors and path.is_file():
        data = {**json.loads(path.read_text(encoding="utf-8")), DIGEST: digest(tensors)}
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_one_save(source: Any, tensors: Mapping[str, StoredTensor], arguments: Mapping[str, Any]) -> None:
    """Refuse a config and weights of different saves; a config without a digest is accepted.

    Args:
        source: folder or hub name.
        tensors: tensors in the files of weights.
        arguments: of `from_pretrained`. A variant shares its config with other weights and is not checked.

    Raises:
        RuntimeError: the weights are not those that the config was saved with.
    """
    if not tensors or arguments.get("variant") or os.path.isfile(source):
        return
    path = find_file(source, CONFIG, arguments)
    expected = None if path is None else json.loads(path.read_text(encoding="utf-8")).get(DIGEST)
    if expected is None or expected == digest(tensors):
        return
    files = ", ".join(sorted({str(tensor.file) for tensor in tensors.values()}))
    raise RuntimeError(
        f"{path} and {files} are of different saves: the weights are not those that the config was saved with, so the "
        "model would answer as neither. Use the files of one save; if the weights were changed on purpose, remove "
        f"{DIGEST!r} from {path}"
    )


def _file_of(key: str, tensors: Mapping[str, StoredTensor]) -> str:
    return str(tensors[key].file) if key in tensors else "the weights"


def _listed(keys: list[str]) -> str:
    more = "" if len(keys) <= 5 else f" and {len(keys) - 5} more"
    return f"{len(keys)} weight(s): {', '.join(keys[:5])}{more}"


def corrupt_files(source: Any) -> str:
    """Return the names of the corrupt safetensors files in a local folder, or the name of the source."""
    folder = Path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    broken = []
    for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            broken.append(str(path))
    return ", ".join(broken) or str(source)
