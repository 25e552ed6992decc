"""Generate the sentence task of `earlyexit demo`, with its tokenizer and its small model.

Every sentence is a short review; the label is 1 if its *main* clause is positive and 0 if it is negative. There are
five levels of difficulty:

    1 plain      the plot of the film was really brilliant .                          the evaluative word decides
    2 negated    the plot of the film was not brilliant .                             a negation inverts it
    3 contrast   although the plot was dull , the cast was brilliant .                the main clause decides
    4 mixed      the plot was clever , but the cast was hardly brilliant .            clauses may be negated
    5 reported   nobody believes that the cast was never dull , although the ...      a report may deny the clause

The concessive clause (after `although`, or before `but`) is a distractor with the opposite label; only the connective
marks it. The label of the main clause is a parity: the polarity of its word, inverted by a negation and inverted again
by a report that denies it. Level 1 can be classified from the embeddings; the others require several layers.

The train split is a curriculum: its rows start with level 1 and the other levels are added one by one. A small model
trained from scratch for less than a minute does not learn a parity that is presented too early.

All draws use `random.Random(seed).random()`, whose sequence is stable between versions of Python.
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
#: Position in the train split, as a share of its rows, from which the levels 1 to 5 occur.
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
#: Sentences with a concessive clause {c} and a main clause {m}.
CONTRASTS = ("{c} , but {m}", "although {c} , {m}", "{m} , although {c}", "{c} ; still , {m}", "{m} , even if {c}")

#: Level -> whether the (main, concessive) clauses are negated; equally likely alternatives.
_NEGATED_CLAUSES = {
    3: ((False, False),),
    4: ((True, False), (False, True), (True, True)),
    5: ((False, False), (False, True), (True, False)),
}

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Sentence:
    """A generated sentence with its label (0 or 1) and its level of difficulty (1 to 5)."""

    text: str
    label: int
    level: int


class _Writer:
    """Draw clauses and sentences from one random generator."""

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
        """Return a clause with this label after its negation and its report are applied."""
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
    """Generate the splits ``"train"``, ``"dev"`` and ``"test"``; all sentences are different.

    Args:
        seed: random seed.
        train_rows: number of train rows, in the order of the curriculum.
        dev_rows, test_rows: number of rows, of all levels.

    Raises:
        ValueError: a number of rows is negative, or there are more than 100,000 in total (level 1 has about 20,000
            different sentences).
    """
    sizes = {"dev": dev_rows, "test": test_rows, "train": train_rows}
    if min(sizes.values()) < 0 or sum(sizes.values()) > 100_000:
        raise ValueError(f"write_splits: expected rows >= 0 and at most 100000 in total, got {sizes}")
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
    """Return all tokens of the task, special tokens first."""
    phrases = [*NEGATIONS, *AFFIRMATIONS, *DENIALS, *(c.format(m="", c="") for c in CONTRASTS), "the of was ."]
    words = [*WORDS[POSITIVE], *WORDS[NEGATIVE], *ASPECTS, *THINGS, *MANNERS, *" ".join(phrases).split()]
    return [*SPECIAL_TOKENS, *dict.fromkeys(words)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over `vocabulary`: lower case, split at white space and punctuation."""
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
    """Return a small BERT with random weights for this task.

    Args:
        seed: seed of the weights; the global generator of torch is not changed.
        layers: number of layers L.
        hidden: width H, a multiple of 4.
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
        initializer_range=0.05,  # BERT's 0.02 is for width 768 and too small for narrow layers
        num_labels=len(LABEL_NAMES),
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: i for i, name in enumerate(LABEL_NAMES)},
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        return BertForSequenceClassification(config)
