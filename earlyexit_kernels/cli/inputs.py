"""Check the data and models that a command reads, before training or evaluation begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.tasks.load import EncodedSplit, Task
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.metrics import LOGIT_METRICS
from earlyexit_kernels.tuning.ranking import RANKING_METRICS, check_groups


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
        raise OSError(f"--model: {source} cannot be loaded: {error}") from error
    except ImportError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--model: {source} cannot be loaded: {text}") from error


def check_encoder(model: Any, info: Mapping[str, Any]) -> bool:
    """Raise if weights of the encoder would be random; a new classifier or pooler is accepted.

    Returns whether the classifier is new.

    Args:
        model: a stock classifier.
        info: the loading info from transformers.

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


def check_rows(task: Task, trained: Split, evaluation: Split) -> None:
    """Raise if training on these rows is useless.

    Args:
        task: the task of the rows.
        trained: the rows to train on.
        evaluation: the rows to report on.

    Raises:
        ValueError: all train rows have one label, evaluation rows have a class that the train split lacks, or of a
            ranking no query to report on.
    """
    check_queries({"report on": evaluation})
    if len(set(trained.labels)) == 1:
        raise ValueError(
            f"the {len(trained)} train rows of task {task.name!r} in {task.source} all have the label "
            f"{_name(task, trained.labels[0])}; expected at least two different labels"
        )
    if task.problem_type == "regression":
        return
    unseen = sorted(set(evaluation.labels) - set(task.split("train").labels))
    if unseen:
        raise ValueError(
            f"the {task.evaluation!r} split of task {task.name!r} in {task.source} has rows of the classes "
            f"{', '.join(_name(task, label) for label in unseen)}, which no row of the train split has"
        )


def _name(task: Task, label: float) -> str:
    return f"{label:g}" if task.problem_type == "regression" else f"{int(label)} ({task.label_names[int(label)]})"


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


def metrics_for(task: Task, named: Sequence[str] | None, *, predictions_only: bool = False) -> tuple[str, ...]:
    """Return the metrics of a task, or those named, of which the first one decides.

    Args:
        task: what is predicted.
        named: names in `METRIC_NAMES`, or None.
        predictions_only: leave out `LOGIT_METRICS`.

    Raises:
        ValueError: a metric that the task does not have, or of which the lower value is better as the first one.
    """
    if named is None:
        return task.metrics
    allowed = [m for m in ("accuracy", "macro_f1", "matthews", "f1") if m != "f1" or task.num_labels == 2]
    allowed += [] if predictions_only else [*LOGIT_METRICS]
    if task.problem_type == "regression":
        allowed = [*task.metrics, *(name for name in ("pearson", "spearman") if name not in task.metrics)]
    unknown = [name for name in named if name not in allowed]
    if unknown:
        hint = ""
        if unknown[0] in RANKING_METRICS:
            hint = ", which ranks the rows of a query; name their column when you train, with --group-column"
        raise ValueError(f"--metric: expected a metric of this task, {', '.join(allowed)}, got {unknown[0]}{hint}")
    if len(set(named)) < len(named):
        raise ValueError(f"--metric: expected different names, got {' '.join(named)}")
    if named[0] == "ece":
        raise ValueError("--metric: ece is an error, by which nothing is chosen; name another metric before it")
    return tuple(named)


def check_max_length(max_length: int | None, tokenizer: Any, split: Split) -> None:
    """Raise if the length leaves no room for text.

    Raises:
        ValueError: no tokens are left beside the special ones of the tokenizer.
    """
    pairs = not isinstance(split.sentences[0], str)
    minimum = tokenizer.num_special_tokens_to_add(pair=pairs) + 1 + pairs
    if max_length is not None and max_length < minimum:
        raise ValueError(f"--max-length: expected at least {minimum} for this tokenizer and task, got {max_length}")


def check_vocabulary(data: EncodedSplit, name: str, tokenizer: Any, model: Any, source: Any) -> None:
    """Raise if the tokenizer does not fit the text; for a folder without one transformers makes an empty one.

    Args:
        data: encoded rows of a split, of which the first ones are counted.
        name: of the split.
        tokenizer, model: the early-exit model and its tokenizer.
        source: folder or hub name of both, for the message.

    Raises:
        ValueError: most tokens are unknown.
    """
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    rows = min(len(data), 200)
    ids = [i for row in range(rows) for i in data[row]["input_ids"] if i not in special - {tokenizer.unk_token_id}]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1)
    if unknown <= 0.5:
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
        f"--model: {unknown:.0%} of the tokens of the first {rows} rows of the {name} split are unknown to the "
        f"tokenizer of {source}. {cause}"
    )


def check_lengths(data: Mapping[str, EncodedSplit], model: EarlyExitForSequenceClassification) -> None:
    """Raise if a row has more tokens than the model has positions.

    Args:
        data: split name -> encoded rows.
        model: the early-exit model.

    Raises:
        ValueError: a row is too long.
    """
    longest = model.adapter.longest(model.config.backbone_config)
    for name, split in data.items():
        length = max(len(split[row]["input_ids"]) for row in range(len(split)))
        if length > longest:
            raise ValueError(
                f"--max-length: a row of the {name} split has {length} tokens, the model takes at most {longest}; "
                f"train with --max-length {longest} or less"
            )


def check_packages(command: str, requirements: Sequence[str]) -> None:
    """Raise if a command lacks packages.

    Args:
        command: for the message.
        requirements: as pip takes them, ``name`` or ``name[extra]``.

    Raises:
        ImportError: names those that are not installed.
    """
    missing = [name for name in requirements if find_spec(name.partition("[")[0].replace("-", "_")) is None]
    if missing:
        raise ImportError(f"{command} requires packages that are not installed: `pip install {' '.join(missing)}`")
