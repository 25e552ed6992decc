"""The configuration of an early-exit model: the config of its backbone, its heads and its exit criterion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from earlyexit_kernels.backbones import BACKBONES, adapter_of
from earlyexit_kernels.criteria import Criterion, from_dict
from earlyexit_kernels.hf import limits
from earlyexit_kernels.hf.calibration import Calibration

FORMAT_VERSION = 1
#: Entry -> the expected kind of value, in words, and a test for it; a missing entry or None passes.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id2label": ("a dict of names by number", lambda v: isinstance(v, dict) and all(str(k).isdecimal() for k in v)),
    "label2id": ("a dict of numbers by name", lambda v: isinstance(v, dict)),
    "model_type": ("a string", lambda v: isinstance(v, str)),
    "problem_type": ("a string", lambda v: isinstance(v, str)),
    "dtype": ("a floating dtype of torch", lambda v: getattr(_dtype(v), "is_floating_point", False)),
    "chunk_size_feed_forward": ("a whole number", lambda v: isinstance(v, int)),
    **dict.fromkeys(
        ("hidden_act", "activation", "hidden_activation", "classifier_activation"),
        ("an activation of transformers", lambda v: callable(v) or (isinstance(v, str) and v in ACT2FN)),
    ),
}
#: Required entries of a backbone's config, by all their names: they change answers and do not follow from the weights.
REQUIRED_OF_BACKBONE = (
    ("num_attention_heads", "n_heads"),
    ("num_hidden_layers", "n_layers"),
    ("hidden_act", "activation", "hidden_activation"),
    ("layer_norm_eps", "norm_eps", "rms_norm_eps"),
    ("pad_token_id",),
)
#: Kinds of rotary positions whose angles depend on the longest row of a batch.
ROPE_BY_LENGTH = ("dynamic", "longrope")
NEVER_RETURNED = ("output_hidden_states", "output_attentions")


def _dtype(value: Any) -> Any:
    return getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value


class EarlyExitConfig(PretrainedConfig):
    """Configuration of `EarlyExitForSequenceClassification`.

    Args:
        backbone_config: config of the encoder, or its dict; it is copied.
        method: name of a training method, or data of `Objective.to_dict`.
        criterion: data of `Criterion.to_dict`, or None for full depth.
        calibration: data of `Calibration.to_dict`, or None.
        heads: data of `HeadConfig.to_dict`.
        strict: raise on invalid logits (NaN, several +inf, or all -inf).
        format_version: of the saved files.

    Raises:
        ValueError: an unknown format version or criterion, a backbone that is not a supported encoder, or sizes above
            the limits of `earlyexit_kernels.hf.limits`.

    Example:

        >>> from earlyexit_kernels import EarlyExitConfig, criteria
        >>> from transformers import BertConfig
        >>> encoder = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> rule = criteria.Entropy(threshold=0.3)
        >>> config = EarlyExitConfig(backbone_config=encoder, criterion=rule.to_dict(), num_labels=3)
        >>> config.exit_criterion() == rule
        True
        >>> config.backbone_config.num_hidden_layers, config.method
        (3, 'joint')
    """

    model_type = "early-exit"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar = ["exit_layer", "layers_run", "all_logits"]

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        method: str | dict[str, Any] = "joint",
        criterion: dict[str, Any] | None = None,
        heads: dict[str, Any] | None = None,
        strict: bool = False,
        calibration: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        # an entry of the file only: a config in memory may be saved with other weights
        kwargs.pop("weights_digest", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: this package reads version {FORMAT_VERSION}, the checkpoint has {format_version!r}; "
                "install the release of earlyexit_kernels that wrote it"
            )
        if kwargs.get("transformers_weights") is not None:
            raise ValueError(
                f"transformers_weights={kwargs['transformers_weights']!r}: the file of the weights cannot be chosen by "
                "a config; remove the entry"
            )
        if backbone_config is not None:
            backbone_config = _encoder_config(backbone_config)
        if heads is not None and not isinstance(heads, dict):
            raise ValueError(f"heads: expected the data of HeadConfig.to_dict, got {heads!r}")
        _check_kinds("", kwargs)
        limits.check_sizes("heads.", heads or {}, limits.HEADS)
        limits.check_sizes("", kwargs, limits.LABELS)
        _refuse_outputs("", kwargs)
        from_dict(criterion)
        if calibration is not None:
            Calibration.from_dict(calibration)
        # transformers resets the attention of nested configs: a shared object would lose its own
        self.backbone_config = copy.deepcopy(backbone_config)
        self.method = method
        self.criterion = criterion
        self.heads = heads or {}
        self.strict = strict
        self.calibration = calibration
        self.format_version = format_version
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from the data of a file.

        Raises:
            ValueError: the data has no format version, the config of the backbone lacks an entry of
                `REQUIRED_OF_BACKBONE`, which the default of the family would replace, or `num_labels` or `id2label`
                among the arguments has another number of labels than the data.
        """
        if "backbone_config" in config_dict and "format_version" not in config_dict:
            raise ValueError(
                f"format_version: this package reads version {FORMAT_VERSION}, the config has none; if it was written "
                f'by this package, add "format_version": {FORMAT_VERSION} to config.json'
            )
        _check_complete(config_dict.get("backbone_config"))
        asked = [name for name in ("num_labels", "id2label") if kwargs.get(name) is not None]
        if asked and "backbone_config" in config_dict:
            _check_label_count(asked[0], kwargs[asked[0]], super().from_dict(dict(config_dict)).num_labels)
        return super().from_dict(config_dict, **kwargs)

    def exit_criterion(self) -> Criterion:
        """Return the exit criterion."""
        return from_dict(self.criterion)


