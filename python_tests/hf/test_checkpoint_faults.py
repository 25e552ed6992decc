"""Damaged, foreign or hostile checkpoints are refused with an error that names the problem."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support.checkpoint_files import WEIGHTS, change_config
from support.models import FAMILIES, LOADERS, early_exit, ragged, stock

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.hf.config import REQUIRED_OF_BACKBONE


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture
def saved(tmp_path) -> Path:
    early_exit(criterion=Entropy(threshold=0.9)).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("heads.out.1.weight", "allow_new_heads=True"),
        ("heads.dense.0.bias", "allow_new_heads=True"),
        ("backbone.encoder.layer.0.output.dense.bias", "copy the whole checkpoint again"),
    ],
)
def test_missing_weight_is_named(saved, load, name, cure):
    change_weights(saved, lambda state: state.pop(name))
    with pytest.raises(ee.MissingHeadsError, match=cure) as caught:
        load(saved)
    assert name in str(caught.value) and str(saved) in str(caught.value)
    with pytest.raises(ee.MissingHeadsError, match=name):
        load(pretrained_model_name_or_path=saved)


def test_missing_exits_can_be_allowed(saved, load):
    expected = load(saved)(**ragged(), output_all_logits=True).all_logits
    change_weights(saved, lambda state: [state.pop(f"heads.out.1.{part}") for part in ("weight", "bias")])
    model, info = load(saved, allow_new_heads=True, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["heads.out.1.bias", "heads.out.1.weight"]
    got = model(**ragged(), output_all_logits=True).all_logits
    assert torch.equal(got[:, [0, 2, 3]], expected[:, [0, 2, 3]]) and not torch.equal(got[:, 1], expected[:, 1])


def test_wrong_shape_is_refused(saved, load):
    change_weights(saved, lambda state: state.update({"heads.out.1.weight": torch.zeros(5, 64)}))
    for arguments in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            RuntimeError, match=r"heads\.out\.1\.weight \(5, 64\) in .*, \(3, 64\) by the config"
        ) as caught:
            load(saved, **arguments)
        assert str(saved / WEIGHTS) in str(caught.value)


def test_unexpected_weight_is_refused(saved, load):
    """The file has a dense module that the config lacks, so they belong to different models."""
    change_config(saved, heads={"pooling": "first"})
    with pytest.raises(RuntimeError, match=r"heads\.dense\.0\.(weight|bias)"):
        load(saved)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "corrupt": lambda data: b"\x07" * len(data),
    "header damaged": lambda data: data[:8] + b"}" + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(saved, load, damage):
    (saved / WEIGHTS).write_bytes(DAMAGE[damage]((saved / WEIGHTS).read_bytes()))
    with pytest.raises(RuntimeError, match=WEIGHTS) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_missing_file_is_named(saved, load):
    (saved / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        load(saved)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_required_backbone_entry_is_refused(tmp_path, family):
    """ALBERT's default of 64 heads fits the weights of a model with 4, but gives other answers."""
    early_exit(family).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    removed = [names for names in REQUIRED_OF_BACKBONE if any(name in whole for name in names)]
    assert len(removed) >= 4
    for names in removed:
        change_config(tmp_path, backbone_config={k: v for k, v in whole.items() if k not in names})
        for load in LOADERS.values():
            with pytest.raises(ValueError, match=f"backbone_config: expected an entry '{names[0]}', got none"):
                load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version_is_refused(saved, load, version):
    change_config(saved, format_version=version)
    with pytest.raises(ValueError, match="format_version: this package reads version 1, the checkpoint has"):
        load(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"criterion": {"name": "hunch"}}, "criterion: expected one of .*got 'hunch'"),
        ({"criterion": {"name": "entropy", "threshold": -1}}, "threshold.*at least 0, got -1"),
        ({"criterion": {"name": "entropy", "threshold": [0.1]}}, "expected one number for each of the 3 exits"),
        ({"criterion": {"name": "entropy", "limit": 1}}, "criterion 'entropy'.*limit"),
        ({"criterion": {"name": "q_exit", "q": 0.5}}, "needs heads with the output 'halting'"),
        ({"method": "hunch"}, "method: expected one of .*got 'hunch'"),
        ({"heads": {"pooling": "max"}}, r"pooling=...\): expected one of .*got 'max'"),
    ],
)
def test_invalid_config_is_refused(saved, load, values, message):
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_other_attention_is_refused(saved, load, attention):
    with pytest.raises(ValueError, match="attn_implementation cannot be chosen"):
        load(saved, attn_implementation=attention)


def test_stock_checkpoint_is_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="to_early_exit"):
        ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("arguments", [{}, {"use_safetensors": False}])
