"""Target `checkpoints`: damaged checkpoints are refused with a documented error, or give the answers of the intact one.

Other answers are allowed if a field of the config was changed to another valid value. Changed bytes of weights can be
detected only if the config has a digest of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.models import early_exit, ragged

from earlyexit_kernels import EarlyExitForSequenceClassification, criteria
from fuzz.case import AcceptedError, Case

REFUSED = (ValueError, RuntimeError, OSError)
WEIGHTS = "model.safetensors"
#: Values that are invalid, or out of range, for most fields of a config.
INVALID = (
    None,
    "x",
    "",
    [],
    {},
    [1, 2],
    {"a": 1},
    -1,
    0,
    10**7,
    2**40,
    -0.5,
    1e30,
    math.nan,
    math.inf,
    True,
    "1",
    1.5,
)
SPECS: tuple[dict[str, Any], ...] = (
    {"criterion": criteria.Entropy(threshold=0.9)},
    {"family": "albert", "method": "palbert", "criterion": criteria.QExit(q=0.4)},
    {"family": "distilbert", "pooling": "mean", "criterion": criteria.Patience(patience=1)},
)


@functools.cache
def originals() -> tuple[Path, ...]:
    """Return folders of intact checkpoints."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-"))
    folders = []
    for k, spec in enumerate(SPECS):
        folders.append(root / str(k))
        early_exit(num_hidden_layers=2, **spec).save_pretrained(folders[-1])
    return tuple(folders)


@functools.cache
def answers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and exit layers of an intact checkpoint."""
    return answer(EarlyExitForSequenceClassification.from_pretrained(folder))


def answer(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(**ragged(lengths=(7, 3, 9)))
    return out.logits, out.exit_layer


def prepare() -> None:
    """Save and load once, before workers are forked."""
    for folder in originals():
        answers(folder)


def run(case: Case) -> None:
    """Load one damaged copy."""
    original = case.choice(originals())
    with tempfile.TemporaryDirectory(prefix="fuzz-damaged-") as name:
        folder = Path(name) / "model"
        shutil.copytree(original, folder)
        damage, allowed = case.choice(list(DAMAGE.values()))(case, folder)
        case.calls += 1
        try:
            model = EarlyExitForSequenceClassification.from_pretrained(folder, local_files_only=True)
            got = answer(model)
        except REFUSED:
            return
        logits, exit_layer = answers(original)
        same = got[0].shape == logits.shape and torch.equal(got[1], exit_layer)
        if same and torch.allclose(got[0], logits, rtol=1e-5, atol=1e-5):
            return
        if allowed is None or not allowed(model):
            raise AcceptedError(f"checkpoint with {damage}: loaded, with other answers")


Damaged = tuple[str, "Callable[[Any], bool] | None"]


def without_digest(model: Any) -> bool:
    """Return whether the config has no digest of the weights."""
    return not any("digest" in key or "sha" in key for key in model.config.to_dict())


def _bytes(case: Case, folder: Path) -> Damaged:
    """Flip bits in the header or in the numbers of the weights file."""
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    in_header = case.chance(0.5)
    for _ in range(case.integer(1, 4)):
        at = case.integer(0, header - 1) if in_header else case.integer(header, len(data) - 1)
        data[at] ^= 1 << case.integer(0, 7)
    path.write_bytes(data)
    # changed names and offsets are detected; changed numbers only with a digest
    return f"flipped bits in the {'header' if in_header else 'numbers'}", without_digest


def _length(case: Case, folder: Path) -> Damaged:
    path = folder / case.choice((WEIGHTS, "config.json"))
    data = path.read_bytes()
    kept = case.choice((0, 1, 8, len(data) // 2, len(data) - 1, case.integer(0, len(data) - 1)))
    longer = case.chance(0.2)
    path.write_bytes(data + b"\0" * case.integer(1, 99) if longer else data[:kept])
    return f"{path.name} {'made longer' if longer else 'cut short'}", None


def _config_bytes(case: Case, folder: Path) -> Damaged:
    path = folder / "config.json"
    before = json.loads(path.read_text())
    data = bytearray(path.read_bytes())
    for _ in range(case.integer(1, 3)):
        data[case.integer(0, len(data) - 1)] = case.choice((case.integer(0, 255), ord("0"), ord("9"), ord('"')))
    path.write_bytes(data)
    try:
        after = json.loads(data)
    except ValueError:
        return "bytes of config.json changed", None
    return "bytes of config.json changed", lambda model: plausible(before, after) or lost_criterion(before, after)


def _field(case: Case, folder: Path) -> Damaged:
    """Remove a field of the config, or set an invalid value."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    before = json.loads(path.read_text())
    at, names = config, []
    while True:
        name = case.choice(sorted(at))
        names.append(name)
        if not isinstance(at[name], dict) or not at[name] or case.chance(0.2):
            break
        at = at[name]
    removed = case.chance(0.3)
    if removed:
        del at[name]
    else:
        at[name] = case.choice(INVALID)
    path.write_text(json.dumps(config))
    what = "removed" if removed else f"= {json.dumps(at[name])}"
    return (
        f"config.{'.'.join(names)} {what}",
        lambda model: lost_criterion(before, config) if removed else plausible(before, config),
    )


