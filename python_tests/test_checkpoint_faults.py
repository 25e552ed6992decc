"""Checkpoints that are damaged, foreign or hostile: an error names what is wrong, and no exit is ever random."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from models import LOADERS, early_exit, ragged, stock
from safetensors.torch import load_file, save_file

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy

WEIGHTS = "model.safetensors"


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


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "name", ["heads.out.1.weight", "heads.dense.0.bias", "backbone.encoder.layer.0.output.dense.bias"]
)
def test_missing_weight_is_named(saved, load, name):
    change_weights(saved, lambda state: state.pop(name))
    with pytest.raises(ee.MissingHeadsError, match="allow_new_heads=True") as caught:
        load(saved)
    assert name in str(caught.value) and str(saved) in str(caught.value)
    with pytest.raises(ee.MissingHeadsError, match=name):
        load(pretrained_model_name_or_path=saved)


def test_missing_exits_may_be_allowed(saved, load):
    expected = load(saved)(**ragged(), output_all_logits=True).all_logits
    change_weights(saved, lambda state: [state.pop(f"heads.out.1.{part}") for part in ("weight", "bias")])
    model, info = load(saved, allow_new_heads=True, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["heads.out.1.bias", "heads.out.1.weight"]
    got = model(**ragged(), output_all_logits=True).all_logits
    assert torch.equal(got[:, [0, 2, 3]], expected[:, [0, 2, 3]]) and not torch.equal(got[:, 1], expected[:, 1])


def test_wrong_shape_is_refused(saved, load):
    change_weights(saved, lambda state: state.update({"heads.out.1.weight": torch.zeros(5, 64)}))
    with pytest.raises(RuntimeError):
        load(saved)
    with pytest.raises(RuntimeError, match=r"heads\.out\.1\.weight"):
        load(saved, ignore_mismatched_sizes=True)


def test_weight_without_a_place_is_refused(saved, load):
    """The file says the heads have a dense module, the config says they haven't: one of the two is another model's."""
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
        ({"criterion": {"name": "q_exit", "q": 0.5}}, "needs heads with a 'halting' output"),
        ({"method": "hunch"}, "method: expected one of .*got 'hunch'"),
        ({"heads": {"pooling": "max"}}, "pooling: expected one of .*got 'max'"),
    ],
)
def test_config_that_means_nothing_is_refused(saved, load, values, message):
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_is_refused(saved, load, attention):
    with pytest.raises(ValueError, match="attn_implementation can't be chosen"):
        load(saved, attn_implementation=attention)


def test_stock_checkpoint_is_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="to_early_exit"):
        ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


class Bomb:
    """Runs code where it is unpickled."""

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
    assert target.exists(), "the bomb works"
    target.unlink()
    (saved / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        load(saved, **arguments)
    assert not target.exists()
