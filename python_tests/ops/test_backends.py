"""The choice of the back-end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels import backends
from earlyexit_kernels.ops import compact, raw
from earlyexit_kernels.ops.schema import on_its_device
from earlyexit_kernels.ops.self_test import VARIABLE


@pytest.fixture(autouse=True)
def fresh_choice():
    """Clear the choices, which are made once per process."""
    for made in (backends._CHOICES, backends._LOGGED):
        made.clear()
    yield
    for made in (backends._CHOICES, backends._LOGGED):
        made.clear()


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "_EXTENSION_MISSING", "the extension is not built; run `make build`")


@pytest.fixture
def compiled_triton(monkeypatch):
    """A process that has triton and runs without TRITON_INTERPRET."""
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "_TRITON_MISSING", "")


def test_available_backends_lists_all_and_torch_always_runs():
    for device in (None, "cpu", "cuda", "mps", torch.device("cpu")):
        reasons = ee.available_backends(device)
        assert tuple(reasons) == backends.BACKENDS
        assert reasons["torch"] == ""


def test_reasons_say_what_to_do(compiled_triton, without_extension, monkeypatch):
    reasons = ee.available_backends("cpu")
    assert "TRITON_INTERPRET=1 before the first import" in reasons["triton"] and "make build" in reasons["cpp"]
    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    assert ee.available_backends("cpu")["triton"] == ""
    assert "unset it" in ee.available_backends("cuda")["triton"]
    missing = "triton cannot be imported; install triton"
    monkeypatch.setattr(backends, "_TRITON_MISSING", missing)
    assert {ee.available_backends(device)["triton"] for device in ("cpu", "cuda")} == {missing}


def test_auto_prefers_the_extension_and_never_chooses_triton_on_the_cpu(
    monkeypatch, compiled_triton, without_extension
):
    assert [backends.resolve("auto", device) for device in ("cpu", "cuda", "xpu")] == ["torch", "triton", "torch"]
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    backends._CHOICES.clear()
    assert backends.resolve("auto", "cpu") == "torch"
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    backends._CHOICES.clear()
    assert backends.resolve("auto", "cpu") == backends.resolve("auto", "cuda") == "cpp"


def test_auto_chooses_among_the_back_ends_of_an_op(compiled_triton, monkeypatch):
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    own = ("torch", "triton")
    assert backends.resolve("auto", "cuda", own) == "triton"
    assert backends.resolve("auto", "cpu", own) == "torch"
    assert backends.resolve("auto", "cuda") == "cpp"


#: A call, and words of the error.
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: backends.resolve("cpp", "cuda", ("torch", "triton")), r"one of \('auto', 'torch', 'triton'\), got 'cpp'"),
    (lambda: backends.resolve("cuda", "cpu"), r"expected one of \('auto', 'torch', 'triton', 'cpp'\), got 'cuda'"),
    (lambda: raw("nonsense", "torch", "cpu"), r"raw: expected op to be one of \['compact', .* got 'nonsense'"),
    (lambda: raw("first_tokens_linear", "cpp", "cuda"), r"backend: expected one of \('auto', 'torch'\), got 'cpp'"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_unknown_names_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_auto_logs_its_choice_once(caplog, monkeypatch):
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    caplog.set_level(logging.INFO, logger="earlyexit_kernels")
    for _ in range(3):
        compact(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), backend="torch")
        backends.resolve("auto", "cpu")
    said = [record for record in caplog.records if record.name == "earlyexit_kernels"]
    assert [record.getMessage() for record in said] == ["backend 'auto' chose 'cpp' on cpu"]
    assert said[0].levelno == logging.INFO


def test_auto_warns_about_unavailable_back_ends(caplog, without_extension):
    assert backends.resolve("auto", "cpu") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'torch' on cpu" in record.getMessage()
    assert "'cpp': the extension is not built; run `make build`" in record.getMessage()


def test_an_explicit_choice_is_not_logged(caplog):
    caplog.set_level(logging.DEBUG, logger="earlyexit_kernels")
    assert backends.resolve("torch", "cpu") == "torch"
    assert not caplog.records


def test_unavailable_back_end_is_refused(compiled_triton, without_extension):
    row_ids, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ee.BackendUnavailableError, match=r"'triton' cannot run on cpu tensors: .*TRITON_INTERPRET=1"):
        compact(row_ids, offsets, backend="triton")
    with pytest.raises(ee.BackendUnavailableError, match=r"'cpp' cannot run on cpu tensors: .*make build"):
        compact(row_ids, offsets, backend="cpp")
    assert issubclass(ee.BackendUnavailableError, RuntimeError)


def test_launches_run_on_the_device_of_their_tensors(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def device_of(tensor):
        seen.append(tensor)
        yield
        seen.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(1)
    assert on_its_device(lambda *arguments: (seen.append("launched"), arguments)[1])(None, x, 3) == (None, x, 3)
    assert seen == [x, "launched", "left"]


def test_extension_without_kernels_for_a_device_is_reported():
    if ee.available_backends("cpu")["cpp"]:
        pytest.skip(ee.available_backends("cpu")["cpp"])
    assert ee.available_backends("mps")["cpp"] == "the extension was built without mps kernels"
