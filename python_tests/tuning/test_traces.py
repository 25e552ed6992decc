"""Traces in files: what is saved is loaded, and damaged or foreign files are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.models import batch_for, early_exit

import earlyexit_kernels as ee
from earlyexit_kernels.tuning.traces import FORMAT


def test_what_is_saved_is_loaded(tmp_path):
    model = early_exit(method="palbert")
    trace = model.trace(**batch_for(model))
    labels = np.arange(len(trace.logits)) % 3
    ee.save_trace(tmp_path / "dev.safetensors", trace, labels)
    found, found_labels = ee.load_trace(tmp_path / "dev.safetensors")
    assert torch.equal(found.logits, trace.logits) and torch.equal(found.keys, trace.keys)
    assert set(found.aux) == set(trace.aux) >= {"halting"} and found.problem_type == trace.problem_type
    assert all(torch.equal(found.aux[name], trace.aux[name]) for name in trace.aux)
    assert (found_labels == labels).all() and [p.name for p in tmp_path.iterdir()] == ["dev.safetensors"]
    rule = ee.criteria.QExit(q=0.4)
    assert all(torch.equal(*pair) for pair in zip(ee.replay(found, rule), ee.replay(trace, rule), strict=True))


def test_a_trace_without_labels_keys_and_task(tmp_path):
    ee.save_trace(tmp_path / "t", ee.ExitTrace(torch.zeros(2, 3, 4)))
    trace, labels = ee.load_trace(tmp_path / "t")
    assert labels is None and trace.keys is None and trace.problem_type is None and trace.depth == 3


def test_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "t"
    ee.save_trace(path, ee.ExitTrace(torch.ones(1, 2, 2)))
    with pytest.raises(ValueError, match=r"each of the 4 rows of the trace, got \[3\]"):
        ee.save_trace(path, ee.ExitTrace(torch.zeros(4, 2, 2)), [0, 1, 0])
    with pytest.raises(OSError, match="could not be written"):
        ee.save_trace(tmp_path / "no folder" / "t", ee.ExitTrace(torch.zeros(4, 2, 2)))
    assert ee.load_trace(path)[0].logits.sum() == 4 and [p.name for p in tmp_path.iterdir()] == ["t"]


META = {"format": FORMAT, "version": "1", "problem_type": ""}
LOGITS = {"logits": torch.zeros(4, 3, 2)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        (LOGITS, None, "expected a file that save_trace wrote"),
        (LOGITS, {**META, "version": "2"}, "of version 1.*'2'"),
        (LOGITS, {**META, "problem_type": "ranking"}, "a problem type.*'ranking'"),
        ({"labels": torch.zeros(4)}, META, r"expected logits \[N, L, C\]"),
        ({"logits": torch.zeros(4, 3)}, META, r"expected logits \[N, L, C\]"),
        ({"logits": torch.zeros(4, 3, 2).long()}, META, r"expected logits \[N, L, C\]"),
        ({**LOGITS, "weights": torch.zeros(4)}, META, "tensors among"),
        ({**LOGITS, "labels": torch.zeros(3)}, META, "tensors of 4 rows.*labels"),
        ({**LOGITS, "aux.halting": torch.zeros(4, 2)}, META, r"aux \[N, L\].*halting"),
    ],
)
def test_foreign_files_are_refused(tmp_path, tensors, metadata, expected):
    save_file(tensors, tmp_path / "t", metadata)
    with pytest.raises(ValueError, match=expected):
        ee.load_trace(tmp_path / "t")


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "t"
    ee.save_trace(path, ee.ExitTrace(torch.zeros(40, 3, 4)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        ee.load_trace(path)
    with pytest.raises(FileNotFoundError, match="expected a file that save_trace wrote"):
        ee.load_trace(tmp_path / "other")
