"""Noise on text: typing errors and missing words."""

import pytest

from benchmarks.accuracy.noise import NEIGHBOURS, NOISES, TYPOS, drop_words, typos
from earlyexit_kernels.tasks.sources import Split

TEXT = "the plot of the film was really brilliant , but the cast was dull ."
MANY = Split([TEXT] * 200, [1] * 200, [3] * 200)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
class TestEveryNoise:
    def test_seed_determines_the_text(self, noise):
        assert noise(MANY, 0.3, seed=1) == noise(MANY, 0.3, seed=1) != noise(MANY, 0.3, seed=2)

    def test_labels_levels_and_pairs_are_kept(self, noise):
        pairs = Split([(TEXT, "a b"), ("one", "two")], [0, 1])
        noisy = noise(pairs, 0.5)
        assert noisy.labels == [0, 1] and [len(pair) for pair in noisy.sentences] == [2, 2]
        assert noise(MANY, 0.5).levels == MANY.levels

    def test_share_zero_changes_nothing(self, noise):
        assert noise(MANY, 0.0) == MANY

    def test_texts_without_words_are_kept(self, noise):
        assert noise(Split(["", " "], [0, 1]), 1.0).sentences == ["", " "]

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_share_out_of_range_is_refused(self, noise, share):
        with pytest.raises(ValueError, match="share"):
            noise(MANY, share)


def test_typos_change_the_share_of_words_with_letters():
    before, after = TEXT.split(), [text.split() for text in typos(MANY, 0.25).sentences]
    assert all(len(words) == len(before) for words in after)
    hit = [a != b for words in after for a, b in zip(words, before, strict=True) if b not in ",."]
    assert abs(sum(hit) / len(hit) - 0.25) < 0.03
    assert all(words[8] == "," and words[-1] == "." for words in after)


def test_every_changed_word_has_one_known_error():
    for words in (text.split() for text in typos(MANY, 1.0).sentences):
        for old, new in zip(TEXT.split(), words, strict=True):
            assert old in ",." or new in {made for typo in TYPOS.values() for made in typo(old)} - {old}


def test_errors_by_hand():
    assert TYPOS["swap"]("aab") == ["aba"]
    assert TYPOS["drop"]("ab") == ["b", "a"] and TYPOS["drop"]("a") == []
    assert TYPOS["repeat"]("ab") == ["aab", "abb"]
    assert TYPOS["neighbour"]("Q1p") == ["W1p", "Q1o"]
    assert NEIGHBOURS["s"] == "ad" and all(a in NEIGHBOURS[b] for a, found in NEIGHBOURS.items() for b in found)


def test_word_drop_keeps_the_order_and_one_word():
    kept = [text.split() for text in drop_words(MANY, 0.4).sentences]
    words = TEXT.split()
    for found in kept:
        rest = iter(words)
        assert all(word in rest for word in found)
    share = 1 - sum(map(len, kept)) / (len(words) * len(kept))
    assert abs(share - 0.4) < 0.03
    lone = drop_words(MANY, 1.0).sentences
    assert all(len(text.split()) == 1 for text in lone) and len(set(lone)) > 5
