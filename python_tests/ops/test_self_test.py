"""The test of a back-end before it is chosen."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode

import earlyexit_kernels as ee
from earlyexit_kernels import backends
from earlyexit_kernels.ops import schema, self_test
from python_tests.support.models import varied

CPU = torch.device("cpu")
#: Back-ends beside torch that run on CPU tensors here.
USABLE = [name for name, reason in ee.available_backends("cpu").items() if not reason and name != "torch"]


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """Forget what has been tested and chosen in this process."""
    monkeypatch.delenv(self_test.VARIABLE, raising=False)
    for module, name in ((backends, "_CHOICES"), (backends, "_LOGGED"), (self_test, "_FAILURES")):
        monkeypatch.setattr(module, name, type(getattr(module, name))())


def fails_to_launch(op, *arguments):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nfor debugging, ...")


def returns_wrong_number(op, *arguments):
    out = op(*arguments)
    arguments[8].add_(0.01)  # the answers
    return out


def returns_nan(op, *arguments):
    out = op(*arguments)
    arguments[8][-1, -1] = torch.nan
    return out


def returns_wrong_integer(op, *arguments):
    return op(*arguments) + 1


def moves_too_little(op, hidden, offsets, source, new_offsets, out):
    op(hidden, offsets, source, new_offsets, out)
    out[0] = 0.0


def plans_out_of_order(op, row_ids, offsets):
    return tuple(x.flip(0) for x in op(row_ids, offsets))


#: Op, how it is broken, and what the reason says.
FAULTS = {
    "launch": ("exit_step", fails_to_launch, "RuntimeError: CUDA error: no kernel image is available"),
    "wrong number": ("exit_step", returns_wrong_number, r"exit_step of torch.float32, first pooling: answers are \[\["),
    "NaN": ("exit_step", returns_nan, "answers are .*nan"),
    "wrong integer": ("exit_step", returns_wrong_integer, r"counts are \[3, 7, 1\], expected \[2, 6, 0\]"),
    "rows not moved": ("gather_rows", moves_too_little, "gather_rows of torch.float32: tokens are"),
    "order of rows": ("compact", plans_out_of_order, r"compact: row ids are \[-1, 1, 0, 2\], expected \[2, 0, 1, -1\]"),
}


def break_op(monkeypatch, backend: str, fault: str) -> str:
    """Let a back-end, missing here or not, be that of torch with one fault, and return what is said of it."""
    op, broken, said = FAULTS[fault]
    for name in ("compact", "gather_rows", "exit_step"):
        working = schema._OPS[name]["torch"]
        run = functools.partial(broken, working) if name == op else working
        monkeypatch.setitem(schema._OPS[name], backend, run)
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, backend, lambda device: "")
    return said


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_back_end_is_refused_with_its_reason(backend, fault, monkeypatch):
    said = break_op(monkeypatch, backend, fault)
    with pytest.raises(ee.BackendUnavailableError, match=rf"{backend}.*its self-test failed on cpu \(.*\): .*{said}"):
        backends.resolve(backend, CPU)
    assert "its self-test failed" in ee.available_backends("cpu")[backend]
    assert "\n" not in ee.available_backends("cpu")[backend]


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_warns_once_and_answers_with_the_next_back_end(fault, monkeypatch, caplog):
    model, batch = varied("bert")
    expected = model(**batch)
    model.configure(backend="auto")
    break_op(monkeypatch, "cpp", fault)
    for made in (backends._CHOICES, self_test._FAILURES):
        made.clear()
    caplog.clear()
    for _ in range(2):
        out = model(**batch)
    assert torch.equal(out.exit_layer, expected.exit_layer)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    said = [record.getMessage() for record in caplog.records if "self-test" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("backend 'auto' chose 'torch' on cpu; not 'cpp': its self-test failed on cpu (")
    assert model.explain().backend == "torch"


@pytest.mark.parametrize("backend", ["torch", *USABLE])
def test_working_back_end_passes(backend):
    """The expected values, written down in the module, are those of torch too."""
    assert self_test._failure(backend, CPU) == ""


def test_back_end_is_tested_once_per_device(monkeypatch):
    tested = []
    monkeypatch.setattr(self_test, "_failure", lambda *key: tested.append(key) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for device in (first, second, first, CPU):
        for among in (backends.BACKENDS, ("torch", "cpp")):
            assert backends.resolve("auto", device, among) == backends.resolve("cpp", device, among) == "cpp"
    assert tested == [("cpp", first), ("cpp", second), ("cpp", CPU)]


def test_failure_on_one_device_does_not_count_on_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_test, "_failure", lambda backend, device: "it is broken" if device.index == 1 else "")
    for name in ("cpp", "triton"):
        monkeypatch.setitem(backends._UNAVAILABLE_REASONS, name, lambda device: "")
    assert backends.resolve("auto", torch.device("cuda", 0)) == "cpp"
    assert backends.resolve("auto", torch.device("cuda", 1)) == "torch"
    assert ee.available_backends("cuda:1") == {"torch": "", "triton": "it is broken", "cpp": "it is broken"}


def test_nothing_is_tested_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(self_test, "_failure", lambda *key: "it is broken")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    captures = [True, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures.pop(0))
    device = torch.device("cuda", 0)
    assert [self_test.failure("cpp", device) for _ in range(2)] == ["", "it is broken"]


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_do_not_reach_the_test(mode):
    with mode():
        assert self_test._in_thread(lambda: self_test._failure("torch", CPU)) == ""
        for backend in USABLE:
            assert self_test.failure(backend, CPU) == ""


def test_memory_that_is_full_is_not_a_fault_of_the_back_end(monkeypatch):
    op, full = "exit_step", torch.OutOfMemoryError("CUDA out of memory")

    def no_memory(*arguments):
        raise full

    monkeypatch.setitem(schema._OPS[op], "cpp", no_memory)
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    with pytest.raises(torch.OutOfMemoryError):
        backends.resolve("auto", CPU)
    assert not self_test._FAILURES


def test_variable_switches_the_test_off(monkeypatch):
    break_op(monkeypatch, "cpp", "launch")
    monkeypatch.setenv(self_test.VARIABLE, "0")
    assert backends.resolve("cpp", CPU) == backends.resolve("auto", CPU) == "cpp"


@pytest.mark.parametrize("value", ["yes", "", "2", "false"])
def test_other_values_of_the_variable_are_refused(value, monkeypatch):
    monkeypatch.setenv(self_test.VARIABLE, value)
    monkeypatch.setitem(backends._UNAVAILABLE_REASONS, "cpp", lambda device: "")
    with pytest.raises(ValueError, match=f"EARLYEXIT_SELF_TEST: expected 1, .* or 0, got '{value}'"):
        backends.resolve("auto", CPU)
