"""Which back-end runs: what `auto` takes, what an explicit request that can't be met says."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels import backends
from earlyexit_kernels.ops import compact
from earlyexit_kernels.ops.schema import on_its_device


@pytest.fixture(autouse=True)
def fresh_choice():
    """Choices are made once a process; a test makes its own."""
    backends._CHOICES.clear()
    yield
    backends._CHOICES.clear()


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "_EXTENSION_MISSING", "the extension isn't built; run `make build`")


@pytest.fixture
def compiled_triton(monkeypatch):
    """As in a process that has triton and runs without TRITON_INTERPRET."""
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "_TRITON_MISSING", "")


def test_every_back_end_answers_and_torch_always_can():
    for device in (None, "cpu", "cuda", "mps", torch.device("cpu")):
        reasons = ee.available_backends(device)
        assert tuple(reasons) == backends.BACKENDS
        assert reasons["torch"] == ""


def test_reasons_carry_the_cure(compiled_triton, without_extension):
    reasons = ee.available_backends("cpu")
    assert "TRITON_INTERPRET=1 before the first import" in reasons["triton"]
    assert "make build" in reasons["cpp"]


def test_interpreted_triton_is_for_the_cpu_only(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    monkeypatch.setattr(backends, "_TRITON_MISSING", "")
    assert ee.available_backends("cpu")["triton"] == ""
    assert "unset it" in ee.available_backends("cuda")["triton"]


def test_a_missing_triton_says_so_on_every_device(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_MISSING", "triton can't be imported; install triton")
    assert {ee.available_backends(d)["triton"] for d in ("cpu", "cuda")} == {"triton can't be imported; install triton"}


def test_auto_on_the_cpu_never_takes_triton(monkeypatch, without_extension):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    assert backends.resolve("auto", "cpu") == "torch"


def test_auto_takes_the_extension_where_it_has_kernels(monkeypatch):
    monkeypatch.setitem(backends._WHY_NOT, "cpp", lambda device: "")
    assert backends.resolve("auto", "cpu") == backends.resolve("auto", "cuda") == "cpp"


def test_auto_on_cuda_takes_triton_next(compiled_triton, without_extension):
    assert backends.resolve("auto", "cuda") == "triton"
    assert backends.resolve("auto", "xpu") == "torch"


def test_an_op_takes_one_of_its_own(compiled_triton, monkeypatch):
    monkeypatch.setitem(backends._WHY_NOT, "cpp", lambda device: "")
    own = ("torch", "triton")
    assert backends.resolve("auto", "cuda", own) == "triton"
    assert backends.resolve("auto", "cpu", own) == "torch"
    assert backends.resolve("auto", "cuda") == "cpp"
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'torch', 'triton'\), got 'cpp'"):
        backends.resolve("cpp", "cuda", own)


def test_auto_says_its_choice_once(caplog, monkeypatch):
    monkeypatch.setitem(backends._WHY_NOT, "cpp", lambda device: "")
    caplog.set_level(logging.INFO, logger="earlyexit_kernels")
    for _ in range(3):
        compact(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), backend="torch")
        backends.resolve("auto", "cpu")
    said = [record for record in caplog.records if record.name == "earlyexit_kernels"]
    assert [record.getMessage() for record in said] == ["backend 'auto' chose 'cpp' on cpu"]
    assert said[0].levelno == logging.INFO


def test_auto_warns_of_what_it_passed_over(caplog, without_extension):
    assert backends.resolve("auto", "cpu") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'torch' on cpu" in record.getMessage()
    assert "'cpp': the extension isn't built; run `make build`" in record.getMessage()


def test_an_explicit_request_says_nothing(caplog):
    caplog.set_level(logging.DEBUG, logger="earlyexit_kernels")
    assert backends.resolve("torch", "cpu") == "torch"
    assert not caplog.records


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'torch', 'triton', 'cpp'\), got 'cuda'"):
        backends.resolve("cuda", "cpu")


def test_an_explicit_request_that_cannot_be_met_raises(compiled_triton, without_extension):
    row_ids, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ee.BackendUnavailableError, match=r"'triton' can't run on cpu tensors: .*TRITON_INTERPRET=1"):
        compact(row_ids, offsets, backend="triton")
    with pytest.raises(ee.BackendUnavailableError, match=r"'cpp' can't run on cpu tensors: .*make build"):
        compact(row_ids, offsets, backend="cpp")
    assert issubclass(ee.BackendUnavailableError, RuntimeError)


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
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


def test_the_extension_without_kernels_for_a_device_says_so():
    if ee.available_backends("cpu")["cpp"]:
        pytest.skip(ee.available_backends("cpu")["cpp"])
    assert ee.available_backends("mps")["cpp"] == "the extension was built without mps kernels"
