"""Make the encoders of the experiments from one pretrained six-layer BERT.

No twelve-layer one is at hand without a network. `TWELVE` has each of the six layers twice in place; `SHARED` has the
architecture of ALBERT, twelve steps of one layer, which starts as the first of the six. Neither is pretrained at this
depth: they show what a rule does with twelve exits, and stand for no published model.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn
from transformers import AlbertConfig, AlbertModel, AutoTokenizer, BertModel

from benchmarks.evidence.plans import SHARED, SIX, TWELVE


def make_encoders(source: str, folder: Path) -> dict[str, str]:
    """Save the encoders that do not exist yet, and return where each of them is.

    Args:
        source: folder or hub name of a BERT encoder.
        folder: to save the others in.

    Returns:
        folder or hub name by the name of the encoder.
    """
    found = {SIX: source}
    for name, make in ((TWELVE, twice_in_place), (SHARED, shared_layer)):
        path = folder / name
        if not (path / "config.json").is_file():
            make(BertModel.from_pretrained(source)).save_pretrained(path)
            AutoTokenizer.from_pretrained(source).save_pretrained(path)
        found[name] = str(path)
    return found


def twice_in_place(base: BertModel) -> BertModel:
    """Return a model of twice the depth, layers 1, 1, 2, 2, ... of the given one."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 2 * base.config.num_hidden_layers
    model = BertModel(config)
    state = base.state_dict()
    for number in range(config.num_hidden_layers):
        given = f"encoder.layer.{number // 2}."
        own = f"encoder.layer.{number}."
        layer = {key.replace(given, own): value for key, value in base.state_dict().items() if key.startswith(given)}
        state = {key: value for key, value in state.items() if not key.startswith(own)} | layer
    model.load_state_dict(state)
    return model


#: Part of a layer of BERT -> part of a layer of ALBERT.
PARTS = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}


def shared_layer(base: BertModel) -> AlbertModel:
    """Return an ALBERT of twelve steps whose embeddings, pooler and layer are those of the given model, its first."""
    given = base.config
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    model = AlbertModel(
        AlbertConfig(
            **{name: getattr(given, name) for name in (*sizes, "type_vocab_size", "layer_norm_eps", "hidden_act")},
            embedding_size=given.hidden_size,
            num_hidden_layers=12,
            hidden_dropout_prob=given.hidden_dropout_prob,
            attention_probs_dropout_prob=given.attention_probs_dropout_prob,
            classifier_dropout_prob=given.hidden_dropout_prob,
            pad_token_id=given.pad_token_id,
        )
    )
    model.embeddings.load_state_dict(base.embeddings.state_dict())
    model.pooler.load_state_dict(base.pooler.dense.state_dict())
    mapping = model.encoder.embedding_hidden_mapping_in
    nn.init.eye_(mapping.weight)
    nn.init.zeros_(mapping.bias)
    layer, first = model.encoder.albert_layer_groups[0].albert_layers[0], base.encoder.layer[0]
    for part, name in PARTS.items():
        layer.get_submodule(name).load_state_dict(first.get_submodule(part).state_dict())
    return model
