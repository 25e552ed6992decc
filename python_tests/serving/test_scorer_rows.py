"""Rows that `Scorer` cannot classify, and calls, models and tokenizers that it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import stock, tokenizer
from support.text_models import model_and_tokenizer, texts
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import earlyexit_kernels as ee

ROWS = texts(6)
LONG = "the film " * 40


@pytest.fixture(scope="module")
def varied():
    """A model that takes 70 tokens at most, and its tokenizer, which sets no limit."""
    return model_and_tokenizer(texts())


#: Bad row -> what the error says.
BAD = {
    None: "expected a text, got None",
    7: "expected a text, got 7",
    b"bytes": "expected a text, got b'bytes'",
    "": "expected some text, got an empty one",
    " \n\t": "expected some text, got an empty one",
    "a \ud800": r"expected Unicode text, got half a character, '\ud800', at position 2",
    LONG: "expected at most 70 tokens, got 82; shorten it, or pass truncate=True",
    ("a", "b"): "expected a text, as in row 0, got a pair of texts",
    ("a", None): "expected a text, got None",
    ("a", "b", "c"): "expected a text or a pair of texts, got 3 of them",
    ("a",): "expected a text or a pair of texts, got 1 of them",
    (): "expected a text or a pair of texts, got 0 of them",
    ("", " "): "expected some text, got an empty one",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:12])
def test_a_bad_row_is_named_and_raised_before_anything_runs(varied, bad, monkeypatch):
    monkeypatch.setattr(type(varied[0]), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError) as error:
        ee.Scorer(*varied)([*ROWS, bad])
    assert str(error.value) == f"Scorer: row 6: {BAD[bad]}"


def test_bad_rows_are_reported_and_the_others_answered(varied):
    expected = ee.Scorer(*varied)(ROWS)
    found = ee.Scorer(*varied, bad_rows="report", scores=True)([ROWS[0], *BAD, *ROWS[1:]])
    places = [0, *range(len(BAD) + 1, len(BAD) + 6)]
    for name, values in expected.items():
        if name != "score":
            assert [found[name][place] for place in places] == values
    assert found["error"][1 : len(BAD) + 1] == list(BAD.values())
    for row in range(1, len(BAD) + 1):
        assert (found["label"][row], found["exit_layer"][row]) == ("", 0)
        assert math.isnan(found["score"][row]) and all(map(math.isnan, found["scores"][row]))


def test_bad_rows_alone(varied):
    found = ee.Scorer(*varied, bad_rows="report")([None, ""])
    assert found["error"] == ["expected a text, got None", "expected some text, got an empty one"]
    with pytest.raises(ValueError, match=r"row 0: expected a text, got None \(1 other row\(s\) cannot"):
        ee.Scorer(*varied)([None, ""])


def test_a_text_among_pairs(varied):
    found = ee.Scorer(*varied, bad_rows="report")([("a", ""), "a", ("", "b")])
    assert found["error"] == ["", "expected a pair of texts, as in row 0, got a text", ""]


def test_rows_that_are_cut(varied):
    model, words = varied
    for rows in ([LONG, "a film"], [(LONG, "a film"), ("a", LONG)]):
        found = ee.Scorer(model, words, truncate=True, max_length=20)(rows)
        columns = [rows] if isinstance(rows[0], str) else [list(column) for column in zip(*rows, strict=True)]
        batch = words(*columns, truncation=True, max_length=20, padding=True, return_tensors="pt")
        assert found["exit_layer"] == model(**batch).exit_layer.tolist()
    assert ee.Scorer(model, words, truncate=True)([LONG])["error"] == [""]


def test_the_limit_of_the_tokenizer_and_of_the_call(varied):
    model, _ = varied
    short = tokenizer()
    short.model_max_length = 10
    for scorer in (ee.Scorer(model, short), ee.Scorer(model, tokenizer(), max_length=10)):
        with pytest.raises(ValueError, match="row 0: expected at most 10 tokens, got 11"):
            scorer(["the film was not good it was great a"])
    assert ee.Scorer(model, short, max_length=70)(["film " * 68])["error"] == [""]
    with pytest.raises(ValueError, match="expected max_length of at most 70 for this model, got 71"):
        ee.Scorer(model, short, max_length=71)
    with pytest.raises(ValueError, match="expected max_length of at least 3 for this tokenizer, got 2"):
        ee.Scorer(model, short, max_length=2, truncate=True)(["a film"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a film", "expected texts to be a list, got str; pass a list with one text"),
        (None, "expected texts to be a list, got NoneType"),
        (7, "expected texts to be a list, got int"),
        ({"a film", "a play"}, "expected texts to be a list, got set"),
        ({}, r"expected a column 'text', and 'text_pair' for pairs, got \[\]"),
        ({"sentence": ["a"]}, r"expected a column 'text', and 'text_pair' for pairs, got \['sentence'\]; rename"),
        ({"text": "a film"}, "expected text to be a list, got str"),
        ({"text": ["a"], "text_pair": None}, "expected text_pair to be a list, got NoneType"),
        ({"text": ["a"], "text_pair": ["a", "b"]}, "expected columns of one length, got 1 and 2 rows"),
        ({"text": ["a"], "label": [1]}, "got a column 'label', which the answers would replace; rename it"),
    ],
)
def test_a_wrong_call_is_refused(varied, given, words):
    with pytest.raises(ValueError, match=words):
        ee.Scorer(*varied, bad_rows="report")(given)


def test_a_frame_is_refused(varied):
    """The iterator of a frame yields the names of its columns."""
    pandas = pytest.importorskip("pandas", reason="datasets, from the extra 'train', brings pandas")
    frame = pandas.DataFrame({"text": ROWS})
    with pytest.raises(ValueError, match=r"got DataFrame; pass its columns, frame.to_dict\('list'\)"):
        ee.Scorer(*varied)(frame)
    answers = ee.Scorer(*varied)(ROWS)
    assert ee.Scorer(*varied)(frame.to_dict("list")) == {"text": ROWS, **answers}
    assert ee.Scorer(*varied)(frame["text"]) == answers


def fast_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (None, TypeError, "expected the tokenizer of the model, got NoneType"),
        (str.split, TypeError, "expected the tokenizer of the model, got method_descriptor"),
        (fast_tokenizer(["[PAD]", "[UNK]"]), ValueError, "the tokenizer knows no words"),
        (
            fast_tokenizer(["[PAD]", "[UNK]", *map(str, range(50))]),
            ValueError,
            "has embeddings of 18 tokens, got one of another vocabulary, with token ids up to 51",
        ),
    ],
)
def test_another_tokenizer_is_refused(varied, words, error, message):
    with pytest.raises(error, match=message):
        ee.Scorer(varied[0], words)


def test_a_text_without_tokens(varied):
    words = fast_tokenizer(["[PAD]", "[UNK]", "a"])  # adds no special tokens
    words.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    found = ee.Scorer(varied[0], words, bad_rows="report")(["x", "a"])
    assert found["error"] == ["expected some text, got one without tokens", ""]


def test_a_model_without_exits_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected an early-exit model, or the folder or hub name of one, got Bert"):
        ee.Scorer(stock(), tokenizer())
    with pytest.raises(TypeError, match="got NoneType"):
        ee.Scorer(None, tokenizer())
    stock(vocab_size=18).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="got BertForSequenceClassification"):
        ee.Scorer(tmp_path)


def test_a_folder_without_a_model_or_a_tokenizer_is_refused(varied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the folder or hub name of a saved model, .* no config.json"):
        ee.Scorer(tmp_path)
    varied[0].save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the tokenizer of .* cannot be loaded .*save the model's own tokenizer there"
    ):
        ee.Scorer(tmp_path)
    with pytest.raises(OSError, match="expected the folder or hub name of a saved model, no where cannot be found"):
        ee.Scorer("no where")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder, and neither the hub"):
        ee.Scorer("nowhere")
    assert ee.Scorer(tmp_path, varied[1])(ROWS)["exit_layer"] == ee.Scorer(*varied)(ROWS)["exit_layer"]


def test_a_wrapped_model(varied):
    wrapped = torch.nn.Sequential(varied[0])
    assert ee.Scorer(wrapped, varied[1])(ROWS) == ee.Scorer(*varied)(ROWS)


def test_the_tokenizer_is_unchanged(varied, tmp_path):
    """Truncation and padding are settings of a fast tokenizer that outlive a call."""
    words = tokenizer()
    ee.Scorer(varied[0], words, truncate=True, max_length=12)(ROWS)
    words.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)(LONG)["input_ids"]) == len(words(LONG)["input_ids"]) == 82