def _check_label_count(name: str, asked: Any, saved: int) -> None:
    """Refuse an argument of a load that would change the number of outputs of trained exits.

    Raises:
        ValueError: names the argument and both numbers.
    """
    count = len(asked) if isinstance(asked, Mapping) else asked
    if count != saved:
        raise ValueError(
            f"{name}: the argument asks for {count} label(s), the checkpoint has {saved}; leave the argument out. "
            "For another number of labels load the stock model with it, convert that with to_early_exit, and train"
        )


def _check_complete(backbone: Any) -> None:
    """Refuse the config of a backbone without an entry of `REQUIRED_OF_BACKBONE` that its family has.

    Raises:
        ValueError: names the entry.
    """
    name = backbone.get("model_type") if isinstance(backbone, dict) else None
    if not isinstance(name, str) or name not in BACKBONES or name not in CONFIG_MAPPING:
        return  # refused when the config is built
    family = CONFIG_MAPPING[name]()
    for names in REQUIRED_OF_BACKBONE:
        if any(hasattr(family, name) for name in names) and not any(name in backbone for name in names):
            raise ValueError(
                f"backbone_config: expected an entry {names[0]!r}, got none; copy config.json again from where the "
                "model was saved"
            )


def _encoder_config(config: Any) -> Any:
    """Return the config of an encoder, given as such or as a dict, after checks.

    Raises:
        ValueError: not the config of a supported encoder.
    """
    if isinstance(config, dict):
        data = dict(config)
        family = data.pop("model_type", None)
        if not isinstance(family, str):
            raise ValueError(f"backbone_config: expected 'model_type', the family of the encoder, got {family!r}")
        adapter_of(family)
        _check_kinds("backbone_config.", data)
        limits.check_sizes("backbone_config.", data, limits.BACKBONE)
        try:
            config = AutoConfig.for_model(family, **data)
        except StrictDataclassError as error:
            raise ValueError(f"backbone_config: {error}") from error
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"backbone_config: expected the config of an encoder or its dict, got {config!r}")
    adapter_of(config.model_type)
    limits.check_backbone_sizes(config)
    check_encoder(config)
    _refuse_outputs("backbone_config.", {name: getattr(config, name, False) for name in NEVER_RETURNED})
    return config


def _refuse_outputs(where: str, data: Mapping[str, Any]) -> None:
    """Refuse a config that requests outputs that `forward` does not support."""
    for name in NEVER_RETURNED:
        if data.get(name):
            raise ValueError(
                f"{where}{name}={data[name]!r} is not supported: rows leave at different layers, so there is no full "
                "set to return; set it to False, and call model.backbone instead"
            )


def _check_kinds(where: str, data: Mapping[str, Any]) -> None:
    """Refuse values that transformers would use without a check.

    Raises:
        ValueError: names the entry, its value and what is expected.
    """
    for name, (expected, fits) in KINDS.items():
        if data.get(name) is not None and not fits(data[name]):
            raise ValueError(f"{where}{name}: expected {expected}, got {data[name]!r}")


def check_encoder(config: Any) -> None:
    """Refuse settings of an encoder that packed tokens do not support.

    Raises:
        ValueError: names the setting.
    """
    if (getattr(config, "chunk_size_feed_forward", 0) or 0) > 0:
        raise ValueError("chunk_size_feed_forward > 0 is not supported: packed tokens have no sequence axis to chunk")
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(
                f"expected an encoder, got one with {name}=True, which attends to other tokens than an encoder"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    if found := [name for name in ROPE_BY_LENGTH if any(entry.get("rope_type") == name for entry in kinds)]:
        raise ValueError(
            f"rope_type {found[0]!r} is not supported: its angles depend on the longest row of a batch, and so would "
            "answers; set another one, such as 'linear' or 'yarn', in rope_parameters of the config"
        )
