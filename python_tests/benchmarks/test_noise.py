"""Words that the evidence changes in text."""

from benchmarks.evidence.noise import SAME_MEANING, TYPOS, swaps, typos
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


def test_swaps_put_words_of_the_same_meaning():
    assert swaps(MANY, 1.0, seed=1) == swaps(MANY, 1.0, seed=1) != swaps(MANY, 1.0, seed=2)
    assert swaps(MANY, 0.0) == MANY and swaps(MANY, 0.5).labels == MANY.labels
    pairs = [pair for text in swaps(MANY, 1.0).texts for pair in zip(TEXT.split(), text.split(), strict=True)]
    changed = {old for old, new in pairs if old != new}
    assert changed == {"film", "plot", "really", "dull"}
    assert all(new in SAME_MEANING[old] for old, new in pairs if old != new)
    assert all(word in SAME_MEANING[other] for word, others in SAME_MEANING.items() for other in others)
