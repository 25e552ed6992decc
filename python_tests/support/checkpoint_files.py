"""Files of a checkpoint, and changes to its config."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = "model.safetensors"


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
