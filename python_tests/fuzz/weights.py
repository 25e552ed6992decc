"""Target `weights`: after any change of the weights, answers are those of a fresh copy of the model.

Changes are combined at random, with forward passes between them. Excluded are writes of single elements through views
that autograd does not track, for which the documentation makes the user responsible.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from support.models import ALL_FAMILIES, batch_for, encoder_of, stock
from support.weight_changes import BIASES
from torch import Tensor, nn
from torch.nn.utils import prune

import earlyexit_kernels as ee
from fuzz.case import Case, WrongError

#: The families whose layers are packed are drawn more often.
FAMILIES = (*("bert", "roberta", "albert", "electra", "distilbert", "modernbert") * 3, *ALL_FAMILIES)
TOLERANCE = 1e-3


class Subject:
    """A model with packed weights, and the stock model that shares its weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.family = case.choice(FAMILIES)
        biases = BIASES.get(self.family, {})
        self.stock = stock(self.family, seed=case.integer(0, 99), num_hidden_layers=2, **biases)
        self.model = ee.to_early_exit(self.stock)
        self.batch = batch_for(self.model, lengths=(5, 9, 3))

    @property
    def layers(self) -> nn.ModuleList:
        """List of the encoder layers."""
        found = [m for m in self.model.backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
        return found[0]

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters of one encoder layer."""
        return list(self.case.choice(list(self.layers)).parameters())

    def weight(self) -> nn.Parameter:
        return self.case.choice(self.weights())

    def module(self, kind: type[nn.Module]) -> tuple[nn.Module, str, Any]:
        """Return the parent, the name and the module, for a random module of this class in the encoder layers."""
        found = [
            (parent, name, child)
            for parent in self.layers.modules()
            for name, child in parent.named_children()
            if isinstance(child, kind)
        ]
        return self.case.choice(found)

    def norm(self) -> Any:
        """Return a random norm of the encoder layers, of which some families have a class of their own."""
        return self.case.choice([m for m in self.layers.modules() if type(m).__name__.endswith("Norm")])

    def logits(self) -> Tensor:
        self.case.calls += 1
        with torch.no_grad():
            return self.model(**self.batch).logits


def run(case: Case) -> None:
    """Make some changes, with comparisons between and after them."""
    subject = Subject(case)
    subject.logits()
    changes = []
    for _ in range(case.integer(1, 4)):
        name = case.choice(list(CHANGES))
        CHANGES[name](subject)
        changes.append(name)
        if case.chance(0.5):
            compare(subject, changes)
    compare(subject, changes)


def compare(subject: Subject, changes: list[str]) -> None:
    """Raise `WrongError` if the answers differ from those of a deep copy without packed weights."""
    got = subject.logits()
    fresh = copy.deepcopy(subject.model)
    fresh.configure(path="eager")
    with torch.no_grad():
        expected = fresh(**subject.batch).logits
    apart = float((got - expected).abs().max())
    if not apart <= TOLERANCE * (1 + float(expected.abs().max())):
        steps = ", ".join(changes)
        raise WrongError(f"stale after {changes[-1]}\n  {subject.family}, after {steps}: logits are off by {apart:.3g}")


def noise_like(subject: Subject, weight: Tensor) -> Tensor:
    """Return noise that changes the answers when it is added to the tensor."""
    numbers = torch.from_numpy(subject.case.normal(*weight.shape))
    return 0.2 * numbers.to(weight.dtype)


def _no_grad(s: Subject) -> None:
    with torch.no_grad():
        weight = s.weight()
        weight.add_(noise_like(s, weight))


def _inference_mode(s: Subject) -> None:
    with torch.inference_mode():
        weight = s.weight()
        weight.add_(noise_like(s, weight))


def _slice(s: Subject) -> None:
    with torch.no_grad():
        weight = s.weight()
        weight[:] = noise_like(s, weight)


def _detached(s: Subject) -> None:
    weight = s.weight()
    weight.detach().add_(noise_like(s, weight))


def _data(s: Subject) -> None:
    weight = s.weight()
    weight.data.add_(noise_like(s, weight))


def _new_data(s: Subject) -> None:
    weight = s.weight()
    weight.data = weight.data + noise_like(s, weight)


def _numpy(s: Subject) -> None:
    weight = s.weight()
    weight.detach().numpy()[...] = noise_like(s, weight).numpy()


def _dlpack(s: Subject) -> None:
    weight = s.weight()
    torch.from_dlpack(weight.detach()).add_(noise_like(s, weight))


def _storage(s: Subject) -> None:
    weight = s.weight()
    new = (weight.detach() + noise_like(s, weight)).contiguous()
    if weight.untyped_storage().nbytes() == new.untyped_storage().nbytes():  # not a view of a vector of weights
        weight.untyped_storage().copy_(new.untyped_storage())


def _norm_data(s: Subject) -> None:
    norm = s.norm()
    norm.weight.data.mul_(1.5)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.add_(0.3)


def _eps(s: Subject) -> None:
    norm = s.norm()
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    assert hasattr(norm, name)
    setattr(norm, name, s.case.choice((0.1, 1.0)))


def _new_parameter(s: Subject) -> None:
    linear = s.module(nn.Linear)[2]
    linear.weight = nn.Parameter(linear.weight.detach() + noise_like(s, linear.weight))


def _new_linear(s: Subject) -> None:
    parent, name, old = s.module(nn.Linear)
    new = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight + noise_like(s, old.weight))
    setattr(parent, name, new)


def _no_bias(s: Subject) -> None:
    s.module(nn.Linear)[2].bias = None


def _swapped_layers(s: Subject) -> None:
    layers = s.layers
    if len(layers) > 1:
        layers[0], layers[1] = layers[1], layers[0]
        config = s.model.backbone.config
        if types := getattr(config, "layer_types", None):  # the stock model reads them by number
            config.layer_types = [types[1], types[0], *types[2:]]
    else:
        _no_grad(s)


def _changed_copy(s: Subject, module: nn.Module) -> Any:
    new = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in new.parameters():
            if parameter.dim() > 1:
                parameter.add_(noise_like(s, parameter))
    return new


def _new_layer(s: Subject) -> None:
    layers = s.layers
    at = s.case.integer(0, len(layers) - 1)
    layers[at] = _changed_copy(s, layers[at])


def _replace(s: Subject, old: nn.Module) -> None:
    """Replace a module by a changed copy."""
    for parent in list(s.model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, _changed_copy(s, old))
                return


def _new_list(s: Subject) -> None:
    _replace(s, s.layers)


def _new_encoder(s: Subject) -> None:
    backbone = s.model.backbone
    found = [getattr(backbone, name, None) for name in ("encoder", "transformer")]
    _replace(s, next(filter(None, found), s.layers))


def _new_backbone(s: Subject) -> None:
    s.model.backbone = _changed_copy(s, s.model.backbone)


def _changed_state(s: Subject) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in s.model.state_dict().items()}
    for name, value in state.items():
        if value.dim() > 1 and "embedding" not in name:
            value += noise_like(s, value)
    return state


def _load(s: Subject) -> None:
    s.model.load_state_dict(_changed_state(s))


def _load_assign(s: Subject) -> None:
    s.model.load_state_dict(_changed_state(s), assign=True)


def _load_inference(s: Subject) -> None:
    state = _changed_state(s)
    with torch.inference_mode():
        s.model.load_state_dict(state)


def _load_stock(s: Subject) -> None:
    encoder = encoder_of(s.stock)
    state = {k: v + noise_like(s, v) if v.dim() > 1 else v.clone() for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(state)


def _through_stock(s: Subject) -> None:
    with torch.no_grad():
        for parameter in encoder_of(s.stock).parameters():
            if parameter.dim() > 1 and len(parameter) < 100:
                parameter.add_(noise_like(s, parameter))


def _round_trip(s: Subject) -> None:
    s.model.to(s.case.choice((torch.bfloat16, torch.float16))).to(torch.float32)
    _data(s)


def _double(s: Subject) -> None:
    s.model.double()
    s.logits()
    s.model.float()
    _numpy(s)


def _swap_parameters(s: Subject) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        s.model.half().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _share_memory(s: Subject) -> None:
    s.model.share_memory()
    _data(s)


def _init(s: Subject) -> None:
    nn.init.normal_(s.module(nn.Linear)[2].weight, std=0.2)


def _from_vector(s: Subject) -> None:
    weights = s.weights()
    vector = nn.utils.parameters_to_vector(weights).detach()
    nn.utils.vector_to_parameters(vector + 0.1 * torch.from_numpy(s.case.normal(len(vector))), weights)


def _hook(s: Subject) -> None:
    module = s.case.choice([s.layers[0], s.module(nn.Linear)[2]])

    def scaled(module: nn.Module, inputs: Any, out: Any) -> Any:
        return (1.3 * out[0], *out[1:]) if isinstance(out, tuple) else 1.3 * out

    module.register_forward_hook(scaled)


def _forward(s: Subject) -> None:
    linear = s.module(nn.Linear)[2]
    own = linear.forward
    linear.forward = lambda x: 1.3 * own(x)


def _prune(s: Subject) -> None:
    linear = s.module(nn.Linear)[2]
    if "weight" in dict(linear.named_parameters(recurse=False)):
        prune.random_unstructured(linear, "weight", amount=0.5)
        prune.remove(linear, "weight")


def _average(s: Subject) -> None:
    average = torch.optim.swa_utils.AveragedModel(s.model.backbone)
    for parameter in average.parameters():
        parameter.data.mul_(0.7)
    for target, source in zip(s.model.backbone.parameters(), average.module.parameters(), strict=True):
        target.data.copy_(source.data)


def _step(build: Callable[..., Any], **arguments: Any) -> Callable[[Subject], None]:
    """Return a change by one step of an optimiser on all weights, with the model in eval mode."""

    def step(s: Subject) -> None:
        trained = s.case.choice((s.model, s.stock))
        weights = [p for p in trained.parameters() if p.requires_grad and p.is_leaf]
        for weight in weights:
            weight.grad = noise_like(s, weight) if weight.dim() > 1 else None
        build(weights, lr=0.2, **arguments).step()
        for weight in weights:
            weight.grad = None

    return step


OPTIMISERS = {
    f"{build.__name__} {kind}": _step(build, **{kind: True} if kind != "plain" else {"foreach": False})
    for build, kind in itertools.product(
        (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad), ("plain", "foreach", "fused")
    )
}
CHANGES: dict[str, Callable[[Subject], None]] = {
    "no_grad": _no_grad,
    "inference_mode": _inference_mode,
    "slice": _slice,
    "detach": _detached,
    "data": _data,
    "new data": _new_data,
    "numpy view": _numpy,
    "DLPack": _dlpack,
    "storage copied": _storage,
    "data of a norm": _norm_data,
    "eps": _eps,
    "new parameter": _new_parameter,
    "new linear": _new_linear,
    "bias removed": _no_bias,
    "layers swapped": _swapped_layers,
    "layer replaced": _new_layer,
    "list replaced": _new_list,
    "encoder replaced": _new_encoder,
    "backbone replaced": _new_backbone,
    "load_state_dict": _load,
    "load_state_dict, assign": _load_assign,
    "load_state_dict, inference mode": _load_inference,
    "load_state_dict of the stock model": _load_stock,
    "through the stock model": _through_stock,
    "narrow and back": _round_trip,
    "double and back": _double,
    "swapped parameters": _swap_parameters,
    "share_memory": _share_memory,
    "init": _init,
    "vector_to_parameters": _from_vector,
    "hook": _hook,
    "forward replaced": _forward,
    "pruned": _prune,
    "average copied": _average,
    **OPTIMISERS,
}
