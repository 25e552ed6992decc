"""Further changes of weights, added to `WAYS`: optimizers, training, hooks, quantization and adapters."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
from support.models import CLASSES, batch_for
from support.weight_changes import WAYS, layer_of, parent_of, part_of, path_of, stack_of, way
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import Trainer, TrainingArguments

# optimizers


def optimizer_step(kind: type, how: dict[str, bool], model: Any, base: Any) -> None:
    optimizer = kind(base.parameters(), lr=0.05, **how)
    for parameter in base.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


_KINDS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
for _kind, _how in (
    *((kind, "fused") for kind in _KINDS),
    (torch.optim.AdamW, "plain"),
    (torch.optim.AdamW, "foreach"),
):
    _options = {"foreach": _how == "foreach"} if _how != "fused" else {"fused": True}
    WAYS[f"{_kind.__name__.lower()}_{_how}"] = partial(optimizer_step, _kind, _options)


def train(model: Any, **arguments: Any) -> None:
    """Train a few steps with the Trainer and its default optimizer."""
    ids = torch.arange(80).view(8, 10) + 5
    rows = [{"input_ids": row, "labels": torch.tensor(k % CLASSES)} for k, row in enumerate(ids)]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=2, learning_rate=0.02, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            **arguments,
        )  # fmt: skip
        Trainer(model, options, train_dataset=rows, eval_dataset=rows).train()


@way
def trainer_on_the_stock_model(model, base):
    train(base)
    base.eval()


@way
def trainer_with_evaluation(model, base):
    train(model, eval_strategy="steps", eval_steps=1)
    model.eval()


@way
def backward_then_evaluation_then_a_fused_step(model, base):
    batch = batch_for(model)
    model.train()
    model(**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
    model.eval()
    model.trace(**batch)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


# code added to modules


@way
def weight_norm(model, base):
    parametrizations.weight_norm(part_of(model, "inner")).parametrizations.weight.original0.data.mul_(1.5)


@way
def spectral_norm(model, base):
    parametrizations.spectral_norm(part_of(model, "inner"))


@way
def pruned(model, base):
    prune.l1_unstructured(part_of(model, "inner"), "weight", amount=0.5)


@way
def layer_hook(model, base):
    # not in proportion, which the norm behind the last layer would undo
    layer_of(model).register_forward_hook(lambda module, inputs, output: output + output.roll(1, -1))


@way
def deep_hook(model, base):
    part_of(model, "query").register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))


@way
def forward_replaced(model, base):
    inner = parent_of(model, "inner")
    own = inner.forward
    inner.forward = lambda *inputs, **options: own(*inputs, **options) * 1.5


@way
def class_replaced(model, base):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    part_of(model, "inner").__class__ = Doubled


# quantization and adapters


def quantized(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@way
def backbone_quantized(model, base):
    model.backbone = quantized(model.backbone)


@way
def encoder_quantized_in_place(model, base):
    torch.ao.quantization.quantize_dynamic(stack_of(model.backbone), {nn.Linear}, dtype=torch.qint8, inplace=True)


def lora(model: Any, module: nn.Module) -> Any:
    """Adapt queries and values of a model, or of its backbone."""
    peft = pytest.importorskip("peft")
    targets = sorted({path_of(model, part).rpartition(".")[2] for part in ("query", "value")})
    adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    return adapted.eval()


@way
def lora_over_the_model(model, base):
    lora(model, model)


@way
def lora_over_the_backbone(model, base):
    lora(model, model.backbone)


@way
def lora_trained(model, base):
    adapted = lora(model, model)
    model.trace(**batch_for(model))
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(learned, lr=0.05, fused=True).step()


@way
def lora_disabled(model, base):
    adapted = lora(model, model.backbone)
    model.trace(**batch_for(model))
    adapted.disable_adapter_layers()


@way
def lora_merged(model, base):
    adapted = lora(model, model.backbone)
    model.trace(**batch_for(model))
    model.backbone = adapted.merge_and_unload()


@way
def lora_merged_into_the_weights(model, base):
    adapted = lora(model, model.backbone)
    model.trace(**batch_for(model))
    adapted.merge_adapter()


#: Changes of all layers, for which it does not matter which layer the others change.
OF_ALL_LAYERS = tuple(name for name in WAYS if name.startswith(("sgd", "ada", "trainer", "lora", "state", "backward")))
