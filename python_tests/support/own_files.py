"""Tables of generated sentences, as a user's own files."""

from __future__ import annotations

from pathlib import Path

from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import write_table

NAMES = ("bad", "good")
DOCUMENTS = 5


def write_rows(path: Path, rows: int, *, seed: int = 0, **columns: str) -> Path:
    """Write generated sentences with their labels; `columns` renames text and label."""
    sentences = toy.write_splits(seed=seed, train_rows=0, dev_rows=4 * rows + 20, test_rows=0)["dev"]
    sentences = [sentence for sentence in sentences if sentence.level <= 2][:rows]
    assert len(sentences) == rows
    texts, labels = [s.text for s in sentences], [NAMES[s.label] for s in sentences]
    write_table(path, {columns.get("text", "text"): texts, columns.get("label", "label"): labels})
    return path


def write_documents(path: Path, queries: int = 140, *, seed: int = 0, **changes: list) -> Path:
    """Write queries with five documents each, of which those that praise are relevant, 2 where they are short."""
    rows = toy.write_splits(seed=seed, train_rows=0, dev_rows=queries * DOCUMENTS, test_rows=0)["dev"]
    columns = {
        "id": [f"q{row // DOCUMENTS}" for row in range(len(rows))],
        "query": ["was the film superb ?"] * len(rows),
        "document": [sentence.text for sentence in rows],
        "relevance": [str(sentence.label * (1 + (sentence.level == 1))) for sentence in rows],
    }
    write_table(path, {**columns, **changes})
    return path
