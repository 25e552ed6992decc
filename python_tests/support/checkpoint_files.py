"""Files of a checkpoint, and changes to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, *dropped: str, **values: Any) -> None:
    """Set entries of the config, and drop others."""
    changed = {**config_of(folder), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if k not in dropped}))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
