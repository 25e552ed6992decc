"""What a command reads: data and models are checked before the work begins, and their errors name the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.tasks.load import EncodedSplit, Task
from earlyexit_kernels.tasks.sources import Split


@contextmanager
def loaded_from(source: Any) -> Iterator[None]:
    """Name the source in the error of a load that fails.

    A broken config or weight file makes transformers raise almost any class, so all are turned into one here.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the files do not hold what is expected.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"--model: {source} can't be loaded: {error}") from error
    except ImportError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--model: {source} can't be loaded: {text}") from error


def check_encoder(model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose encoder would start from random weights; a fresh classifier or pooler is fine.

    Args:
        model: a stock classifier.
        info: the loading info of transformers.

    Raises:
        ValueError: weights of the encoder are missing, or have another shape than the config says.
    """
    fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    encoder = sorted(k for k in fresh if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k)
    if encoder:
        raise ValueError(
            f"{len(encoder)} weight(s) of the encoder are missing or have another shape than config.json says, such as "
            f"{encoder[0]}; expected a complete checkpoint"
        )


def check_rows(task: Task, trained: Split, evaluation: Split) -> None:
    """Refuse data that nothing can be learned from, or that asks for what training never shows.

    Args:
        task: of the rows.
        trained: the rows to train on.
        evaluation: the rows to report on.

    Raises:
        ValueError: all rows trained on have one label, or the evaluation rows have a class that the train split lacks.
    """
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


def check_max_length(max_length: int | None, tokenizer: Any, split: Split) -> None:
    """Refuse a length that leaves no room for text.

    Raises:
        ValueError: the tokenizer's special tokens take all of it.
    """
    pairs = not isinstance(split.sentences[0], str)
    least = tokenizer.num_special_tokens_to_add(pair=pairs) + 1 + pairs
    if max_length is not None and max_length < least:
        raise ValueError(f"--max-length: expected at least {least} for this tokenizer and task, got {max_length}")


def check_lengths(data: Mapping[str, EncodedSplit], model: EarlyExitForSequenceClassification) -> None:
    """Refuse rows that have more tokens than the model has positions.

    Args:
        data: the encoded rows of each split.
        model: with exits.

    Raises:
        ValueError: a row is too long.
    """
    longest = model.adapter.longest(model.config.backbone_config)
    for name, split in data.items():
        most = max(len(split[row]["input_ids"]) for row in range(len(split)))
        if most > longest:
            raise ValueError(
                f"--max-length: a row of the {name} split has {most} tokens, the model takes at most {longest}; train "
                f"with --max-length {longest} or less"
            )
