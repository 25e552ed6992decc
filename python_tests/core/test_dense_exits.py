"""Exits of the family's form by ops, and the modules that run where they are something else."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_for, early_exit
from torch import nn

from earlyexit_kernels.core import exits
from earlyexit_kernels.core.exits import DenseSource, ExitMemory, ModuleSource, exit_source
from earlyexit_kernels.core.fixed_depth import PaddedStates


def source_of(model, dtype=torch.float32, backend="auto"):
    states = PaddedStates(torch.zeros(2, 1, model.backbone.config.hidden_size, dtype=dtype), None)
    return exit_source(model.heads, None, states, backend)


def answers(model):
    out = model(**batch_for(model))
    return out.logits, out.exit_layer


@pytest.mark.parametrize(
    ("family", "method", "backend"),
    [
        *(("bert", "joint", "auto"), ("bert", "deebert", "torch"), ("electra", "deebert", "auto")),
        *(("distilbert", "joint", "torch"), ("roberta", "joint", "auto"), ("albert", "joint", "auto")),
    ],
)
def test_equal_the_modules(family, method, backend, monkeypatch):
    """One dense module for all exits, or one for each; gelu, relu and tanh."""
    model = early_exit(family, method=method)
    model.configure(backend=backend)
    assert isinstance(source_of(model, backend=backend), DenseSource)
    found = answers(model)
    monkeypatch.setattr(exits, "dense_source", lambda *args, **options: None)
    assert isinstance(source_of(model), ModuleSource)
    for got, want in zip(found, answers(model), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    old = model.heads.dense[0]
    model.heads.dense[0] = Doubled(old.in_features, old.out_features)
    model.heads.dense[0].load_state_dict(old.state_dict())


def hooked(model):
    model.heads.dense[0].register_forward_hook(lambda module, args, out: 2 * out)


def own_forward(model):
    dense = model.heads.dense[0]
    forward = dense.forward
    dense.forward = lambda x: 2 * forward(x)


def another_activation(model):
    model.heads.activation = nn.Sigmoid()


@pytest.mark.parametrize("change", [replaced, hooked, own_forward, another_activation])
def test_changed_modules_run(change):
    model = early_exit("bert")
    before = answers(model)[0]
    change(model)
    assert isinstance(source_of(model), ModuleSource)
    after = answers(model)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.trace(**batch_for(model)).logits[:, -1])


def test_autocast_and_other_dtypes_run_the_modules():
    model = early_exit("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(source_of(model), ModuleSource)
    assert isinstance(source_of(model, dtype=torch.bfloat16), ModuleSource)
    assert isinstance(source_of(model.double(), dtype=torch.float64), ModuleSource)
    assert isinstance(source_of(model.bfloat16(), dtype=torch.bfloat16), ModuleSource)


@pytest.mark.parametrize("name", ["dense.0.weight", "dense.0.bias", "out.3.weight", "out.3.bias"])
def test_changed_weights_are_read(name):
    model = early_exit("bert")
    before = answers(model)[0]
    with torch.no_grad():
        model.heads.get_parameter(name).data.mul_(1.5).add_(0.1)
    after = answers(model)[0]
    full = model.trace(**batch_for(model)).logits[:, -1]
    torch.testing.assert_close(after, full)
    assert not torch.allclose(before, after)


def test_rows_that_have_left_write_no_memory_of_others():
    memory = ExitMemory({"features": torch.zeros(3, 1)})
    memory.write(memory.slots(torch.tensor([0, -1, 2, -1])), {"features": torch.tensor([[1.0], [9], [3], [9]])})
    assert memory.read(torch.arange(3))["features"].flatten().tolist() == [1, 0, 3]
