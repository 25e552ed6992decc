"""Damaged checkpoints are refused with a documented error, or give the answers of the intact one.

Other answers are allowed where a field of the config has another valid value, or where only the criterion is gone.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import early_exit, ragged
from support.random_settings import chance, choice

from earlyexit_kernels import EarlyExitForSequenceClassification, criteria

REFUSED = (ValueError, RuntimeError, OSError)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: Values that are invalid, or out of range, for most fields of a config.
INVALID = (
    *(None, "x", "", [], {}, [1, 2], {"a": 1}, True, "1"),
    *(-1, 0, 10**7, 2**40, -0.5, 1e30, math.nan, math.inf, 1.5),
)
SPECS: tuple[dict[str, Any], ...] = (
    {"criterion": criteria.Entropy(threshold=0.9)},
    {"family": "albert", "method": "palbert", "criterion": criteria.QExit(q=0.4)},
    {"family": "distilbert", "pooling": "mean", "criterion": criteria.Patience(patience=1)},
)


def answer(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(**ragged(lengths=(7, 3, 9)))
    return out.logits, out.exit_layer


@functools.cache
def intact(number: int) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Return the folder of an intact checkpoint, its logits and its exit layers."""
    folder = Path(tempfile.mkdtemp(prefix="deep-checkpoint-"))
    atexit.register(shutil.rmtree, folder)
    early_exit(num_hidden_layers=2, **SPECS[number]).save_pretrained(folder)
    return folder, *answer(EarlyExitForSequenceClassification.from_pretrained(folder))


#: What may differ: None, or ``(config before, config after) -> bool``.
Allowed = Callable[[Any, Any], bool] | None


def flipped_bits(draw: Any, folder: Path) -> Allowed:
    """Flip bits in the header or in the numbers of the weights."""
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    first, last = choice(draw, ((0, header - 1), (header, len(data) - 1)))
    for at in draw(st.sets(st.integers(first, last), min_size=1, max_size=4)):
        data[at] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)
    return None


