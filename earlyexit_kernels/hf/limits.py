"""Limits on the sizes in a config, checked before modules of these sizes are built.

They are far above any published encoder. Without them a config from an untrusted source could keep a process busy for
minutes or exhaust its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

MAX_LAYERS = 512
MAX_WIDTH = 32_768
MAX_INNER_WIDTH = 4 * MAX_WIDTH
MAX_ATTENTION_HEADS = 1_024
MAX_VOCABULARY = 10_000_000
MAX_POSITIONS = 10_000_000
MAX_LABELS = 1_000_000
MAX_HALTING_LAYERS = 32
#: Parameters of the whole encoder; Qwen2.5 72B, a large one of a supported family, has 72.7 billion.
MAX_PARAMETERS = 100_000_000_000

#: Entry of a backbone's config -> its limit; families name the same size differently.
BACKBONE = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_hidden_groups", "inner_group_num"), MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size", "head_dim"), MAX_WIDTH),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), MAX_INNER_WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads"), MAX_ATTENTION_HEADS),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), MAX_VOCABULARY),
    "max_position_embeddings": MAX_POSITIONS,
    "num_labels": MAX_LABELS,
}
MAY_BE_ZERO = ("type_vocab_size",)
LABELS = {"num_labels": MAX_LABELS}
HEADS = {"width": MAX_WIDTH, "attention_heads": MAX_ATTENTION_HEADS, "halting_layers": MAX_HALTING_LAYERS}


def check_sizes(where: str, data: Mapping[str, Any], bounds: Mapping[str, int]) -> None:
    """Refuse sizes that are not whole numbers from 1, or 0 in `MAY_BE_ZERO`, to their limit; None and missing pass.

    Args:
        where: beginning of the message.
        data: of a config.
        bounds: entry -> largest value.

    Raises:
        ValueError: names the entry, its value and the limit.
    """
    for name, most in bounds.items():
        value = data.get(name)
        if value is None:
            continue
        least = 0 if name in MAY_BE_ZERO else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{where}{name}: expected a whole number from {least} to {most:,}, got {value!r}")


def check_backbone_sizes(config: Any) -> None:
    """Refuse a backbone's config with a size above its limit, or with too many parameters.

    Raises:
        ValueError: names the size.
    """
    check_sizes("backbone_config.", {name: getattr(config, name, None) for name in BACKBONE}, BACKBONE)
    layers = config.num_hidden_layers
    if getattr(config, "num_hidden_groups", None):
        layers = config.num_hidden_groups * config.inner_group_num
    rows = config.vocab_size + config.max_position_embeddings
    parameters = layers * _weights_per_layer(config)
    parameters += rows * (getattr(config, "embedding_size", None) or config.hidden_size)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"backbone_config: expected an encoder of at most {MAX_PARAMETERS:,} parameters, its sizes give about "
            f"{parameters:,}; do not trust this checkpoint"
        )


def _weights_per_layer(config: Any) -> int:
    """Return about how many weights a layer of these sizes has; its feed-forward part is taken for a gated one."""
    width, queries, heads = config.hidden_size, query_width(config), config.num_attention_heads
    shared = queries * (getattr(config, "num_key_value_heads", None) or heads) // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width
    return 2 * width * (queries + shared) + 3 * width * inner


def linear_weights(*modules: Any) -> int:
    """Return the number of weights in the linears of some modules, which is their multiply-adds per token."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


def query_width(config: Any) -> int:
    """Return the width of the queries of a layer, all heads together."""
    head = getattr(config, "head_dim", None)
    return config.num_attention_heads * head if head else config.hidden_size
