"""Tables of generated sentences, as a user's own files."""

from __future__ import annotations

from pathlib import Path

from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import write_table

NAMES = ("bad", "good")


def write_rows(path: Path, rows: int, *, seed: int = 0, **columns: str) -> Path:
    """Write generated sentences with their labels; `columns` renames text and label."""
    found = toy.write_splits(seed=seed, train_rows=0, dev_rows=4 * rows + 20, test_rows=0)["dev"]
    found = [sentence for sentence in found if sentence.level <= 2][:rows]
    assert len(found) == rows
    texts, labels = [s.text for s in found], [NAMES[s.label] for s in found]
    write_table(path, {columns.get("text", "text"): texts, columns.get("label", "label"): labels})
    return path
