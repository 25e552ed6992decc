"""Changes of the weights of a model with packed weights or captured graphs.

Each change takes an early-exit model in eval mode and the stock model that shares its parameters; it returns the model
to use afterwards if that is another one.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from support.models import CLASSES, batch_for
from torch import nn

import earlyexit_kernels as ee

#: Family -> what its stock model has beside the common sizes, so that linears and norms have biases.
BIASES: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "eurobert": {"attention_bias": True, "mlp_bias": True},
}
#: Name -> change. Those in `SAME_NUMBERS` keep the values of the weights, up to rounding.
WAYS: dict[str, Callable[[Any, Any], Any]] = {}
#: 0-based number of the layer that most of them change.
AT = ContextVar("AT", default=1)
#: Name of the parameter of this layer that the writes change; None for the weight of the part `inner`.
PARAMETER: ContextVar[str | None] = ContextVar("PARAMETER", default=None)
SAME_NUMBERS = ("share_memory", "half", "bfloat16", "double", "half_and_back", "lora_disabled", "swapped_on_conversion")


def way(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    WAYS[function.__name__] = function
    return function


def layers_of(model: Any, backbone: Any = None) -> Any:
    return model.adapter.layers(model.backbone if backbone is None else backbone)


def layer_of(model: Any, backbone: Any = None) -> Any:
    """Return the encoder layer to change; it may be in a group of layers."""
    return model.adapter.parts(layers_of(model, backbone)[AT.get()])[0]


def path_of(model: Any, part: str) -> str:
    """Return the dotted name of a part of a layer; query and value may be parts of one linear."""
    names = model.adapter.names
    if hasattr(names, part):
        named = getattr(names, part)
        return named if isinstance(named, str) else named[0]
    return names.qkv if isinstance(names.qkv, str) else names.qkv[("query", "key", "value").index(part)]


def part_of(model: Any, part: str) -> Any:
    return layer_of(model).get_submodule(path_of(model, part))


def parent_of(model: Any, part: str) -> Any:
    return layer_of(model).get_submodule(path_of(model, part).rpartition(".")[0])


def set_part(model: Any, part: str, module: nn.Module) -> None:
    setattr(parent_of(model, part), path_of(model, part).rpartition(".")[2], module)


def weight_of(model: Any) -> nn.Parameter:
    name = PARAMETER.get()
    return part_of(model, "inner").weight if name is None else layer_of(model).get_parameter(name)


def stack_of(backbone: Any) -> Any:
    """Return the module that has the list of layers, or the list where the backbone has it itself."""
    stacks = (getattr(backbone, name, None) for name in ("encoder", "transformer", "layers"))
    return next(stack for stack in stacks if stack is not None)


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
    square = part_of(model, "query").weight
    if square.shape[0] != square.shape[1]:
        square = part_of(model, "attention_out").weight
    square.data = square.data.t()


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
    part_of(model, "norm").weight.data.mul_(1.5)


@way
def query_bias_data_in_place(model, base):
    part_of(model, "query").bias.data.add_(1.5)


@way
def nn_init(model, base):
    nn.init.normal_(weight_of(model), std=0.3)


@way
def vector_to_parameters(model, base):
    parameters = list(layer_of(model).parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) * 1.2, parameters)


@way
def through_the_stock_model(model, base):
    inner = layer_of(model, base.base_model).get_submodule(path_of(model, "inner"))
    inner.weight.data.mul_(1.5)


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
    part_of(model, "outer").bias = nn.Parameter(torch.linspace(-1, 1, 64))


@way
def new_linear(model, base):
    inner = part_of(model, "inner")
    set_part(model, "inner", nn.Linear(inner.in_features, inner.out_features))


@way
def activation_replaced(model, base):
    set_part(model, "activation", nn.ReLU())


@way
def bias_removed(model, base):
    part_of(model, "outer").bias = None


@way
def eps_changed(model, base):
    norm = part_of(model, "norm")
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.5)


@way
def attention_changed(model, base):
    attention = parent_of(model, "query")
    if hasattr(attention, "scaling"):
        attention.scaling = 4.0
    else:
        attention.sliding_window = 2


@way
def layers_reordered(model, base):
    layers = layers_of(model)
    layers[0], layers[2] = layers[2], layers[0]


def other_backbone(model: Any) -> Any:
    """Return a copy of the backbone with other weights."""
    other = copy.deepcopy(model.backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other


def put(model: Any, old: nn.Module, new: nn.Module) -> None:
    """Put a module of the backbone in the place of another."""
    for parent in list(model.backbone.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@way
def layer_replaced(model, base):
    layers_of(model)[AT.get()] = layers_of(model, other_backbone(model))[AT.get()]


@way
def module_list_replaced(model, base):
    put(model, layers_of(model), layers_of(model, other_backbone(model)))


@way
def encoder_replaced(model, base):
    put(model, stack_of(model.backbone), stack_of(other_backbone(model)))


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
