"""Typing errors that the evidence puts into text."""

from benchmarks.evidence.noise import TYPOS, typos
from earlyexit_kernels.data.rows import Split

TEXT = "the plot of the film was really brilliant , but the cast was dull ."
MANY = Split([TEXT] * 200, [1] * 200)


def test_typos_are_seeded_and_keep_labels_pairs_and_empty_texts():
    assert typos(MANY, 0.3, seed=1) == typos(MANY, 0.3, seed=1) != typos(MANY, 0.3, seed=2)
    assert typos(MANY, 0.0) == MANY and typos(MANY, 0.5).labels == MANY.labels
    noisy = typos(Split([(TEXT, "a b"), ("", " ")], [0, 1]), 0.5)
    assert noisy.labels == [0, 1] and noisy.texts[1] == ("", " ")


def test_typos_change_the_share_of_words_with_letters_by_one_error_each():
    pairs = [pair for text in typos(MANY, 0.25).texts for pair in zip(TEXT.split(), text.split(), strict=True)]
    hit = [old != new for old, new in pairs if old not in ",."]
    assert abs(sum(hit) / len(hit) - 0.25) < 0.03
    for old, new in pairs:
        assert old == new or (old not in ",." and new in {made for typo in TYPOS.values() for made in typo(old)})


def test_errors_by_hand():
    assert TYPOS["swap"]("aab") == ["aba"]
    assert TYPOS["drop"]("ab") == ["b", "a"] and TYPOS["drop"]("a") == []
    assert TYPOS["repeat"]("ab") == ["aab", "abb"]
    assert TYPOS["neighbour"]("Q1p") == ["W1p", "Q1o"]
