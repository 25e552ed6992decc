"""Copies of a `Scorer`, as other processes get them, and its use as a function of `datasets`."""

from __future__ import annotations

import copy
import pickle

import pytest
from support.models import run_python
from support.text_models import model_and_tokenizer, texts

import earlyexit_kernels as ee

ROWS = texts()


@pytest.fixture
def saved(tmp_path):
    """A model, its tokenizer, and the folder they are saved in."""
    model, words = model_and_tokenizer(ROWS)
    ee.calibrate(model, [words(text) for text in texts(60)], target=ee.SpeedUp(1.5))
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return model, words, tmp_path / "model"


def test_a_copy_of_one_made_from_a_folder_holds_its_path(saved):
    scorer = ee.Scorer(saved[2], max_tokens=77, scores=True, truncate=True, drift_window=50)
    data = pickle.dumps(scorer)
    assert len(data) < 2000
    twin = pickle.loads(data)
    assert twin(ROWS) == scorer(ROWS) == ee.Scorer(*saved[:2], max_tokens=77, scores=True)(ROWS)
    assert twin.options == scorer.options and twin.model is not scorer.model
    assert (twin.drift.window, twin.drift.rows, pickle.loads(pickle.dumps(twin))(ROWS)) == (50, 40, scorer(ROWS))


def test_a_relative_path_and_a_tokenizer_are_kept(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(ee.Scorer("model", saved[1]))
    for path in saved[2].glob("token*"):
        path.unlink()
    monkeypatch.chdir("/")
    assert pickle.loads(data)(ROWS) == ee.Scorer(*saved[:2])(ROWS)


@pytest.mark.parametrize("criterion", [None, ee.criteria.MaxProbability(threshold=0.2)])
def test_a_copy_has_the_current_criterion(saved, criterion):
    scorer = ee.Scorer(saved[2])
    scorer.model.set_criterion(criterion)
    twin = pickle.loads(pickle.dumps(scorer))
    assert twin.model.criterion == criterion and twin(ROWS) == scorer(ROWS) != ee.Scorer(saved[2])(ROWS)


def test_a_copy_of_a_folder_that_was_saved_again_is_refused(saved):
    scorer = ee.Scorer(saved[2])
    data = pickle.dumps(scorer)
    saved[0].heads.out[0].weight.data.add_(1)
    saved[0].save_pretrained(saved[2])
    with pytest.raises(RuntimeError, match="has been saved again since this scorer was made"):
        pickle.loads(data)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_a_copy_of_one_made_from_a_model_holds_the_model(saved, copied):
    model, words, _ = saved
    scorer = ee.Scorer(model, words, bad_rows="report")
    twin = copied(scorer)
    assert twin.model is not model and twin.options == scorer.options
    assert twin(["", *ROWS])["exit_layer"] == scorer(["", *ROWS])["exit_layer"]


@pytest.mark.thorough
def test_a_new_process_gives_the_same_answers(saved, tmp_path):
    scorer = ee.Scorer(saved[2])
    (tmp_path / "scorer").write_bytes(pickle.dumps(scorer))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))(eval(sys.argv[2]))['exit_layer'])"
    printed = run_python(code, str(tmp_path / "scorer"), repr(ROWS))
    assert printed.splitlines()[-1] == str(scorer(ROWS)["exit_layer"])


def test_datasets_map(saved):
    datasets = pytest.importorskip("datasets", reason="requires the extra 'train'")
    scorer = ee.Scorer(saved[2])
    rows = datasets.Dataset.from_dict({"text": ROWS, "truth": [0] * len(ROWS)})
    expected = scorer(ROWS)
    for found in (
        rows.map(scorer, batched=True, batch_size=7),
        rows.rename_column("text", "review").map(scorer, batched=True, batch_size=16, input_columns="review"),
    ):
        assert found.column_names[1:] == ["truth", "label", "score", "exit_layer", "error"]
        for name, values in expected.items():
            assert found[name][:] == (pytest.approx(values, abs=1e-6) if name == "score" else values)


def test_datasets_map_over_a_first_batch_without_an_answer(saved):
    """The type of a column is that of its first batch."""
    datasets = pytest.importorskip("datasets", reason="requires the extra 'train'")
    rows = datasets.Dataset.from_dict({"text": ["", *ROWS]})
    found = rows.map(ee.Scorer(saved[2], bad_rows="report", scores=True), batched=True, batch_size=1)
    assert found["error"][:2] == ["expected some text, got an empty one", ""]
    assert found["exit_layer"][1:] == ee.Scorer(saved[2])(ROWS)["exit_layer"]


def test_datasets_does_not_take_answers_of_other_weights_from_its_cache(saved):
    """The cache of `datasets` is keyed by the pickle of the function."""
    fingerprint = pytest.importorskip("datasets.fingerprint", reason="requires the extra 'train'")
    first, again = (fingerprint.Hasher.hash(ee.Scorer(saved[2])) for _ in range(2))
    saved[0].heads.out[0].weight.data.add_(1)
    saved[0].save_pretrained(saved[2])
    assert first == again != fingerprint.Hasher.hash(ee.Scorer(saved[2]))
