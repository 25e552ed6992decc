"""Saved models come back equal; damaged, mixed, foreign or hostile ones are refused with an error that names what."""

from __future__ import annotations

import json
import pickle
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support.checkpoint_files import WEIGHTS, change_config, change_weights, config_of
from support.models import (
    ALL_FAMILIES,
    FAMILIES,
    LOADERS,
    batch_for,
    early_exit,
    holes_of,
    ragged,
    run_python,
    stock,
)

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, Margin, Patience, QExit
from earlyexit_kernels.hf.config import REQUIRED_OF_BACKBONE

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folder with a save in one file, and another in shards."""
    place, model = tmp_path_factory.mktemp("saved"), early_exit(criterion=Entropy(threshold=0.9))
    model.save_pretrained(place / "one")
    model.save_pretrained(place / "shards", max_shard_size="100KB")
    return place


@pytest.fixture
def saved(folders, tmp_path) -> Path:
    return shutil.copytree(folders / "one", tmp_path / "one")


@pytest.fixture
def sharded(folders, tmp_path) -> Path:
    return shutil.copytree(folders / "shards", tmp_path / "shards")


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


# what is saved is loaded

SETTINGS = {
    "full depth": {"criterion": None, "method": "pabee"},
    "strict": {"criterion": Entropy(threshold=0.7), "strict": True},
    "thresholds": {"criterion": Entropy(threshold=[0.1, 0.7, 1.0], normalized=True), "pooling": "mean"},
    "first token": {"criterion": Margin(threshold=[0.3, 0.2, 0.1]), "pooling": "first"},
    "regression": {"criterion": Patience(patience=1, tolerance=0.1), "num_labels": 1},
    "several labels": {
        "criterion": QExit(q=0.6),
        "halting": True,
        "problem_type": "multi_label_classification",
    },
}


@pytest.mark.parametrize(
    ("setting", "dtype"), [*((name, torch.float32) for name in SETTINGS), ("thresholds", torch.bfloat16)]
)
def test_a_saved_model_comes_back(tmp_path, load, setting, dtype):
    model = early_exit(**SETTINGS[setting]).to(dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not again.training and again.dtype == dtype == {p.dtype for p in again.parameters()}.pop()
    assert again.criterion == model.criterion == SETTINGS[setting]["criterion"]
    assert again.config.strict is SETTINGS[setting].get("strict", False)
    for name in ("problem_type", "method"):
        assert getattr(again.config, name) == getattr(model.config, name)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    batch = batch_for(model)
    old, new = model(**batch, output_all_logits=True), again(**batch, output_all_logits=True)
    assert all(torch.equal(old[name], new[name]) for name in ("all_logits", "logits", "exit_layer"))


def test_files_are_safetensors_and_plain_json(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", WEIGHTS]

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    text = (saved / "config.json").read_text()
    config = json.loads(text, parse_constant=no_constant)
    assert config["model_type"] == "early-exit" and config["format_version"] == 1
    assert config["criterion"] == {"name": "entropy", "threshold": 0.9, "normalized": False}
    assert config["backbone_config"]["model_type"] == "bert"
    assert "earlyexit_packed" not in text


def test_arguments_of_a_load_that_are_accepted(saved, load):
    """Another dtype, the config of a model, and the labels that the checkpoint has."""
    model, batch = load(saved), ragged()
    half = load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    got, expected = (m(**batch, output_all_logits=True).all_logits.float() for m in (half, model))
    assert (got - expected).abs().max() < 0.15
    assert torch.equal(load(saved, config=model.config)(**batch).logits, model(**batch).logits)
    assert load(saved, num_labels=3).config.num_labels == 3
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    assert load(saved, **names).config.id2label == names["id2label"]


def test_shards_and_links_are_read(saved, sharded, load):
    """The files in the hub's cache are links."""
    expected = load(saved)(**ragged()).logits
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(load(sharded)(**ragged()).logits, expected)
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert torch.equal(load(sharded)(**ragged()).logits, expected)


