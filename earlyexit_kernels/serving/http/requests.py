"""Requests of `/predict`: what clients send, the rows that it becomes, and the answers that they get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictStr, ValidationError
from transformers import AutoTokenizer

from earlyexit_kernels.ops.exit_step import valid_rows
from earlyexit_kernels.serving.answers import DEFAULT_FUNCTION, FUNCTIONS
from earlyexit_kernels.serving.http.protocol import Found
from earlyexit_kernels.serving.http.settings import Settings
from earlyexit_kernels.serving.rows import encode

#: Fields that the answer to a refused request names, and characters of a name.
NAMED, NAME_LENGTH = 3, 40
#: Characters of a text for each token that a row may have, above which it is not tokenised: a long text takes the
#: tokenizer as long as many requests. Words of a language have a tenth of it for each token.
CHARACTERS_PER_TOKEN = 64
SHORTEN = 'shorten it, or set "truncate": true'
#: What `inputs` may be.
INPUTS = "expected a text, or a list of texts and of lists of one or two texts"


class RefusedError(Exception):
    """A request is refused.

    Args:
        status: HTTP status.
        kind: as in text-embeddings-inference.
        text: what was expected, and what came.
        headers: of the answer.
    """

    def __init__(self, status: int, kind: str, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class PredictRequest(BaseModel):
    """The body of a request. A list is several inputs; a list in it is a pair of texts, or one text."""

    model_config = ConfigDict(extra="forbid")

    inputs: StrictStr | list[StrictStr | list[StrictStr]] = Field(description=INPUTS)
    truncate: StrictBool = Field(default=False, description="shorten inputs that are too long, instead of refusing")
    raw_scores: StrictBool = Field(default=False, description="return logits instead of probabilities")
    threshold: StrictFloat | None = Field(default=None, description="of the exits, within the limits of `/info`")

    @staticmethod
    def parse(body: bytes) -> PredictRequest:
        """Parse the body of a request.

        Raises:
            RefusedError: it is not JSON in UTF-8 (400), or has other fields or types (422).
        """
        try:
            return PredictRequest.model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise RefusedError(400, "Validation", f"expected a JSON object: {found[0]['msg']}")
        problems = {str(e["loc"][0]) if e["loc"] else "body": str(e["msg"]) for e in found}
        if "inputs" in problems and found[0]["type"] != "missing":
            problems["inputs"] = INPUTS
        named = [f"{name[:NAME_LENGTH]}: {text}" for name, text in problems.items()][:NAMED]
        raise RefusedError(422, "Validation", "; ".join(named))

    def texts(self, max_inputs: int) -> list[tuple[str, ...]]:
        """Return each input as one or two texts.

        Raises:
            RefusedError: none or too many, or an item that is not one or two texts.
        """
        if isinstance(self.inputs, str):
            items: list[tuple[str, ...]] = [(self.inputs,)]
        else:
            items = [(item,) if isinstance(item, str) else tuple(item) for item in self.inputs]
        if not items:
            raise RefusedError(422, "Empty", "inputs: expected at least one text, got an empty list")
        if len(items) > max_inputs:
            raise RefusedError(413, "Validation", f"inputs: expected at most {max_inputs}, got {len(items)}")
        for index, item in enumerate(items):
            if len(item) not in (1, 2):
                raise RefusedError(422, "Validation", f"inputs.{index}: expected 1 or 2 texts, got {len(item)}")
        return items


def check_threshold(threshold: float | None, settings: Settings) -> None:
    """Check the threshold of a request.

    Raises:
        RefusedError: the server accepts none, or not this one (422).
    """
    low, high = settings.min_threshold, settings.max_threshold
    if threshold is None:
        return
    if low is None or high is None:
        raise RefusedError(
            422,
            "Validation",
            "threshold: this server accepts no threshold of a request; leave it out, or start the server with "
            "--min-threshold and --max-threshold",
        )
    if not low <= threshold <= high:
        raise RefusedError(422, "Validation", f"threshold: expected a number in [{low:g}, {high:g}], got {threshold:g}")


class Tokenizer:
    """The tokenizer of a model. One thread at a time may use it.

    Args:
        folder: of the model.

    Raises:
        OSError, ValueError: the folder has no tokenizer that can be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_length: int = self._tokenizer.model_max_length

    def rows(self, items: Sequence[tuple[str, ...]], *, truncate: bool) -> list[tuple[list[int], list[int] | None]]:
        """Return token ids and segment ids of each input.

        Raises:
            RefusedError: an input is empty; or it has more than `max_length` tokens, or more than
                `CHARACTERS_PER_TOKEN` characters for each, to which `truncate` cuts it.
        """
        most = CHARACTERS_PER_TOKEN * self.max_length
        if truncate:
            items = [tuple(text[:most] for text in item) for item in items]
        for index, item in enumerate(items):
            if (characters := max(map(len, item))) > most:
                limit = f"{most} characters ({self.max_length} tokens)"
                raise _bad_input(index, f"expected at most {limit}, got {characters}; {SHORTEN}")
        rows: list[Any] = [None] * len(items)
        problems: dict[int, str] = {}
        for texts in (1, 2):  # an input of one text, or a pair
            numbers = [number for number, item in enumerate(items) if len(item) == texts]
            given = [items[number][0] if texts == 1 else items[number] for number in numbers]
            found = encode(given, self._tokenizer, max_length=self.max_length, truncate=truncate)
            problems |= {numbers[index]: text for index, text in found.problems.items()}
            for index, row in zip(found.numbers, found.rows, strict=True):
                rows[numbers[index]] = (row["input_ids"], row.get("token_type_ids"))
        if problems:
            first = min(problems)
            raise _bad_input(first, problems[first].replace("shorten it, or pass truncate=True", SHORTEN))
        return rows


def _bad_input(index: int, problem: str) -> RefusedError:
    return RefusedError(422, "Validation", f"inputs.{index}: {problem}")


def predictions(
    answer: Found, labels: Sequence[str], problem_type: str, *, raw_scores: bool
) -> list[dict[str, Any]] | None:
    """Return the score of each label, the highest first, and the exit layer; None where they are not finite.

    Args:
        answer: of the model.
        labels: names of the C classes.
        problem_type: of the model; a number that is predicted by regression is its own score.
        raw_scores: return the logits.
    """
    logits = torch.tensor(answer.logits, dtype=torch.float64)
    scores = FUNCTIONS["none" if raw_scores else DEFAULT_FUNCTION[problem_type]](logits)
    if not (valid_rows(logits, None) and scores.isfinite().all()):
        return None
    best, order = scores.sort(descending=True, stable=True)
    return [
        {"label": labels[index], "score": score, "exit_layer": answer.exit_layer}
        for index, score in zip(order.tolist(), best.tolist(), strict=True)
    ]
