"""Changed words in sentences, drawn with a seed: typing errors, and words of the same meaning."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from earlyexit_kernels.data.rows import Split, Text

T = TypeVar("T")

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
#: Letter -> the letters beside it in its row of an English keyboard.
NEIGHBOURS = {letter: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in _KEYBOARD for i, letter in enumerate(row)}


def typos(split: Split, share: float, *, seed: int = 0) -> Split:
    """Put one typing error into a share of the words.

    Every word with a letter is changed with probability `share`; of the errors of `TYPOS` that can change it, each is
    equally likely. Drawn with `random.Random(seed).random()`, whose sequence is stable across Python versions.

    Args:
        split: N texts or pairs; labels stay.
        share: in [0, 1].
        seed: of the draws.

    Returns:
        The noisy split, with words separated by single spaces.
    """
    draw = random.Random(seed).random

    def words(found: Sequence[str]) -> list[str]:
        return [_mistyped(w, draw) if any(c.isalpha() for c in w) and draw() < share else w for w in found]

    return _changed(split, words)


def _swapped(word: str) -> list[str]:
    """Two different neighbouring characters are swapped."""
    pairs = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in pairs]


def _dropped(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i in range(len(word))] if len(word) > 1 else []


def _repeated(word: str) -> list[str]:
    return [word[: i + 1] + word[i:] for i in range(len(word))]


def _missed(word: str) -> list[str]:
    """A letter becomes its neighbour on the keyboard, in the same case."""
    found = []
    for i, letter in enumerate(word):
        for other in NEIGHBOURS.get(letter.lower(), ""):
            found.append(word[:i] + (other.upper() if letter.isupper() else other) + word[i + 1 :])
    return found


#: Typing error -> every word that it can make of a word.
TYPOS: dict[str, Callable[[str], list[str]]] = {
    "swap": _swapped,
    "drop": _dropped,
    "repeat": _repeated,
    "neighbour": _missed,
}


#: Groups of words that stand for each other in sentences about films, with the same sentiment.
SYNONYMS = (
    *(("film", "movie", "picture"), ("films", "movies", "pictures"), ("story", "tale"), ("actor", "performer")),
    *(("actors", "performers"), ("viewer", "spectator"), ("viewers", "spectators", "audiences"), ("plot", "storyline")),
    *(("funny", "amusing"), ("dull", "boring", "tedious"), ("awful", "terrible", "dreadful"), ("smart", "clever")),
    *(("great", "terrific"), ("excellent", "superb"), ("beautiful", "lovely"), ("touching", "moving"), ("bad", "poor")),
    *(("fascinating", "intriguing"), ("silly", "foolish"), ("sad", "sorrowful"), ("charming", "delightful")),
    *(("strange", "odd"), ("big", "large"), ("small", "little"), ("fast", "quick"), ("entire", "whole")),
    *(("almost", "nearly"), ("perhaps", "maybe"), ("often", "frequently"), ("too", "overly"), ("although", "though")),
    *(("begins", "starts"), ("ends", "finishes"), ("seems", "appears")),
    *(("director", "filmmaker"), ("kids", "children"), ("people", "folks"), ("watch", "view")),
    *(("really", "truly"), ("completely", "totally", "entirely"), ("extremely", "exceedingly"), ("simply", "merely")),
)
SAME_MEANING = {word: tuple(w for w in group if w != word) for group in SYNONYMS for word in group}


def swaps(split: Split, share: float, *, seed: int = 0) -> Split:
    """Put a word of the same meaning in the place of a share of the words of `SYNONYMS`; see `typos`."""
    draw = random.Random(seed).random

    def words(found: Sequence[str]) -> list[str]:
        return [_pick(SAME_MEANING[w], draw) if w in SAME_MEANING and draw() < share else w for w in found]

    return _changed(split, words)


def _mistyped(word: str, draw: Callable[[], float]) -> str:
    return _pick(_pick([made for make in TYPOS.values() if (made := make(word))], draw), draw)


def _pick(options: Sequence[T], draw: Callable[[], float]) -> T:
    return options[int(draw() * len(options))]


def _changed(split: Split, change: Callable[[Sequence[str]], list[str]]) -> Split:
    """Apply `change` to the words of every text; a text without words stays."""

    def one(text: str) -> str:
        found = text.split()
        return " ".join(change(found)) if found else text

    texts: list[Text] = [one(t) if isinstance(t, str) else (one(t[0]), one(t[1])) for t in split.texts]
    return replace(split, texts=texts)
