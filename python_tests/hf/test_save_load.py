"""Saving and loading, criterion included, in the same process and in another one."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
from support.models import (
    ALL_FAMILIES,
    DEPTH,
    LOADERS,
    batch_for,
    early_exit,
    encoder_of,
    holes_of,
    ragged,
    run_python,
    stock,
)

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, Margin, MaxProbability, Patience, QExit

WEIGHTS = "model.safetensors"


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture
def saved(tmp_path) -> Path:
    early_exit(criterion=Entropy(threshold=0.9)).save_pretrained(tmp_path)
    return tmp_path


SETTINGS = {
    "full depth": {"criterion": None},
    "entropy": {"criterion": Entropy(threshold=0.7), "strict": True},
    "entropy list": {"criterion": Entropy(threshold=[0.1, 0.7, 1.0]), "pooling": "mean"},
    "normalized entropy": {"criterion": Entropy(threshold=[0.1, 0.7, 1.0], normalized=True), "pooling": "first"},
    "max probability": {"criterion": MaxProbability(threshold=0.7), "method": "pabee"},
    "max probability list": {"criterion": MaxProbability(threshold=[0.9, 0.8, 0.7])},
    "margin": {"criterion": Margin(threshold=0.25)},
    "margin list": {"criterion": Margin(threshold=[0.3, 0.2, 0.1])},
    "patience": {"criterion": Patience(patience=2)},
    "patience, regression": {"criterion": Patience(patience=1, tolerance=0.1), "num_labels": 1},
    "q exit": {"criterion": QExit(q=0.6), "halting": True},
    "q exit, several labels": {
        "criterion": QExit(q=0.6),
        "halting": True,
        "pooling": "mean",
        "problem_type": "multi_label_classification",
    },
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("setting", SETTINGS)
def test_round_trip(tmp_path, load, setting):
    model = early_exit(**SETTINGS[setting])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not again.training
    assert again.criterion == model.criterion == SETTINGS[setting]["criterion"]
    assert again.config.problem_type == model.config.problem_type
    assert again.config.strict == model.config.strict and again.config.method == model.config.method
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    batch = batch_for(model)
    old, new = model(**batch, output_all_logits=True), again(**batch, output_all_logits=True)
    assert torch.equal(old.all_logits, new.all_logits)
    assert torch.equal(old.logits, new.logits) and torch.equal(old.exit_layer, new.exit_layer)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(tmp_path, load, dtype):
    model = early_exit(criterion=Entropy(threshold=0.9)).to(dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype and {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(again(**ragged()).logits, model(**ragged()).logits)


def test_dtype_argument(saved, load):
    again = load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    expected = load(saved)(**ragged(), output_all_logits=True).all_logits
    got = again(**ragged(), output_all_logits=True).all_logits
    assert (got.float() - expected).abs().max() < 0.15


def test_config_of_a_model_is_accepted(saved, load):
    model = load(saved)
    again = load(saved, config=model.config)
    assert torch.equal(again(**ragged()).logits, model(**ragged()).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_labels": 5},
        {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}},
        {"num_labels": 5, "allow_new_heads": True},
        {"num_labels": 5, "ignore_mismatched_sizes": True},
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_another_number_of_labels_than_the_checkpoint_has_is_refused(saved, load, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: .* asks for 5 label.*, the .* has 3") as caught:
        load(saved, **arguments)
    assert "to_early_exit" in str(caught.value) and "config.json" not in str(caught.value)


def test_the_number_of_labels_of_the_checkpoint_is_accepted(saved, load):
    assert load(saved, num_labels=3).config.num_labels == 3
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    assert load(saved, **names).config.id2label == names["id2label"]
    early_exit(num_labels=2).save_pretrained(saved / "default")  # transformers leaves the default names out of the file
    with pytest.raises(ValueError, match=r"num_labels: .* asks for 3 label.*, the .* has 2"):
        load(saved / "default", num_labels=3)


def test_shards(tmp_path, load):
    model = early_exit()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(tmp_path)(**ragged()).logits, model(**ragged()).logits)
    shards[1].write_bytes(shards[1].read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match=shards[1].name):
        load(tmp_path)


FRESH = """
    import json, socket, sys
    from pathlib import Path

    import torch
    import transformers as tf

    def refused(*args, **kwargs):
        raise AssertionError("the network was used")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    backbone = tf.AutoModel.from_pretrained(root / "backbone").eval()
    batch = torch.load(root / "bert-float32.pt")["batch"]
    hidden = backbone(**batch).last_hidden_state
    try:
        tf.AutoConfig.from_pretrained(root / "bert-float32")
    except ValueError as error:
        unknown = str(error)
    assert "earlyexit_kernels" not in sys.modules

    import earlyexit_kernels as ee

    report = {"unknown": unknown, "backbone": type(backbone).__name__}
    torch.save(hidden, root / "hidden.pt")
    for file in root.glob("*-*.pt"):
        expected = torch.load(file)
        model = tf.AutoModelForSequenceClassification.from_pretrained(file.with_suffix(""))
        out = model(**expected["batch"], output_all_logits=True)
        same = [torch.equal(out[name], expected[name]) for name in ("logits", "all_logits", "exit_layer")]
        report[file.stem] = [all(same), str(model.dtype), repr(model.criterion)]
    ee.to_early_exit(tf.BertForSequenceClassification(backbone.config).eval())(**batch)
    print(json.dumps(report))
"""


@pytest.mark.thorough
def test_fresh_process_without_network(tmp_path):
    """A new process gives equal answers, and loads the encoder without importing the package."""
    expected = {}
    for dtype, families in (
        (torch.float32, ALL_FAMILIES),
        (torch.float16, ALL_FAMILIES[:3]),
        (torch.bfloat16, ALL_FAMILIES[:1]),
    ):
        for family in families:
            model = early_exit(family, criterion=Entropy(threshold=[0.8, 0.8, 0.9])).to(dtype)
            name = f"{family}-{str(dtype).removeprefix('torch.')}"
            model.save_pretrained(tmp_path / name)
            batch = batch_for(model, holes_of(family))
            out = model(**batch, output_all_logits=True)
            torch.save({"batch": batch, **out}, tmp_path / f"{name}.pt")
            expected[name] = [True, str(dtype), repr(model.criterion)]
    base = stock()
    batch = torch.load(tmp_path / "bert-float32.pt")["batch"]
    ee.to_early_exit(base).backbone.save_pretrained(tmp_path / "backbone")
    report = json.loads(run_python(textwrap.dedent(FRESH), str(tmp_path)).splitlines()[-1])
    assert "early-exit" in report.pop("unknown") and report.pop("backbone") == "BertModel"
    assert report == expected
    hidden = torch.load(tmp_path / "hidden.pt")
    assert torch.equal(hidden, encoder_of(base)(**batch).last_hidden_state)


def test_save_after_a_change_of_criterion(tmp_path, load):
    model = early_exit()
    for criterion in (Patience(patience=1), Entropy(threshold=0.4), None):
        model.set_criterion(criterion)
        model.save_pretrained(tmp_path)
        assert load(tmp_path).criterion == criterion
    assert model.depth == DEPTH
