"""A machine on which torch finds a GPU and every call of CUDA fails, as with a driver that is too old."""

from __future__ import annotations

import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels.backends import working_device
from python_tests.support.models import run_python

#: What stands before each program.
BROKEN = """
import sys
import torch

def fails(*arguments, **options):
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\\nPlease update it.")

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
for name in ("_lazy_init", "init", "current_device", "synchronize", "get_device_name", "get_device_capability"):
    setattr(torch.cuda, name, fails)
"""
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."

ANSWERS = """
from python_tests.support.models import varied
model, batch = varied("bert")
out = model(**batch)
model.configure(backend="torch")
reference = model(**batch)
assert torch.equal(out.exit_layer, reference.exit_layer)
torch.testing.assert_close(out.logits, reference.logits)
print(sorted(set(out.exit_layer.tolist())))
model.train()
model.configure(backend="auto")
labels = torch.zeros(len(out.logits), dtype=torch.int64)
model(**batch, labels=labels).loss.backward()
print(model.explain().backend)
"""

QUICK_START = """
import earlyexit_kernels as ee
from earlyexit_kernels.data.toy import toy_model
model = ee.to_early_exit(toy_model(layers=2, hidden=8)).eval()
print(model(input_ids=torch.tensor([[2, 7, 3]])).exit_layer.tolist())
"""

CHOICES = """
import earlyexit_kernels as ee
from earlyexit_kernels import backends
reasons = ee.available_backends()
assert reasons["torch"] == ""
print(backends.resolve("auto", "cuda"))
print(reasons["triton"])
try:
    backends.resolve("triton", "cuda:0")
except ee.BackendUnavailableError as error:
    print(error)
"""

COMMAND = """
import earlyexit_cli
sys.exit(earlyexit_cli.main(sys.argv[1:]))
"""


def test_a_program_runs_on_the_cpu_and_auto_is_torch_on_the_gpu():
    """Models answer and learn, the reasons name what is broken, and so does the command."""
    out = run_python(BROKEN + ANSWERS + QUICK_START + CHOICES + COMMAND, "env", timeout=300)
    leaving, on_cpu, quick_start, on_gpu, reason, by_name, *env = out.splitlines()
    assert len(leaving) > len("[1, 2]")
    assert on_cpu in ("cpp", "torch")
    assert quick_start == "[2]"
    assert on_gpu == "torch"
    assert f"its self-test failed on cuda, whose name cannot be read (RuntimeError: {TOO_OLD})" in reason
    assert f"backend 'triton' cannot run on cuda tensors: {reason.replace('on cuda', 'on cuda:0')}" == by_name
    said = "\n".join(env)
    assert f"unusable (RuntimeError: {TOO_OLD})" in said
    assert "Back-ends on cpu tensors" in said
    assert "Back-ends on cuda:0 tensors ('auto' selects 'torch')" in said


def test_commands_that_would_use_the_gpu_say_how_not_to(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError(f"{TOO_OLD}\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(ee.BackendUnavailableError) as caught:
        working_device()
    assert str(caught.value) == (
        f"torch finds a GPU but cannot use it (RuntimeError: {TOO_OLD}); set CUDA_VISIBLE_DEVICES= to run on the CPU"
    )
