"""Check rows, models and files before the work begins, and name files in the error of a failed read or write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from earlyexit_kernels.data.rows import METRICS, NUMBERS, RANKING_METRICS, Labels, Split
from earlyexit_kernels.tuning.metrics import LOGIT_METRICS
from earlyexit_kernels.tuning.ranking import check_groups

#: Rows of which the tokens are counted, and the share of unknown ones above which a tokenizer does not fit.
COUNTED, UNKNOWN = 200, 0.5


@contextmanager
def loaded_from(source: Any) -> Iterator[None]:
    """Add the source to the error of a failed load.

    transformers raises almost any class for a broken config or weight file; all are converted to ValueError.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file has invalid contents.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"MODEL: {source} cannot be loaded: {error}") from error
    except ImportError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"MODEL: {source} cannot be loaded: {text}") from error


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Add the path to the error of a failed write; errors of the system often name none.

    Raises:
        OSError: the reason that the system or safetensors gives, with the path.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(f"{path} could not be written: {reason}") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer.

    Raises:
        OSError: it cannot be written (the tokenizers library raises a bare Exception).
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer cannot be saved: {error}") from error


def check_encoder(model: Any, info: Mapping[str, Any]) -> bool:
    """Raise if weights of the encoder would be random; a new classifier or pooler is accepted.

    Args:
        model: a stock classifier.
        info: the loading info from transformers.

    Returns:
        whether the classifier is new.

    Raises:
        ValueError: weights of the encoder are missing, or their shapes differ from the config.
    """
    fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    encoder = sorted(k for k in fresh if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k)
    if encoder:
        raise ValueError(
            f"expected a complete checkpoint, got one in which {len(encoder)} weight(s) of the encoder are missing or "
            f"differ in shape from config.json, e.g. {encoder[0]}"
        )
    return any(not key.startswith(f"{model.base_model_prefix}.") for key in fresh)


def check_vocabulary(rows: Sequence[Mapping[str, Any]], tokenizer: Any, model: Any, source: Any) -> None:
    """Raise if the tokenizer does not fit the text; for a folder without one transformers makes an empty one.

    Args:
        rows: encoded, of which the first ones are counted.
        tokenizer, model: the early-exit model and its tokenizer.
        source: folder or hub name of both, for the message.

    Raises:
        ValueError: most tokens are unknown.
    """
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    counted = rows[:COUNTED]
    ids = [i for row in counted for i in row["input_ids"] if i not in special - {tokenizer.unk_token_id}]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1)
    if unknown <= UNKNOWN:
        return
    embeddings = model.backbone.get_input_embeddings().num_embeddings
    cause = (
        f"It has {len(vocabulary)} tokens, the model {embeddings} embeddings. "
        "If it is the model's own tokenizer, it was made for other text or another language: choose a model for this "
        "text. If it belongs to another model, save the model's own in the folder"
    )
    if not set(vocabulary.values()) - special:
        cause = "It knows no words, as the folder has no files of a tokenizer: save the model's own there"
    raise ValueError(
        f"MODEL: {unknown:.0%} of the tokens of the first {len(counted)} rows are unknown to the tokenizer of {source}"
        f". {cause}"
    )


def queries_of(split: Split) -> NDArray | None:
    """Return the query of each row ``[N]``, or None for rows without queries."""
    return np.asarray(split.groups) if split.groups else None


def check_queries(splits: Mapping[str, Split]) -> None:
    """Raise if the rows have queries of which none can be ranked.

    Args:
        splits: rows by what they are for, as in "rows to choose on".

    Raises:
        ValueError: says how many queries there are, and why they do not count.
    """
    for name, split in splits.items():
        if split.groups:
            check_groups(f"rows to {name}", split.labels, split.groups)


def metrics_for(
    labels: Labels, ranked: bool, named: Sequence[str] | None, *, predictions_only: bool = False
) -> tuple[str, ...]:
    """Return the metrics of rows, or those named, of which the first one decides.

    Args:
        labels: what is predicted.
        ranked: whether the rows have queries.
        named: names in `METRIC_NAMES`, or None.
        predictions_only: leave out `LOGIT_METRICS`.

    Raises:
        ValueError: a metric that the rows do not have, or of which the lower value is better as the first one.
    """
    numbers = METRICS[NUMBERS]
    own = RANKING_METRICS if ranked else METRICS[labels.problem_type]
    if not named:
        return own
    allowed = [m for m in ("accuracy", "macro_f1", "matthews", "f1") if m != "f1" or len(labels.names) == 2]
    allowed += [] if predictions_only else [*LOGIT_METRICS]
    if labels.problem_type == NUMBERS:
        allowed = [*own, *(name for name in numbers if name not in own)]
    unknown = [name for name in named if name not in allowed]
    if unknown:
        hint = ""
        if unknown[0] in RANKING_METRICS:
            hint = ", which ranks the rows of a query; name their column with --group-column"
        raise ValueError(f"--metric: expected a metric of these rows, {', '.join(allowed)}, got {unknown[0]}{hint}")
    if len(set(named)) < len(named):
        raise ValueError(f"--metric: expected different names, got {' '.join(named)}")
    if named[0] == "ece":
        raise ValueError("--metric: ece is an error, by which nothing is chosen; name another metric before it")
    return tuple(named)
