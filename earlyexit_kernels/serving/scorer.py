"""Texts in, a table of answers out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from earlyexit_kernels.arguments import choice, flag, optional, whole
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.hf.predict import PadRight, predict_batches
from earlyexit_kernels.serving.answers import FUNCTIONS, column_names, columns_of
from earlyexit_kernels.serving.drift import drift_of
from earlyexit_kernels.serving.rows import encode, rows_of, token_batches
from earlyexit_kernels.serving.source import Source, check_tokenizer, checked_model, length_limit

#: What happens to rows that cannot be classified.
BAD_ROWS = ("raise", "report")


@dataclass(frozen=True)
class Options:
    """The options of a `Scorer`, checked."""

    max_tokens: int
    max_length: int | None
    truncate: bool
    bad_rows: str
    function_to_apply: str | None
    scores: bool
    drift_window: int | None
    show_progress_bar: bool

    def __post_init__(self) -> None:
        for name, check in OPTION_CHECKS.items():
            check(f"Scorer({name}=...)", getattr(self, name))


OPTION_CHECKS = {
    "max_tokens": whole(low=1),
    "max_length": optional(whole(low=1)),
    "truncate": flag,
    "bad_rows": choice(*BAD_ROWS),
    "function_to_apply": choice(None, *FUNCTIONS),
    "scores": flag,
    "drift_window": optional(whole(low=1)),
    "show_progress_bar": flag,
}


class Scorer:
    """Table of the answers to texts: rows are tokenised, sorted by length, batched by tokens and run; order is kept.

    Called with a list of texts, or of pairs of texts, it returns columns, as lists. Called with columns, ``text`` and
    for pairs ``text_pair`` among them, it returns these columns and those of the answers, as
    `datasets.map(batched=True)` and `map_batches` of Ray expect. The columns of the answers:

    - ``label``: name of the class with the largest score; an empty string for a row without an answer; left out for a
      regression model with one output.
    - ``score``: its score, by the function that transformers' pipeline applies: softmax, sigmoid for several labels a
      row, nothing for regression; NaN for a row without an answer.
    - ``exit_layer``: 1-based; 0 for a row that did not run.
    - ``error``: why the row has no answer; an empty string for the others.
    - ``scores``: if asked for, those of all classes, in their order.

    A row for which the model gives invalid logits has no answer, the other rows of its batch do. A pickle, as
    `multiprocessing` and Ray make it, of a Scorer made from a folder holds the path, the options and the current
    criterion, not the weights; one made from a model holds the model. Calls are safe in several threads.

    Args:
        model: an early-exit model in eval mode, or a folder or hub name to load one from, on the GPU if there is one.
        tokenizer: of the model; default: that of the folder.
        max_tokens: maximum number of tokens of a batch, without padding; a longer row is a batch of its own.
        max_length: maximum number of tokens of a row; default: the smaller of the limits of tokenizer and model.
        truncate: cut rows that are longer; otherwise they cannot be classified.
        bad_rows: what happens to rows that cannot be classified, such as None, an empty text or one that is too long:
            ``"raise"``: an error, before anything is run; ``"report"``: the row has no answer, and its error says why.
        function_to_apply: ``"softmax"``, ``"sigmoid"`` or ``"none"`` instead of the default.
        scores: add the column ``scores``.
        drift_window: rows after which `drift` tests whether rows leave at other layers than those of the calibration;
            None: it does not.
        show_progress_bar: show rows, rate and time left on stderr while a call runs.

    Attributes:
        model: as given or loaded.
        tokenizer: a copy of that given, or loaded.
        drift: an `ExitDrift`, or None for a model without a calibration. It observes rows as long as the criterion of
            the model is the calibrated one.

    Raises:
        TypeError: a model without exits.
        ValueError: an option out of range, a tokenizer of another model, or a calibration of another number of layers.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from earlyexit_kernels.data import toy
        >>> criterion = ee.criteria.MaxProbability(threshold=0.4)  # two classes always pass this
        >>> model = ee.to_early_exit(toy.toy_model(layers=2, hidden=8), criterion=criterion).eval()
        >>> scorer = ee.Scorer(model, toy.toy_tokenizer())
        >>> table = scorer(["The plot was dull.", "The cast was witty and the music was superb."])
        >>> list(table), table["exit_layer"]
        (['label', 'score', 'exit_layer', 'error'], [1, 1])
        >>> scorer({"id": [7], "text": ["The plot was dull."], "text_pair": ["It was weak."]})["id"]
        [7]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_tokens: int = 4096,
        max_length: int | None = None,
        truncate: bool = False,
        bad_rows: str = "raise",
        function_to_apply: str | None = None,
        scores: bool = False,
        drift_window: int | None = 1000,
        show_progress_bar: bool = False,
    ) -> None:
        self.options = Options(
            max_tokens, max_length, truncate, bad_rows, function_to_apply, scores, drift_window, show_progress_bar
        )
        self._source: Source | None = None
        if isinstance(model, (str, os.PathLike)):
            self._source = Source.of(model, tokenizer)
            model, tokenizer = self._source.load()
        self.model = checked_model(model)
        check_tokenizer(tokenizer, self.model)
        # truncation is a setting of a tokenizer, which another thread that shares it would change
        self.tokenizer = copy.deepcopy(tokenizer)
        self._max_length = length_limit(max_length, tokenizer, self.model)
        self.drift = None if drift_window is None else drift_of(self.model, drift_window)

    def __call__(self, texts: Any) -> dict[str, Any]:
        """Return the answers to texts.

        Args:
            texts: a list of N texts or pairs of texts, or columns.

        Returns:
            the columns given, if any, and those of the answers.

        Raises:
            ValueError: neither a list nor columns, or a row that cannot be classified; the message names it.
            RuntimeError: the model is in train mode.
        """
        if self.model.training:
            raise RuntimeError("Scorer: expected the model in eval mode, got train mode; call model.eval() first")
        columns = dict(texts) if isinstance(texts, Mapping) else {}
        doubled = [name for name in column_names(self.model, scores=self.options.scores) if name in columns]
        if doubled:
            raise ValueError(f"Scorer: got a column {doubled[0]!r}, which the answers would replace; rename it")
        return columns | self._answers(rows_of(texts))

    def _answers(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        options = self.options
        encoded = encode(rows, self.tokenizer, max_length=self._max_length, truncate=options.truncate)
        if encoded.problems and options.bad_rows == "raise":
            first, others = min(encoded.problems), len(encoded.problems) - 1
            more = f" ({others} other row(s) cannot be classified either)" if others else ""
            raise ValueError(f"Scorer: row {first}: {encoded.problems[first]}{more}")
        batches = list(token_batches([len(row["input_ids"]) for row in encoded.rows], options.max_tokens))
        with tqdm(total=len(encoded.rows), unit="row", disable=not options.show_progress_bar) as bar:
            found = predict_batches(self.model, _padded(encoded.rows, batches, PadRight.of(self.model), bar))
        numbers = [encoded.numbers[row] for batch in batches for row in batch]
        logits = torch.zeros(len(rows), self.model.config.num_labels)
        exit_layer = torch.zeros(len(rows), dtype=torch.int64)
        logits[numbers], exit_layer[numbers] = torch.from_numpy(found.logits), torch.from_numpy(found.exit_layer)
        if self.drift is not None and self.model.criterion == self.drift.calibration.criterion:
            self.drift.observe(exit_layer[exit_layer > 0])
        return columns_of(
            self.model,
            logits,
            exit_layer,
            encoded.problems,
            function=options.function_to_apply,
            scores=options.scores,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Hold the source, or else the model and the tokenizer, and the options."""
        if self._source is None:
            return _rebuilt, (self.model, self.tokenizer, asdict(self.options))
        return _rebuilt, (self._source, None, asdict(self.options), self.model.criterion)


def _padded(rows: Sequence[Any], batches: Sequence[Sequence[int]], pad: PadRight, bar: Any) -> Iterator[Any]:
    """Yield batches of rows, padded, and count on a bar those that have run."""
    for batch in batches:
        yield pad([rows[row] for row in batch])
        bar.update(len(batch))


def _rebuilt(model: Any, tokenizer: Any, options: Mapping[str, Any], criterion: Criterion | None = None) -> Scorer:
    """Make a scorer from the data of a pickle; `criterion` is that of a model from a source."""
    if not isinstance(model, Source):
        return Scorer(model, tokenizer, **options)
    loaded, tokenizer = model.load()
    scorer = Scorer(loaded, tokenizer, **options)
    scorer._source = model
    if scorer.model.criterion != criterion:
        scorer.model.set_criterion(criterion)
    return scorer