def lost_criterion(before: Any, after: Any) -> bool:
    """Return whether only the criterion was removed; the model then runs every layer."""
    return "criterion" not in after and all(after.get(k) == v for k, v in before.items() if k != "criterion")


def plausible(before: Any, after: Any) -> bool:
    """Return whether every changed value is valid for its field, so that other answers are correct."""
    if isinstance(before, dict) and isinstance(after, dict):
        return set(before) == set(after) and all(plausible(before[key], after[key]) for key in before)
    if isinstance(before, bool) or isinstance(after, bool):
        return isinstance(after, bool)
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        return math.isfinite(after) and after >= 0
    return before == after or (isinstance(before, str) and isinstance(after, str) and len(after) > 1)


def _tensor(case: Case, folder: Path) -> Damaged:
    """Change dtype, shape or name of a tensor, remove it, or add a copy."""
    path = folder / WEIGHTS
    state = load_file(path)
    name = case.choice(sorted(state))
    kind = case.choice(("int8", "int64", "bool", "shape", "name", "missing", "extra", "flat"))
    tensor = state[name]
    if kind in ("int8", "int64", "bool"):
        state[name] = tensor.to(getattr(torch, kind))
    elif kind == "shape":
        state[name] = torch.zeros([size + 1 for size in tensor.shape])
    elif kind == "flat":
        state[name] = tensor.reshape(-1)[None]
    elif kind == "extra":
        state[f"{name}_2"] = tensor.clone()
    else:
        moved = state.pop(name)
        if kind == "name":
            state[name.replace(".", "_", 1)] = moved
    save_file(state, path, metadata={"format": "pt"})
    return f"a tensor ({kind})", None


def _index(case: Case, folder: Path) -> Damaged:
    """Write an index that names a pickle, a file outside of the folder, or a missing file."""
    path = folder / WEIGHTS
    state = load_file(path)
    other = {name: tensor + 1 for name, tensor in state.items()}
    kind = case.choice(("pickle", "outside", "absolute", "missing", "nonsense", "part"))
    named = {"pickle": "model.bin", "outside": "../outside.safetensors", "missing": "gone.safetensors"}.get(
        kind, WEIGHTS
    )
    path.unlink()
    if kind == "pickle":
        torch.save(other, folder / named)
    elif kind in ("outside", "absolute"):
        named = str(folder.parent / "outside.safetensors") if kind == "absolute" else named
        save_file(other, folder.parent / "outside.safetensors", metadata={"format": "pt"})
    elif kind == "part":
        save_file(dict(list(state.items())[:-1]), path, metadata={"format": "pt"})
    index: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, named)}
    if kind == "nonsense":
        index = case.choice(INVALID)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"an index ({kind})", None


def _pickle(case: Case, folder: Path) -> Damaged:
    """Write pickled weights instead of, or in addition to, the safetensors file."""
    state = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    if case.chance(0.5):
        (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return "a pickle", None


def _no_file(case: Case, folder: Path) -> Damaged:
    """Remove a file, or replace it by a folder or a dangling link."""
    path = folder / case.choice((WEIGHTS, "config.json"))
    path.unlink()
    if case.chance(0.5):
        path.mkdir()
    elif case.chance(0.5):
        os.symlink(folder / "nowhere", path)
    return f"no {path.name}", None


DAMAGE: dict[str, Callable[[Case, Path], Damaged]] = {
    "bytes": _bytes,
    "length": _length,
    "config bytes": _config_bytes,
    "field": _field,
    "more fields": _field,
    "tensor": _tensor,
    "index": _index,
    "pickle": _pickle,
    "no file": _no_file,
}
