"""A generated sentence task of graded difficulty, its tokenizer and its small model: what `earlyexit demo` runs on.

Every sentence is a review in small English; the label says whether its *main* clause is positive (1) or negative (0).
Five levels, each adding something that has to be combined with what was there:

    1 plain      the plot of the film was really brilliant .                          the evaluative word decides
    2 negated    the plot of the film was not brilliant .                             one inverter flips it
    3 contrast   although the plot was dull , the cast was brilliant .                the main clause wins
    4 mixed      the plot was clever , but the cast was hardly brilliant .            ... and clauses may be negated
    5 reported   nobody believes that the cast was never dull , although the ...      ... and a report may deny it all

The concessive clause (after `although`, or before `but`) is a distractor of the opposite label: its words must not
count, and where it stands is known from the connective alone. Within the main clause the label is a parity: the
polarity of its word, flipped by a negation and flipped again by a report that denies it. So a model reads level 1 off
its embeddings, while the others take layers: find the clause, leave the other out, count the flips.

The train split is a curriculum: in their given order its rows start with level 1 and let one level in after the other.
A small model trained from scratch for under a minute learns nothing from a parity that comes too early.

Everything is drawn with `random.Random(seed).random()`, whose sequence Python promises to keep between versions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

T = TypeVar("T")

NEGATIVE, POSITIVE = 0, 1
LABEL_NAMES = ("negative", "positive")
LEVEL_NAMES = ("plain", "negated", "contrast", "mixed", "reported")
#: Relative frequency of the levels 1 to 5.
LEVEL_SHARES = (30, 20, 20, 15, 15)
#: Where in the train split, as a share of it, the levels 1 to 5 come in.
LEVEL_STARTS = (0.0, 0.06, 0.15, 0.28, 0.42)
TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 32_000, 1_500, 1_500

WORDS = {
    POSITIVE: "brilliant charming clever delightful funny gripping lovely moving superb tender touching witty".split(),
    NEGATIVE: "awful boring clumsy dreadful dull feeble gloomy lifeless messy painful tedious weak".split(),
}
ASPECTS = "plot cast script music pace ending dialogue humour acting story camera hero".split()
THINGS = "film book show play novel opera series record".split()
MANNERS = "really quite truly simply rather very utterly frankly".split()
NEGATIONS = ("not", "never", "hardly", "by no means")
AFFIRMATIONS = ("everyone agrees that", "it is clear that", "the critic proved that", "i believe that")
DENIALS = ("nobody believes that", "it is false that", "the critic was wrong that", "i doubt that")
#: Where the concessive clause {c} and the main clause {m} stand.
CONTRASTS = ("{c} , but {m}", "although {c} , {m}", "{m} , although {c}", "{c} ; still , {m}", "{m} , even if {c}")

#: Which of (main, concessive) clause may be negated in sentences of a level that has both; all equally likely.
_NEGATED_CLAUSES = {
    3: ((False, False),),
    4: ((True, False), (False, True), (True, True)),
    5: ((False, False), (False, True), (True, False)),
}

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Sentence:
    """One generated sentence: its text, its label (0 or 1) and its level of difficulty (1 to 5)."""

    text: str
    label: int
    level: int


class _Writer:
    """Draws clauses and sentences from one generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def level(self, highest: int) -> int:
        mark = self._random() * sum(LEVEL_SHARES[:highest])
        return next(level for level in range(1, 6) if mark < sum(LEVEL_SHARES[:level]))

    def clause(self, label: int, *, negated: bool, reported: bool) -> str:
        """A clause that means `label` once its negation and its report are counted."""
        denied = reported and self.chance(0.5)
        subject = f"the {self.pick(ASPECTS)}" + (f" of the {self.pick(THINGS)}" if self.chance(0.4) else "")
        manner = self.pick(NEGATIONS) if negated else self.pick(MANNERS) if self.chance(0.5) else ""
        word = self.pick(WORDS[label ^ negated ^ denied])
        body = " ".join(part for part in (subject, "was", manner, word) if part)
        return f"{self.pick(DENIALS if denied else AFFIRMATIONS)} {body}" if reported else body

    def sentence(self, level: int) -> Sentence:
        label = int(self.chance(0.5))
        if level <= 2:
            return Sentence(f"{self.clause(label, negated=level == 2, reported=False)} .", label, level)
        negated = self.pick(_NEGATED_CLAUSES[level])
        main = self.clause(label, negated=negated[0], reported=level == 5)
        concessive = self.clause(1 - label, negated=negated[1], reported=False)
        return Sentence(f"{self.pick(CONTRASTS).format(m=main, c=concessive)} .", label, level)


def write_splits(
    *, seed: int = 0, train_rows: int = TRAIN_ROWS, dev_rows: int = DEV_ROWS, test_rows: int = TEST_ROWS
) -> dict[str, list[Sentence]]:
    """Write the splits ``"train"``, ``"dev"`` and ``"test"``; no sentence occurs twice.

    Args:
        seed: of everything drawn.
        train_rows: in the order of the curriculum, easy levels first.
        dev_rows, test_rows: all levels mixed.

    Raises:
        ValueError: a negative number of rows, or more than 100,000 together (level 1 knows some 20,000 sentences).
    """
    sizes = {"dev": dev_rows, "test": test_rows, "train": train_rows}
    if min(sizes.values()) < 0 or sum(sizes.values()) > 100_000:
        raise ValueError(f"write_splits: expected rows >= 0 and at most 100000 together, got {sizes}")
    writer = _Writer(seed)
    seen: set[str] = set()
    splits: dict[str, list[Sentence]] = {}
    for name, rows in sizes.items():
        split: list[Sentence] = []
        while len(split) < rows:
            highest = sum(start <= len(split) / rows for start in LEVEL_STARTS) if name == "train" else 5
            sentence = writer.sentence(writer.level(highest))
            if sentence.text not in seen:
                seen.add(sentence.text)
                split.append(sentence)
        splits[name] = split
    return splits


def vocabulary() -> list[str]:
    """Every token of the task, special ones first."""
    phrases = [*NEGATIONS, *AFFIRMATIONS, *DENIALS, *(c.format(m="", c="") for c in CONTRASTS), "the of was ."]
    words = [*WORDS[POSITIVE], *WORDS[NEGATIVE], *ASPECTS, *THINGS, *MANNERS, *" ".join(phrases).split()]
    return [*SPECIAL_TOKENS, *dict.fromkeys(words)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `vocabulary`: lower case, split at white space and punctuation, [CLS] ... [SEP]."""
    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    first, last = (("[CLS]", tokens.index("[CLS]")), ("[SEP]", tokens.index("[SEP]")))
    tokenizer.post_processor = processors.BertProcessing(last, first)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def toy_model(seed: int = 0, *, layers: int = 6, hidden: int = 128) -> BertForSequenceClassification:
    """A small BERT with fresh weights for this task.

    Args:
        seed: of the weights; torch's global generator is left as it was.
        layers: L.
        hidden: H, a multiple of 4.
    """
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # BERT's 0.02 is meant for width 768; narrow layers start too quiet with it
        num_labels=len(LABEL_NAMES),
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: i for i, name in enumerate(LABEL_NAMES)},
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)
