"""The safetensors files of a checkpoint: their names, their headers, and a digest of their tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

#: Supported dtypes of weights, as safetensors names them.
FLOATING = ("F64", "F32", "F16", "BF16")
#: Bytes that the digest reads at each end of a longer tensor; every training step changes both ends.
SAMPLE_BYTES = 32 * 1024
#: Arguments of `from_pretrained` that locate its files.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, with its offsets in bytes and its dtype as safetensors names it (``"F32"``)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def find_file(source: Any, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """Return the local path of a file of a checkpoint, downloaded if necessary, or None if there is no such file."""
    found = cached_file(
        os.fspath(source),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        **{key: value for key, value in arguments.items() if key in HUB_ARGUMENTS},
    )
    return None if found is None else Path(found)


def find_weights(source: Any, arguments: Mapping[str, Any]) -> list[Path]:
    """Return the files from which `from_pretrained` reads the weights of a folder, file or hub name; maybe none.

    Raises:
        ValueError: a file that is not safetensors, or an index that names one, or one outside of the folder.
        OSError: a file that the index names is missing.
    """
    if os.path.isfile(source):
        if not str(source).endswith(".safetensors"):
            raise ValueError(f"{source}: expected a safetensors file; weights of other forms are never read")
        return [Path(source)]
    variant = f".{arguments['variant']}" if arguments.get("variant") else ""
    if single := find_file(source, f"model{variant}.safetensors", arguments):
        return [single]
    index = find_file(source, f"model.safetensors.index{variant}.json", arguments)
    shards = {name: find_file(source, name, arguments) for name in (_shard_names(index) if index else ())}
    for name, shard in shards.items():
        if shard is None:
            raise OSError(
                f"{index} names {name!r}, which {str(source)!r} does not have; copy the whole checkpoint again"
            )
    return [shard for shard in shards.values() if shard]


def _shard_names(index: Path) -> list[str]:
    """Return the files named by an index. Only names are checked, since the files in the hub's cache are links.

    Raises:
        ValueError: not an index, or it names a file that is not a safetensors file in the same folder.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not an index of weights: {error}; save the model again") from error
    table = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(table, dict) or not isinstance(data.get("metadata"), dict):
        raise ValueError(
            f"{index} is not an index of weights: expected 'weight_map' and 'metadata'; save the model again"
        )
    for key, name in table.items():
        plain = isinstance(name, str) and PurePosixPath(name).name == name and not {"\\", "\0"} & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {key!r} is said to be in {name!r}; expected the name of a safetensors file in the same "
                "folder, other files are never read. Do not trust this checkpoint"
            )
    return sorted(set(table.values()))


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors in safetensors files by name.

    Raises:
        RuntimeError: a file is corrupt or cut short, or a tensor is not floating-point: a load would convert it in
            silence.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise RuntimeError(f"{path} is corrupt or cut short: {error}") from error
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), begin, end)
            if entry["dtype"] not in FLOATING:
                raise RuntimeError(
                    f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(FLOATING)}; quantized "
                    "weights are not supported, save the model with floating-point ones"
                )
    return tensors


def check_finite(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: names the tensor.
    """
    for path in {tensor.file for tensor in tensors.values()}:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                if value.numel() and value.is_floating_point() and not all(map(torch.isfinite, value.aminmax())):
                    raise ValueError(
                        f"save_pretrained: {name} has NaN or infinite values, and such weights are not saved. Training "
                        "has diverged: start it again from an earlier checkpoint or from the stock model, with a lower "
                        "learning rate"
                    )


def digest(tensors: Mapping[str, StoredTensor]) -> str:
    """Return a digest of names, dtypes, shapes and values (of long tensors the first and last ones)."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.file.open("rb") as file:
            middle = max(tensor.begin, tensor.end - SAMPLE_BYTES)
            for begin, end in ((tensor.begin, min(tensor.begin + SAMPLE_BYTES, middle)), (middle, tensor.end)):
                file.seek(begin)
                result.update(file.read(end - begin))
    return result.hexdigest()
