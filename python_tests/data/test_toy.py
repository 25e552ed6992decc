"""The generated task: labels, levels of difficulty, curriculum and reproducible draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from earlyexit_kernels.data import toy

POLARITY = {word: label for label, words in toy.WORDS.items() for word in words}


def main_clause(text: str) -> str:
    """Return the main clause, found from the connective."""
    text = text.removesuffix(" .")
    if text.startswith("although "):
        return text.split(" , ", 1)[1]
    for connective, side in ((" , but ", 1), (" ; still , ", 1), (" , although ", 0), (" , even if ", 0)):
        if connective in text:
            return text.split(connective)[side]
    return text


def meaning(clause: str) -> int:
    """Return the polarity of the clause, inverted by each negation and by a denying report."""
    (word,) = [w for w in clause.split() if w in POLARITY]
    flips = sum(f" {phrase} " in f" {clause} " for phrase in (*toy.NEGATIONS, *toy.DENIALS))
    return POLARITY[word] ^ flips % 2


@pytest.fixture(scope="module")
def splits():
    return toy.write_splits(seed=5, train_rows=3000, dev_rows=500, test_rows=500)


def test_labels_follow_from_the_main_clause(splits):
    for sentence in [s for split in splits.values() for s in split]:
        assert meaning(main_clause(sentence.text)) == sentence.label, sentence


def test_levels_have_their_negations_and_reports(splits):
    for s in splits["dev"]:
        clause = f" {s.text} "
        flips = sum(clause.count(f" {phrase} ") for phrase in toy.NEGATIONS)
        reports = sum(clause.count(f" {phrase} ") for phrase in (*toy.DENIALS, *toy.AFFIRMATIONS))
        words = sum(w in POLARITY for w in s.text.split())
        low, high = {1: (0, 0), 2: (1, 1), 3: (0, 0), 4: (1, 2), 5: (0, 1)}[s.level]
        assert low <= flips <= high and reports == (s.level == 5) and words == (1 if s.level <= 2 else 2), s


def test_bag_of_words_solves_level_1_only(splits):
    correct = Counter()
    for s in splits["dev"]:
        votes = [POLARITY[w] for w in s.text.split() if w in POLARITY]
        correct[s.level] += sum(votes) * 2 > len(votes) if s.label else sum(votes) * 2 < len(votes)
    total = Counter(s.level for s in splits["dev"])
    assert correct[1] == total[1] and all(correct[level] < 0.6 * total[level] for level in range(2, 6))


def test_sentences_are_unique_balanced_and_a_curriculum(splits):
    texts = [s.text for split in splits.values() for s in split]
    assert len(set(texts)) == len(texts)
    assert 0.45 < sum(s.label for s in splits["train"]) / 3000 < 0.55
    for level, start in enumerate(toy.LEVEL_STARTS, start=1):
        first = next(i for i, s in enumerate(splits["train"]) if s.level == level)
        assert 0 <= first / 3000 - start < 0.02
    assert {s.level for s in splits["dev"][:100]} == {1, 2, 3, 4, 5}


def test_same_seed_same_sentences(splits):
    assert toy.write_splits(seed=5, train_rows=3000, dev_rows=500, test_rows=500) == splits
    assert toy.write_splits(seed=6, train_rows=0, dev_rows=5, test_rows=0)["dev"] != splits["dev"][:5]


@pytest.mark.parametrize("rows", [-1, 100_001])
def test_invalid_sizes_are_refused(rows):
    with pytest.raises(ValueError, match=r"write_splits: expected rows >= 0 and at most 100000"):
        toy.write_splits(train_rows=rows)


def test_tokenizer_has_every_word_and_reads_plain_text(splits, tmp_path):
    """Also after it was saved and loaded."""
    toy.toy_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.model_max_length == 64 and tokenizer.pad_token_id == 0
    unknown = tokenizer.unk_token_id
    assert all(unknown not in tokenizer(s.text)["input_ids"] for s in splits["test"])
    assert tokenizer("The plot was dull!")["input_ids"][1:-2] == tokenizer("the plot was dull .")["input_ids"][1:-2]
    assert tokenizer.convert_ids_to_tokens(tokenizer("dull")["input_ids"]) == ["[CLS]", "dull", "[SEP]"]


def test_model_is_reproducible_without_global_generator():
    state = torch.random.get_rng_state()
    first, second, other = (toy.toy_model(seed, layers=2, hidden=16) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "bert.encoder.layer.1.output.dense.weight"
    weights = [dict(m.named_parameters())[name] for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.config.vocab_size == len(toy.vocabulary()) and first.config.id2label[1] == "positive"