def other_length(draw: Any, folder: Path) -> Allowed:
    path = folder / choice(draw, (WEIGHTS, CONFIG))
    data = path.read_bytes()
    kept = choice(draw, (0, 1, 8, len(data) // 2, len(data) - 1, draw(st.integers(0, len(data) - 1))))
    path.write_bytes(data + b"\0" * draw(st.integers(1, 99)) if chance(draw, 20) else data[:kept])
    return None


def config_bytes(draw: Any, folder: Path) -> Allowed:
    data = bytearray((folder / CONFIG).read_bytes())
    for at in draw(st.sets(st.integers(0, len(data) - 1), min_size=1, max_size=3)):
        data[at] = draw(st.sampled_from(b'09"') | st.integers(0, 255))
    (folder / CONFIG).write_bytes(data)
    return lambda before, after: plausible(before, after) or lost_criterion(before, after)


def config_field(draw: Any, folder: Path) -> Allowed:
    """Remove a field of the config, or set an invalid value."""
    config = json.loads((folder / CONFIG).read_text())
    path = choice(draw, list(_paths(config)))
    *parents, name = path
    table = functools.reduce(dict.__getitem__, parents, config)
    removed = chance(draw, 30)
    if removed:
        del table[name]
    else:
        table[name] = choice(draw, INVALID)
    (folder / CONFIG).write_text(json.dumps(config))
    return lost_criterion if removed else plausible


def _paths(table: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every field, those of tables included."""
    for name, value in sorted(table.items()):
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *path) for path in _paths(value))


def lost_criterion(before: Any, after: Any) -> bool:
    """Return whether only the criterion is gone; the model then runs every layer."""
    return "criterion" not in after and all(after.get(k) == v for k, v in before.items() if k != "criterion")


def plausible(before: Any, after: Any) -> bool:
    """Return whether every changed value is valid for its field, so that other answers are correct."""
    if isinstance(before, dict) and isinstance(after, dict):
        return set(before) == set(after) and all(plausible(before[key], after[key]) for key in before)
    if isinstance(before, bool) or isinstance(after, bool):
        return isinstance(after, bool)
    if isinstance(before, int | float) and isinstance(after, int | float):
        return math.isfinite(after) and after >= 0
    return before == after or (isinstance(before, str) and isinstance(after, str) and len(after) > 1)


def changed_tensor(draw: Any, folder: Path) -> Allowed:
    """Change dtype, shape or name of a tensor, remove it, or add a copy."""
    state = load_file(folder / WEIGHTS)
    name = choice(draw, sorted(state))
    tensor = state.pop(name)
    others = {
        **{str(dtype): {name: tensor.to(dtype)} for dtype in (torch.int8, torch.int64, torch.bool)},
        "shape": {name: torch.zeros([size + 1 for size in tensor.shape])},
        "flat": {name: tensor.reshape(-1)[None]},
        "copy": {name: tensor, f"{name}_2": tensor.clone()},
        "name": {name.replace(".", "_", 1): tensor},
        "missing": {},
    }
    save_file(state | others[choice(draw, sorted(others))], folder / WEIGHTS, metadata={"format": "pt"})
    return None


def index(draw: Any, folder: Path) -> Allowed:
    """Write an index that names a pickle, a file outside of the folder or a missing one; the weights are right."""
    state = load_file(folder / WEIGHTS)
    outside = folder.parent / "outside.safetensors"
    kinds = {"pickle": "model.bin", "outside": f"../{outside.name}", "absolute": str(outside), "gone": "a.safetensors"}
    named = choice(draw, (*kinds.values(), WEIGHTS))
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / kinds["pickle"])
    save_file(state, outside, metadata={"format": "pt"})
    if named == WEIGHTS:
        save_file(dict(list(state.items())[:-1]), folder / WEIGHTS, metadata={"format": "pt"})
    listed: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, named)}
    listed = choice(draw, INVALID) if chance(draw, 15) else listed
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    return None


def pickle(draw: Any, folder: Path) -> Allowed:
    """Write pickled weights instead of, or in addition to, the safetensors file."""
    torch.save({name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / "pytorch_model.bin")
    if chance(draw, 50):
        (folder / WEIGHTS).unlink()
    return None


def other_save(draw: Any, folder: Path) -> Allowed:
    """Mix in the config or the weights of another save of the same model."""
    name = choice(draw, (WEIGHTS, CONFIG))
    other = early_exit(num_hidden_layers=2, seed=1, **SPECS[int(folder.name)])
    with tempfile.TemporaryDirectory(prefix="deep-other-") as saved:
        other.save_pretrained(saved)
        shutil.copy(Path(saved) / name, folder / name)
    return None


def no_file(draw: Any, folder: Path) -> Allowed:
    """Remove a file, or replace it by a folder or a dangling link."""
    path = folder / choice(draw, (WEIGHTS, CONFIG))
    path.unlink()
    choice(draw, (lambda: None, path.mkdir, lambda: os.symlink(folder / "nowhere", path)))()
    return None


DAMAGE = (
    *(config_field, config_bytes, flipped_bits, other_length, changed_tensor, index, pickle, other_save, no_file),
)


@given(st.sampled_from(range(len(SPECS))), st.sampled_from(DAMAGE), st.data())
def test_damaged_checkpoint(number, damage, data):
    original, logits, exit_layer = intact(number)
    with tempfile.TemporaryDirectory(prefix="deep-damaged-") as name:
        folder = Path(shutil.copytree(original, Path(name) / str(number)))
        allowed = damage(data.draw, folder)
        try:
            got = answer(EarlyExitForSequenceClassification.from_pretrained(folder, local_files_only=True))
        except REFUSED:
            return
        assert damage is not index, "an index of files that are never read was accepted"
        same = got[0].shape == logits.shape and torch.equal(got[1], exit_layer)
        if same and torch.allclose(got[0], logits, rtol=1e-5, atol=1e-5):
            return
        configs = (json.loads((path / CONFIG).read_bytes()) for path in (original, folder))
        assert allowed is not None and allowed(*configs), "loaded, with other answers"