def test_pickles_are_never_read(tmp_path, saved, load, arguments):
    state = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load(saved, **arguments)
    target = tmp_path / "ran"
    bomb = pickle.dumps({"heads.out.0.weight": Bomb(target)})
    pickle.loads(bomb)
    assert target.exists(), "the pickle runs its code"
    target.unlink()
    (saved / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        load(saved, **arguments)
    assert not target.exists()


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "sharded"
    early_exit().save_pretrained(folder, max_shard_size="100KB")
    return folder


OUTSIDE = [
    "pytorch_model.bin",
    "../outside.safetensors",
    "/tmp/outside.safetensors",
    "sub/a.safetensors",
    "..",
    3,
    None,
]


@pytest.mark.parametrize("name", [*OUTSIDE, "..\\outside.safetensors", "x.safetensors.bin"])
def test_index_may_only_name_safetensors_in_its_folder(sharded, load, name, monkeypatch):
    index = json.loads((sharded / INDEX).read_text())
    entry = "heads.out.0.weight"
    shutil.copy(sharded / index["weight_map"][entry], sharded.parent / "outside.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"no weights")
    index["weight_map"][entry] = name
    (sharded / INDEX).write_text(json.dumps(index))
    for reader in ("torch.load", "safetensors.torch.load_file", "earlyexit_kernels.hf.weight_files.safe_open"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=entry) as caught:
        load(sharded)
    assert repr(name) in str(caught.value) and str(sharded / INDEX) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3, "metadata": {}}', '{"weight_map": {}}'])
def test_invalid_index_is_named(sharded, load, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        load(sharded)


def test_missing_shard_is_named(sharded, load):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(sharded)


def test_links_are_followed(sharded, load):
    """The files in the hub's cache are links."""
    expected = load(sharded)(**ragged()).logits
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert torch.equal(load(sharded)(**ragged()).logits, expected)


def test_pickle_is_not_read_by_name(saved):
    config = ee.EarlyExitConfig.from_pretrained(saved)
    torch.save(load_file(saved / WEIGHTS), saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        ee.EarlyExitForSequenceClassification.from_pretrained(saved / "pytorch_model.bin", config=config)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_of_integer_dtype_are_refused(saved, load, dtype):
    name = "backbone.encoder.layer.1.output.dense.weight"
    change_weights(saved, lambda state: state.update({name: state[name].to(dtype)}))
    with pytest.raises(RuntimeError, match="expected one of F64, F32, F16, BF16") as caught:
        load(saved)
    assert name in str(caught.value) and str(saved / WEIGHTS) in str(caught.value)


HUGE = [
    ("backbone_config", "num_hidden_layers", 10**7),
    ("backbone_config", "num_hidden_layers", 0),
    ("backbone_config", "num_hidden_layers", True),
    ("backbone_config", "hidden_size", 10**9),
    ("backbone_config", "intermediate_size", 10**9),
    ("backbone_config", "vocab_size", 10**12),
    ("backbone_config", "max_position_embeddings", 10**12),
    ("backbone_config", "num_attention_heads", 0),
    ("backbone_config", "num_labels", 10**9),
    ("heads", "halting_layers", 10**7),
    ("heads", "width", 10**9),
    ("heads", "attention_heads", 10**9),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("part", "name", "value"), HUGE)
def test_huge_sizes_are_refused_before_modules_are_built(saved, load, part, name, value, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was built"))
    config = json.loads((saved / "config.json").read_text())
    change_config(saved, **{part: {**config[part], name: value}})
    with pytest.raises(ValueError, match=rf"{part}\.{name}: expected a whole number from 1 to [0-9,]+, got {value}"):
        load(saved)


def test_huge_sizes_are_refused_in_every_config(saved, load):
    change_config(saved, num_labels=10**9, id2label=None)
    with pytest.raises(ValueError, match="num_labels: expected a whole number"):
        load(saved)
    large = {"hidden_size": 32_768, "num_hidden_layers": 500, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="expected an encoder of at most 100,000,000,000 parameters"):
        ee.EarlyExitConfig(backbone_config={"model_type": "bert", **large})
    with pytest.raises(ValueError, match=r"backbone_config\.n_layers"):
        ee.EarlyExitConfig(backbone_config={"model_type": "distilbert", "n_layers": 10**7})
    with pytest.raises(ValueError, match=r"backbone_config\.inner_group_num"):
        ee.EarlyExitConfig(backbone_config=tf.AlbertConfig(inner_group_num=10**7))


@pytest.mark.parametrize("family", [[1, 2], {}, 3])
def test_model_type_of_wrong_kind_is_refused(saved, family):
    change_config(saved, model_type=family)
    with pytest.raises(ValueError, match="model_type: expected a string"):
        ee.EarlyExitForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[({"criterion": data}, "criterion: expected the data of Criterion.to_dict") for data in ([], "entropy", 3)],
        ({"criterion": {"name": "skip_gate", "rule": []}}, "criterion 'skip_gate'"),
        ({"backbone_config": {}}, "backbone_config: expected 'model_type'"),
        ({"backbone_config": {"model_type": "t5"}}, "'t5' has no adapter"),
        ({"backbone_config": {"model_type": "early-exit"}}, "'early-exit' has no adapter"),
        *[({"backbone_config": data}, "backbone_config: expected the config") for data in ([], "bert", 3)],
        ({"heads": {"hunch": 1}}, r"heads: expected settings among .*got \['hunch'\]"),
        *[({"heads": data}, "heads: expected the data of HeadConfig.to_dict") for data in ([], "linear", 3)],
        ({"heads": {"dropout": "much"}}, r"dropout=...\): expected a finite number in \[0, 1\], got 'much'"),
        ({"heads": {"halting_bias": None}}, r"halting_bias=...\): expected a finite number, got None"),
        ({"heads": {"activation": []}}, r"activation=...\): expected one of .*got \[\]"),
        *[({"method": data}, "method: expected one of") for data in ([], {}, 3, None, {"name": []})],
        ({"method": {"name": "palbert", "hunch": 1}}, "method 'palbert'.*hunch"),
        ({"problem_type": []}, "problem_type: expected a string"),
        *[({"id2label": data}, "id2label: expected a dict") for data in ([], "x", {"a": "b"})],
        *[({"dtype": data}, "dtype: expected a floating dtype") for data in ("int8", "x", [], 3)],
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights='adapter_model.bin'"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
    ],
)
def test_config_value_of_wrong_kind_is_refused(saved, load, values, message):
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("chunk_size_feed_forward", 1, "chunk_size_feed_forward > 0"),
        ("chunk_size_feed_forward", [1], "backbone_config.chunk_size_feed_forward: expected a whole number"),
        ("is_decoder", True, "expected an encoder, got one with is_decoder"),
        ("add_cross_attention", True, "expected an encoder, got one with add_cross_attention"),
        ("output_hidden_states", True, "backbone_config.output_hidden_states=True is not supported"),
        ("output_attentions", True, "backbone_config.output_attentions=True is not supported"),
        ("hidden_size", "wide", "backbone_config.hidden_size"),
        ("hidden_act", "hunch", "backbone_config.hidden_act: expected an activation"),
        ("layer_norm_eps", [], "backbone_config.*layer_norm_eps"),
    ],
)
def test_unsupported_backbone_setting_is_refused(saved, load, name, value, message):
    config = json.loads((saved / "config.json").read_text())
    change_config(saved, backbone_config={**config["backbone_config"], name: value})
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_unsupported_outputs_in_the_config_are_refused(name):
    model = stock(attention="eager")
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        ee.to_early_exit(model)
    model = early_exit()
    setattr(model.config, f"_{name}" if name == "output_attentions" else name, True)
    with pytest.raises(ValueError, match="are not supported"):
        model(**ragged())
    assert model(**ragged(), **{name: False}).logits is not None


def test_config_without_a_version_is_refused(saved, load):
    config = json.loads((saved / "config.json").read_text())
    del config["format_version"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'the config has none.*"format_version": 1'):
        load(saved)


def test_config_without_a_digest_is_accepted(saved, load):
    """Earlier releases saved no digest."""
    config = json.loads((saved / "config.json").read_text())
    assert len(config.pop("weights_digest")) == 64
    (saved / "config.json").write_text(json.dumps(config))
    change_weights(saved, lambda state: state["heads.out.1.bias"].add_(1))
    load(saved)


def test_weights_changed_after_the_save_are_refused(saved, load):
    change_weights(saved, lambda state: state["heads.out.1.bias"].add_(1))
    with pytest.raises(RuntimeError, match=r"different saves.*weights_digest"):
        load(saved)


def test_missing_encoder_layer_is_refused_with_new_heads(saved):
    weights = load_file(saved / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layer.1." not in name}
    save_file(kept, saved / "model.safetensors", metadata={"format": "pt"})
    assert len(kept) < len(weights)
    for how in ({}, {"allow_new_heads": True}):
        with pytest.raises(ee.MissingHeadsError, match="of the encoder, which would be random"):
            ee.EarlyExitForSequenceClassification.from_pretrained(saved, **how)
