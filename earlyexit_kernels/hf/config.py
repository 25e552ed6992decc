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
from earlyexit_kernels.backbones.base import query_width
from earlyexit_kernels.criteria import Criterion, from_dict
from earlyexit_kernels.hf.saving import DIGEST

FORMAT_VERSION = 1
#: What is expected of an entry, in words, and a test for it; a missing entry or None passes.
Check = tuple[str, Callable[[Any], bool]]


def _size(most: int, least: int = 1) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return f"a whole number from {least} to {most:,}", fits


def _is_floating(dtype: Any) -> bool:
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    return getattr(named, "is_floating_point", False)


MAX_WIDTH = 32_768
#: Entries of both configs that transformers would use without a check. Sizes are bounded far above any published
#: encoder: without a bound a config from an untrusted source could keep a process busy or exhaust its memory.
ENTRIES: dict[str, Check] = {
    "id2label": ("a dict of names by number", lambda v: isinstance(v, dict) and all(str(k).isdecimal() for k in v)),
    "label2id": ("a dict of numbers by name", lambda v: isinstance(v, dict)),
    "model_type": ("a string", lambda v: isinstance(v, str)),
    "problem_type": ("a string", lambda v: isinstance(v, str)),
    "dtype": ("a floating dtype of torch", _is_floating),
    "num_labels": _size(1_000_000),
}
#: Families name the same entry differently.
BACKBONE_ENTRIES: dict[str, Check] = {
    **ENTRIES,
    "chunk_size_feed_forward": ("a whole number", lambda v: isinstance(v, int)),
    **dict.fromkeys(
        ("hidden_act", "activation", "hidden_activation", "classifier_activation"),
        ("an activation of transformers", lambda v: callable(v) or (isinstance(v, str) and v in ACT2FN)),
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_hidden_groups", "inner_group_num"), _size(512)),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size", "head_dim"), _size(MAX_WIDTH)),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), _size(4 * MAX_WIDTH)),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads"), _size(1_024)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), _size(10_000_000)),
    "type_vocab_size": _size(10_000_000, least=0),
}
HEADS_ENTRIES = {"width": _size(MAX_WIDTH), "attention_heads": _size(1_024), "halting_layers": _size(32)}
#: Of the whole encoder; Qwen2.5 72B, a large one of a supported family, has 72.7 billion.
MAX_PARAMETERS = 100_000_000_000
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


class EarlyExitConfig(PretrainedConfig):
    """Configuration of `EarlyExitForSequenceClassification`.

    Args:
        backbone_config: config of the encoder, or its dict; it is copied.
        method: name of a training method, or data of `Method.to_dict`.
        criterion: data of `Criterion.to_dict`, or None for full depth.
        calibration: data of `Calibration.to_dict`, or None; `Calibration.of` checks it.
        heads: data of `HeadConfig.to_dict`.
        strict: raise on invalid logits (NaN, several +inf, or all -inf).
        format_version: of the saved files.

    Raises:
        ValueError: an unknown format version or criterion, a backbone that is not a supported encoder, or sizes above
            their bounds.

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
        # entries of the file only: a config in memory may be saved with other weights
        kwargs = {name: value for name, value in kwargs.items() if name.partition(".")[0] != DIGEST}
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
        for name, data, of in (("heads", heads, "HeadConfig"), ("calibration", calibration, "Calibration")):
            if data is not None and not isinstance(data, dict):
                raise ValueError(f"{name}: expected the data of {of}.to_dict, got {data!r}")
        _check("", kwargs, ENTRIES)
        _check("heads.", heads or {}, HEADS_ENTRIES)
        _refuse_outputs("", kwargs)
        from_dict(criterion)
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
        _check("backbone_config.", data, BACKBONE_ENTRIES)
        try:
            config = AutoConfig.for_model(family, **data)
        except StrictDataclassError as error:
            raise ValueError(f"backbone_config: {error}") from error
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"backbone_config: expected the config of an encoder or its dict, got {config!r}")
    adapter_of(config.model_type)
    entries = {name: getattr(config, name, None) for name in (*BACKBONE_ENTRIES, *NEVER_RETURNED)}
    _check("backbone_config.", entries, BACKBONE_ENTRIES)
    if (parameters := _parameters(config)) > MAX_PARAMETERS:
        raise ValueError(
            f"backbone_config: expected an encoder of at most {MAX_PARAMETERS:,} parameters, its sizes give about "
            f"{parameters:,}; do not trust this checkpoint"
        )
    _check_encoder(config)
    _refuse_outputs("backbone_config.", entries)
    return config


def _parameters(config: Any) -> int:
    """Return the approximate number of parameters of an encoder of these sizes."""
    layers = config.num_hidden_layers
    if getattr(config, "num_hidden_groups", None):
        layers = config.num_hidden_groups * config.inner_group_num
    rows = config.vocab_size + config.max_position_embeddings
    return layers * weights_per_layer(config) + rows * (getattr(config, "embedding_size", None) or config.hidden_size)


def weights_per_layer(config: Any) -> int:
    """Return the approximate number of weights of a layer, as if its feed-forward part were gated."""
    width, queries, heads = config.hidden_size, query_width(config), config.num_attention_heads
    shared = queries * (getattr(config, "num_key_value_heads", None) or heads) // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width
    return 2 * width * (queries + shared) + 3 * width * inner


def _refuse_outputs(where: str, data: Mapping[str, Any]) -> None:
    """Refuse a config that requests outputs that `forward` does not support."""
    for name in NEVER_RETURNED:
        if data.get(name):
            raise ValueError(
                f"{where}{name}={data[name]!r} is not supported: rows leave at different layers, so there is no full "
                "set to return; set it to False, and call model.backbone instead"
            )


def _check(where: str, data: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Refuse entries that fail their checks; `where` is the path of `data` in the config.

    Raises:
        ValueError: names the entry, its value and what is expected.
    """
    for name, (expected, fits) in checks.items():
        if data.get(name) is not None and not fits(data[name]):
            raise ValueError(f"{where}{name}: expected {expected}, got {data[name]!r}")


def _check_encoder(config: Any) -> None:
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