def test_missing_exits_can_be_allowed(saved, load):
    expected = load(saved)(**ragged(), output_all_logits=True).all_logits
    change_weights(saved, lambda state: [state.pop(f"heads.out.1.{part}") for part in ("weight", "bias")])
    model, info = load(saved, allow_new_heads=True, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["heads.out.1.bias", "heads.out.1.weight"]
    got = model(**ragged(), output_all_logits=True).all_logits
    assert torch.equal(got[:, [0, 2, 3]], expected[:, [0, 2, 3]]) and not torch.equal(got[:, 1], expected[:, 1])


def test_a_config_without_a_digest_is_accepted(saved, load):
    """Earlier releases saved no digest."""
    assert len(config_of(saved)["weights_digest"]) == 64
    change_config(saved, "weights_digest")
    change_weights(saved, lambda state: state["heads.out.1.bias"].add_(1))
    load(saved)


# refused


def assert_refused(folder: Path, words: str, damage: Damage, error: type[Exception] = ValueError, **arguments) -> None:
    """Check the error of both loaders, after a damage to the folder or with these arguments."""
    damage(folder)
    for load in LOADERS.values():
        with pytest.raises(error, match=words) as caught:
            load(folder, **arguments)
        assert arguments or error is ValueError or str(folder) in str(caught.value)


def nothing(folder):
    """No damage: the arguments are refused."""


def weights(change):
    return lambda folder: change_weights(folder, change)


def lacking(*names):
    return weights(lambda state: [state.pop(name) for name in names])


def of_bytes(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def config(*dropped, **values):
    return lambda folder: change_config(folder, *dropped, **values)


def entry(part, name, value):
    """Change an entry of the config of the backbone or of the heads."""
    return lambda folder: change_config(folder, **{part: {**config_of(folder)[part], name: value}})


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def reshaped(state):
    state["heads.out.1.weight"] = torch.zeros(5, 64)


def converted_to(dtype):
    return weights(lambda state: state.update({OUTPUT: state[OUTPUT].to(dtype)}))


BIAS, OUTPUT = "backbone.encoder.layer.0.output.dense.bias", "backbone.encoder.layer.1.output.dense.weight"
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: number for number, name in enumerate("abcde")}}
LACKING, NEW = ee.MissingHeadsError, {"allow_new_heads": True}
SHAPES, OTHER_SHAPES = rf"heads\.out\.1\.weight \(5, 64\) in .*{WEIGHTS}, \(3, 64\)", {"ignore_mismatched_sizes": True}
INTEGERS = rf"{WEIGHTS}: {OUTPUT} .*expected one of F64, F32, F16, BF16"
NOT_READ, ATTENTION = "pickled weights are never read", "attn_implementation cannot be chosen"
OTHER_LABELS = "asks for 5 label.*, the .* has 3.*to_early_exit"
#: Words of the error, damage of the weights, class of the error, and arguments of the load.
WRONG_WEIGHTS = [
    (r"heads\.out\.1\.weight.*allow_new_heads=True", lacking("heads.out.1.weight"), LACKING, {}),
    (r"heads\.dense\.0\.bias.*allow_new_heads=True", lacking("heads.dense.0.bias"), LACKING, {}),
    (f"{BIAS}.*copy the whole checkpoint again", lacking(BIAS), LACKING, {}),
    ("of the encoder, which would be random", lacking(OUTPUT), LACKING, NEW),
    *((SHAPES, weights(reshaped), RuntimeError, arguments) for arguments in ({}, OTHER_SHAPES)),
    # the file has a dense module that the config lacks, so they belong to different models
    (r"heads\.dense\.0\.(weight|bias)", config(heads={"pooling": "first"}), RuntimeError, {}),
    (r"different saves.*weights_digest", weights(lambda state: state["heads.out.1.bias"].add_(1)), RuntimeError, {}),
    *((INTEGERS, converted_to(dtype), RuntimeError, {}) for dtype in (torch.int8, torch.int64, torch.bool)),
    # cut short, empty, corrupt, and with a damaged header
    *(
        (WEIGHTS, of_bytes(change), RuntimeError, {})
        for change in (
            lambda data: data[: len(data) // 2],
            lambda data: b"",
            lambda data: b"\x07" * len(data),
            lambda data: data[:8] + b"}" + data[9:],
        )
    ),
    (WEIGHTS, lambda folder: (folder / WEIGHTS).unlink(), OSError, {}),
    ("safetensors", pickled, OSError, {}),
    (NOT_READ, nothing, ValueError, {"use_safetensors": False}),
    *((ATTENTION, nothing, ValueError, {"attn_implementation": name}) for name in ("sdpa", "flash_attention_2")),
    *(
        (OTHER_LABELS, nothing, ValueError, arguments)
        for arguments in ({"num_labels": 5}, LABELS, {"num_labels": 5, **NEW}, {"num_labels": 5, **OTHER_SHAPES})
    ),
]


@pytest.mark.parametrize(("words", "damage", "error", "arguments"), WRONG_WEIGHTS)
def test_wrong_weights_are_refused(saved, words, damage, error, arguments):
    assert_refused(saved, words, damage, error, **arguments)


def version(value):
    return config(format_version=value), "format_version: this package reads version 1, the checkpoint has"


def of_backbone(name, value, words):
    return entry("backbone_config", name, value), words


def kinds(name, values, words):
    """Values of a wrong kind for one entry of the config."""
    return [(config(**{name: value}), words) for value in values]


#: Damages of the config, and words of the error.
WRONG_CONFIGS = [
    *map(version, (0, 2, "1", None)),
    (config("format_version"), r'the config has none.*"format_version": 1'),
    (config(criterion={"name": "hunch"}), "criterion: expected one of .*got 'hunch'"),
    (config(criterion={"name": "entropy", "threshold": -1}), "threshold.*at least 0, got -1"),
    (config(criterion={"name": "entropy", "threshold": [0.1]}), "expected one number for each of the 3 exits"),
    (config(criterion={"name": "entropy", "limit": 1}), "criterion 'entropy'.*limit"),
    (config(criterion={"name": "q_exit", "q": 0.5}), "needs heads with the output 'halting'"),
    (config(criterion={"name": "skip_gate", "rule": []}), "criterion 'skip_gate'"),
    *kinds("criterion", ([], "entropy", 3), "criterion: expected the data of Criterion.to_dict"),
    (config(method="hunch"), "method: expected one of .*got 'hunch'"),
    (config(method={"name": "palbert", "hunch": 1}), "method 'palbert'.*hunch"),
    *kinds("method", ([], {}, 3, None, {"name": []}), "method: expected one of"),
    (config(heads={"pooling": "max"}), r"pooling=...\): expected one of .*got 'max'"),
    (config(heads={"hunch": 1}), r"heads: expected settings among .*got \['hunch'\]"),
    (config(heads={"dropout": "much"}), r"dropout=...\): expected a finite number in \[0, 1\], got 'much'"),
    (config(heads={"halting_bias": None}), r"halting_bias=...\): expected a finite number, got None"),
    (config(heads={"activation": []}), r"activation=...\): expected one of .*got \[\]"),
    *kinds("heads", ([], "linear", 3), "heads: expected the data of HeadConfig.to_dict"),
    (config(backbone_config={}), "backbone_config: expected 'model_type'"),
    *[(config(backbone_config={"model_type": f}), f"'{f}' has no adapter") for f in ("t5", "early-exit")],
    *kinds("backbone_config", ([], "bert", 3), "backbone_config: expected the config"),
    *kinds("id2label", ([], "x", {"a": "b"}), "id2label: expected a dict"),
    *kinds("dtype", ("int8", "x", [], 3), "dtype: expected a floating dtype"),
    (config(problem_type=[]), "problem_type: expected a string"),
    (config(transformers_weights="adapter_model.bin"), "transformers_weights='adapter_model.bin'"),
    (config(output_hidden_states=True), "output_hidden_states=True is not supported"),
    (config(output_attentions=True), "output_attentions=True is not supported"),
    of_backbone("chunk_size_feed_forward", 1, "chunk_size_feed_forward > 0"),
    of_backbone("chunk_size_feed_forward", [1], "backbone_config.chunk_size_feed_forward: expected a whole number"),
    of_backbone("is_decoder", True, "expected an encoder, got one with is_decoder"),
    of_backbone("add_cross_attention", True, "expected an encoder, got one with add_cross_attention"),
    of_backbone("output_hidden_states", True, "backbone_config.output_hidden_states=True is not supported"),
    of_backbone("output_attentions", True, "backbone_config.output_attentions=True is not supported"),
    of_backbone("hidden_size", "wide", "backbone_config.hidden_size"),
    of_backbone("hidden_act", "hunch", "backbone_config.hidden_act: expected an activation"),
    of_backbone("layer_norm_eps", [], "backbone_config.*layer_norm_eps"),
    (config(num_labels=10**9, id2label=None), "num_labels: expected a whole number"),
    *(
        (entry(part, name, value), rf"{part}\.{name}: expected a whole number from 1 to [0-9,]+, got {value}")
        for part, name, value in (
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
        )
    ),
]


@pytest.mark.parametrize(("damage", "words"), WRONG_CONFIGS, ids=[words[:50] for _, words in WRONG_CONFIGS])
def test_wrong_configs_are_refused(saved, damage, words, monkeypatch):
    """Sizes before modules of these sizes are built."""
    if "expected a whole number from 1" in words:
        monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was built"))
    assert_refused(saved, words, damage)


def test_other_configs_are_bounded_too():
    large = {"hidden_size": 32_768, "num_hidden_layers": 25, "num_attention_heads": 4}
    ee.EarlyExitConfig(backbone_config={"model_type": "bert", **large, "num_hidden_layers": 20})
    with pytest.raises(ValueError, match="expected an encoder of at most 100,000,000,000 parameters"):
        ee.EarlyExitConfig(backbone_config={"model_type": "bert", **large})
    with pytest.raises(ValueError, match=r"backbone_config\.n_layers"):
        ee.EarlyExitConfig(backbone_config={"model_type": "distilbert", "n_layers": 10**7})
    with pytest.raises(ValueError, match=r"backbone_config\.inner_group_num"):
        ee.EarlyExitConfig(backbone_config=tf.AlbertConfig(inner_group_num=10**7))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_entry_of_the_backbone_is_refused(tmp_path, family):
    """ALBERT's default of 64 heads fits the weights of a model with 4, but gives other answers."""
    early_exit(family).save_pretrained(tmp_path)
    whole = config_of(tmp_path)["backbone_config"]
    removed = [names for names in REQUIRED_OF_BACKBONE if any(name in whole for name in names)]
    assert len(removed) >= 4
    for names in removed:
        kept = {k: v for k, v in whole.items() if k not in names}
        words = f"backbone_config: expected an entry '{names[0]}', got none"
        assert_refused(tmp_path, words, config(backbone_config=kept))


def test_another_family_or_none_is_refused(saved, tmp_path):
    """By the class of the model; a stock checkpoint, and a model type that is no string."""
    stock().save_pretrained(tmp_path / "stock")
    load = LOADERS["class"]
    with pytest.raises((ValueError, TypeError, RuntimeError), match="to_early_exit"):
        load(tmp_path / "stock")
    for family in ([1, 2], {}, 3):
        change_config(saved, model_type=family)
        with pytest.raises(ValueError, match="model_type: expected a string"):
            load(saved)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("arguments", [{}, {"use_safetensors": False}])
def test_pickles_are_never_read(tmp_path, saved, load, arguments):
    (saved / WEIGHTS).unlink()
    target = tmp_path / "ran"
    bomb = pickle.dumps({"heads.out.0.weight": Bomb(target)})
    pickle.loads(bomb)
    assert target.exists(), "the pickle runs its code"
    target.unlink()
    (saved / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        load(saved, **arguments)
    given = ee.EarlyExitConfig.from_pretrained(saved)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        ee.EarlyExitForSequenceClassification.from_pretrained(saved / "pytorch_model.bin", config=given)
    assert not target.exists()


OUTSIDE = ["pytorch_model.bin", "../outside.safetensors", "/tmp/outside.safetensors", "sub/a.safetensors", ".."]
OUTSIDE += [3, None, "..\\outside.safetensors", "x.safetensors.bin"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_may_only_name_safetensors_in_its_folder(sharded, load, name, monkeypatch):
    index = json.loads((sharded / INDEX).read_text())
    weight = "heads.out.0.weight"
    shutil.copy(sharded / index["weight_map"][weight], sharded.parent / "outside.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"no weights")
    index["weight_map"][weight] = name
    (sharded / INDEX).write_text(json.dumps(index))
    for reader in ("torch.load", "safetensors.torch.load_file", "earlyexit_kernels.hf.weight_files.safe_open"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=weight) as caught:
        load(sharded)
    assert repr(name) in str(caught.value) and str(sharded / INDEX) in str(caught.value)


NO_INDEX = ["", "[]", "{}", '{"weight_map": 3, "metadata": {}}', '{"weight_map": {}}']


def test_damaged_shards_are_named(sharded):
    whole = (sharded / INDEX).read_text()
    for text in NO_INDEX:
        assert_refused(sharded, INDEX, lambda folder, text=text: (folder / INDEX).write_text(text))
    (sharded / INDEX).write_text(whole)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    assert_refused(sharded, shard.name, lambda _: shard.write_bytes(data[:-1000]), RuntimeError)
    assert_refused(sharded, shard.name, lambda _: shard.unlink(), OSError)


FRESH = """
    import json, socket, sys
    from pathlib import Path

    import torch
    import transformers as tf

    def refused(*args, **kwargs):
        raise AssertionError("the network was used")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
    torch.set_num_threads(1)
    root, report = Path(sys.argv[1]), {}
    try:
        tf.AutoConfig.from_pretrained(root / "bert-float32")
    except ValueError as error:
        report["unknown"] = str(error)
    import earlyexit_kernels

    for file in root.glob("*-*.pt"):
        expected = torch.load(file)
        model = tf.AutoModelForSequenceClassification.from_pretrained(file.with_suffix(""))
        out = model(**expected["batch"], output_all_logits=True)
        same = [torch.equal(out[name], expected[name]) for name in ("logits", "all_logits", "exit_layer")]
        report[file.stem] = [all(same), str(model.dtype), repr(model.criterion)]
    print(json.dumps(report))
"""


@pytest.mark.thorough
def test_fresh_process_without_network(tmp_path):
    """A new process gives equal answers, once it has imported the package."""
    expected = {}
    saves = [(family, torch.float32) for family in ALL_FAMILIES] + [("bert", torch.bfloat16), ("roberta", torch.half)]
    for family, dtype in saves:
        model = early_exit(family, criterion=Entropy(threshold=[0.8, 0.8, 0.9])).to(dtype)
        name = f"{family}-{str(dtype).removeprefix('torch.')}"
        model.save_pretrained(tmp_path / name)
        batch = batch_for(model, holes_of(family))
        torch.save({"batch": batch, **model(**batch, output_all_logits=True)}, tmp_path / f"{name}.pt")
        expected[name] = [True, str(dtype), repr(model.criterion)]
    report = json.loads(run_python(textwrap.dedent(FRESH), str(tmp_path)).splitlines()[-1])
    assert "early-exit" in report.pop("unknown") and report == expected
