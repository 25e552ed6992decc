"""Changes of the weights of a model with packed weights or captured graphs.

Each change takes an early-exit model in eval mode and the stock model that shares its parameters; it returns the model
to use afterwards if that is another one.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from support.models import CLASSES, batch_for
from torch import nn

import earlyexit_kernels as ee

#: Name -> change. Those in `SAME_NUMBERS` keep the values of the weights, up to rounding.
WAYS: dict[str, Callable[[Any, Any], Any]] = {}
SAME_NUMBERS = ("share_memory", "half", "bfloat16", "double", "half_and_back", "lora_disabled", "swapped_on_conversion")


def way(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    WAYS[function.__name__] = function
    return function


def layer_of(model: Any, number: int = 1) -> Any:
    return model.backbone.encoder.layer[number]


def weight_of(model: Any) -> nn.Parameter:
    return layer_of(model).intermediate.dense.weight


# writes to a tensor


@way
def in_place(model, base):
    with torch.no_grad():
        weight_of(model).mul_(1.5)


@way
def in_place_in_inference_mode(model, base):
    with torch.inference_mode():
        weight_of(model).mul_(1.5)


@way
def slice_assignment(model, base):
    with torch.no_grad():
        weight_of(model)[:40] = 0.3


@way
def detached_in_place(model, base):
    weight_of(model).detach().mul_(1.5)


@way
def data_in_place(model, base):
    weight_of(model).data.mul_(1.5)


@way
def data_replaced(model, base):
    weight_of(model).data = weight_of(model).data * 1.5


@way
def data_transposed_in_place(model, base):
    query = layer_of(model).attention.self.query.weight
    query.data = query.data.t()


@way
def numpy_view(model, base):
    weight_of(model).detach().numpy()[:] *= 1.5


@way
def dlpack_view(model, base):
    torch.from_dlpack(weight_of(model).detach()).mul_(1.5)


@way
def storage_copied(model, base):
    weight = weight_of(model)
    weight.untyped_storage().copy_((weight.detach() * 1.5).contiguous().untyped_storage())


@way
def norm_data_in_place(model, base):
    layer_of(model).output.LayerNorm.weight.data.mul_(1.5)


@way
def query_bias_data_in_place(model, base):
    layer_of(model).attention.self.query.bias.data.add_(1.5)


@way
def nn_init(model, base):
    nn.init.normal_(weight_of(model), std=0.3)


@way
def vector_to_parameters(model, base):
    parameters = list(layer_of(model).parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) * 1.2, parameters)


@way
def through_the_stock_model(model, base):
    base.bert.encoder.layer[1].intermediate.dense.weight.data.mul_(1.5)


@way
def moving_average(model, base):
    averaged = torch.optim.swa_utils.AveragedModel(base, avg_fn=lambda mean, new, count: 0.5 * (mean + new))
    with torch.no_grad():
        for parameter in averaged.module.parameters():
            parameter.mul_(1.5)
    for own, other in zip(base.parameters(), averaged.module.parameters(), strict=True):
        own.data.copy_(other.data)


# other modules, parameters and attributes


@way
def new_parameter(model, base):
    layer_of(model).output.dense.bias = nn.Parameter(torch.linspace(-1, 1, 64))


@way
def new_linear(model, base):
    layer_of(model).intermediate.dense = nn.Linear(64, 96)


@way
def activation_replaced(model, base):
    layer_of(model).intermediate.intermediate_act_fn = nn.ReLU()


@way
def bias_removed(model, base):
    layer_of(model).output.dense.bias = None


@way
def eps_changed(model, base):
    layer_of(model).output.LayerNorm.eps = 0.5


@way
def scaling_changed(model, base):
    layer_of(model).attention.self.scaling = 4.0


@way
def layers_reordered(model, base):
    layers = model.backbone.encoder.layer
    layers[0], layers[2] = layers[2], layers[0]


def other_backbone(model: Any) -> Any:
    """Return a copy of the backbone with other weights."""
    other = copy.deepcopy(model.backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other


@way
def layer_replaced(model, base):
    model.backbone.encoder.layer[1] = other_backbone(model).encoder.layer[1]


@way
def module_list_replaced(model, base):
    model.backbone.encoder.layer = other_backbone(model).encoder.layer


@way
def encoder_replaced(model, base):
    model.backbone.encoder = other_backbone(model).encoder


@way
def backbone_replaced(model, base):
    model.backbone = other_backbone(model)


@way
def head_replaced(model, base):
    model.heads.out[-1] = nn.Linear(64, CLASSES)


# states and formats


def scaled_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor * 1.2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}


@way
def state_loaded(model, base):
    model.load_state_dict(scaled_state(model))


@way
def state_assigned(model, base):
    model.load_state_dict(scaled_state(model), assign=True)


@way
def state_loaded_in_inference_mode(model, base):
    with torch.inference_mode():
        model.load_state_dict(scaled_state(model))


def saved(model: Any, folder: str) -> Any:
    other = copy.deepcopy(model)
    other.load_state_dict(scaled_state(other))
    other.save_pretrained(folder)


@way
def from_pretrained_and_reload_in_inference_mode(model, base):
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        saved(model, folder)
        fresh = ee.EarlyExitForSequenceClassification.from_pretrained(folder)
        fresh.trace(**batch_for(fresh))
        fresh.load_state_dict(scaled_state(fresh))
    return fresh


@way
def built_in_inference_mode(model, base):
    with torch.inference_mode():
        built = ee.to_early_exit(copy.deepcopy(base), pooling="first")
        built.trace(**batch_for(built))
        built.load_state_dict(scaled_state(built))
    return built


@way
def half(model, base):
    model.half()


@way
def bfloat16(model, base):
    model.bfloat16()


@way
def double(model, base):
    model.double()


@way
def half_and_back(model, base):
    model.half().float()


@way
def bfloat16_and_back_with_an_update(model, base):
    model.bfloat16()
    model.trace(**batch_for(model))
    weight_of(model).data.mul_(1.5)
    model.float()


@way
def swapped_on_conversion(model, base):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@way
def tensors_swapped(model, base):
    other = nn.Parameter(weight_of(model).detach() * 1.5)
    torch.utils.swap_tensors(weight_of(model), other)


@way
def share_memory(model, base):
    model.share_memory()
