"""Noise on text: typing errors and missing words."""

import pytest

from benchmarks.accuracy.noise import NOISES, TYPOS, drop_words, typos
from earlyexit_kernels.tasks.sources import Split

TEXT = "the plot of the film was really brilliant , but the cast was dull ."
MANY = Split([TEXT] * 200, [1] * 200, [3] * 200)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_noise_is_seeded_and_keeps_labels_pairs_and_empty_texts(noise):
    assert noise(MANY, 0.3, seed=1) == noise(MANY, 0.3, seed=1) != noise(MANY, 0.3, seed=2)
    assert noise(MANY, 0.0) == MANY and noise(MANY, 0.5).levels == MANY.levels
    noisy = noise(Split([(TEXT, "a b"), ("", " ")], [0, 1]), 0.5)
    assert noisy.labels == [0, 1] and noisy.sentences[1] == ("", " ")


def test_typos_change_the_share_of_words_with_letters_by_one_error_each():
    pairs = [pair for text in typos(MANY, 0.25).sentences for pair in zip(TEXT.split(), text.split(), strict=True)]
    hit = [old != new for old, new in pairs if old not in ",."]
    assert abs(sum(hit) / len(hit) - 0.25) < 0.03
    for old, new in pairs:
        assert old == new or (old not in ",." and new in {made for typo in TYPOS.values() for made in typo(old)})


def test_errors_by_hand():
    assert TYPOS["swap"]("aab") == ["aba"]
    assert TYPOS["drop"]("ab") == ["b", "a"] and TYPOS["drop"]("a") == []
    assert TYPOS["repeat"]("ab") == ["aab", "abb"]
    assert TYPOS["neighbour"]("Q1p") == ["W1p", "Q1o"]


def test_word_drop_keeps_the_order_and_one_word():
    kept, words = [text.split() for text in drop_words(MANY, 0.4).sentences], TEXT.split()
    for found in kept:
        rest = iter(words)
        assert all(word in rest for word in found)
    assert abs(1 - sum(map(len, kept)) / (len(words) * len(kept)) - 0.4) < 0.03
    assert all(len(text.split()) == 1 for text in drop_words(MANY, 1.0).sentences)
