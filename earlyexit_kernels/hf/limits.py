"""Limits on the sizes in a config, checked before modules of these sizes are built.

They are far above any published encoder. Without them a config from an untrusted source could keep a process busy for
minutes or exhaust its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 512
MAX_WIDTH = 32_768
MAX_INNER_WIDTH = 4 * MAX_WIDTH
MAX_ATTENTION_HEADS = 1_024
MAX_VOCABULARY = 10_000_000
MAX_POSITIONS = 10_000_000
MAX_LABELS = 1_000_000
MAX_HALTING_LAYERS = 32
#: Parameters of the whole encoder; the largest one of a supported family, XLM-RoBERTa XXL, has 10.7 billion.
MAX_PARAMETERS = 20_000_000_000

#: Entry of a backbone's config -> its limit; families name the same size differently.
BACKBONE = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_hidden_groups", "inner_group_num"), MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size"), MAX_WIDTH),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), MAX_INNER_WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads"), MAX_ATTENTION_HEADS),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), MAX_VOCABULARY),
    "max_position_embeddings": MAX_POSITIONS,
    "num_labels": MAX_LABELS,
}
LABELS = {"num_labels": MAX_LABELS}
HEADS = {"width": MAX_WIDTH, "attention_heads": MAX_ATTENTION_HEADS, "halting_layers": MAX_HALTING_LAYERS}


def check_sizes(where: str, data: Mapping[str, Any], bounds: Mapping[str, int]) -> None:
    """Refuse sizes that are not whole numbers from 1 to their limit; missing entries and None pass.

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
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{where}{name}: expected a whole number from 1 to {most:,}, got {value!r}")


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
    parameters = layers * linear_weights_per_layer(config)
    parameters += rows * (getattr(config, "embedding_size", None) or config.hidden_size)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"backbone_config: expected an encoder of at most {MAX_PARAMETERS:,} parameters, its sizes give "
            f"{parameters:,}; do not trust this checkpoint"
        )


def linear_weights_per_layer(config: Any) -> int:
    """Return the number of weights in the linears of one encoder layer, which is its multiply-adds per token."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width
    return 4 * width * width + 2 * width * inner
