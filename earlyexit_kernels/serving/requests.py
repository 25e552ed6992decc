"""Requests of `/predict` and `/rerank`: what clients send, the rows that it becomes, and how requests are refused."""

from __future__ import annotations

import copy
import hmac
from base64 import b64decode
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from earlyexit_kernels.serving.rows import SHORTEN_IN_PYTHON, encode

#: Fields that the answer to a refused request names, and characters of a name.
NAMED, NAME_LENGTH = 3, 40
#: Characters of a text for each token that a row may have, above which it is not tokenised: a long text takes the
#: tokenizer as long as many requests. Words of a language have a tenth of it for each token.
CHARACTERS_PER_TOKEN = 64
SHORTEN = 'shorten it, or set "truncate": true'
#: What `inputs` may be.
INPUTS = "expected a text, or a list of texts and of lists of one or two texts"
#: Seconds after which a client may try again where the server is overloaded.
RETRY_AFTER = "1"


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

    def response(self) -> JSONResponse:
        """Return the answer to the request."""
        return JSONResponse({"error": str(self), "error_type": self.kind}, self.status, headers=self.headers)


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid")
    #: Field -> what it may be, for the error on another value.
    expected: ClassVar[dict[str, str]] = {}

    truncate: StrictBool = Field(default=False, description="shorten inputs that are too long, instead of refusing")
    raw_scores: StrictBool = Field(default=False, description="return logits instead of probabilities")

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse the body of a request.

        Raises:
            RefusedError: it is not JSON in UTF-8 (400), or has other fields or types (422).
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise RefusedError(400, "Validation", f"expected a JSON object: {found[0]['msg']}")
        problems = {str(e["loc"][0]) if e["loc"] else "body": str(e["msg"]) for e in found}
        if found[0]["type"] != "missing":
            problems |= {name: text for name, text in cls.expected.items() if name in problems}
        named = [f"{name[:NAME_LENGTH]}: {text}" for name, text in problems.items()][:NAMED]
        raise RefusedError(422, "Validation", "; ".join(named))


class PredictRequest(Body):
    """The body of a request of `/predict`. A list is several inputs; a list in it is a pair of texts, or one text."""

    expected: ClassVar[dict[str, str]] = {"inputs": INPUTS}

    inputs: StrictStr | list[StrictStr | list[StrictStr]] = Field(description=INPUTS)

    def items(self, max_inputs: int) -> list[tuple[str, ...]]:
        """Return each input as one or two texts.

        Raises:
            RefusedError: none or too many, or an item that is not one or two texts.
        """
        if isinstance(self.inputs, str):
            items: list[tuple[str, ...]] = [(self.inputs,)]
        else:
            items = [(item,) if isinstance(item, str) else tuple(item) for item in self.inputs]
        _check_count("inputs", len(items), max_inputs)
        for index, item in enumerate(items):
            if len(item) not in (1, 2):
                raise RefusedError(422, "Validation", f"inputs.{index}: expected 1 or 2 texts, got {len(item)}")
        return items


class RerankRequest(Body):
    """The body of a request of `/rerank`."""

    query: StrictStr = Field(description="the first text of each pair")
    texts: list[StrictStr] = Field(description="the texts to rank for the query")
    return_text: StrictBool = Field(default=False, description="return the texts too")

    def items(self, max_inputs: int) -> list[tuple[str, ...]]:
        """Return the pair of the query and each text.

        Raises:
            RefusedError: no texts or too many.
        """
        _check_count("texts", len(self.texts), max_inputs)
        return [(self.query, text) for text in self.texts]


def _check_count(name: str, count: int, max_inputs: int) -> None:
    if not count:
        raise RefusedError(422, "Empty", f"{name}: expected at least one text, got an empty list")
    if count > max_inputs:
        raise RefusedError(413, "Validation", f"{name}: expected at most {max_inputs}, got {count}")


async def body_of(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedError: it is too long (413).
        ClientDisconnect: the client has gone.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RefusedError(413, "Validation", f"expected a body of at most {max_bytes} bytes")
    return bytes(body)


def check_key(expected: str | None, authorization: str) -> None:
    """Compare the key of a request in constant time: ``Bearer KEY``, or ``Basic`` with the key as password.

    Args:
        expected: the key, or None where all may pass.
        authorization: the header, or an empty string.

    Raises:
        RefusedError: the key is missing or wrong (401).
    """
    if expected is None:
        return
    scheme, _, credentials = authorization.partition(" ")
    key = credentials.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            key = b64decode(key, validate=True).partition(b":")[2]
        except ValueError:
            key = b""
    if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(key, expected.encode()):
        text = "expected the header Authorization: Bearer KEY with the API key, or Basic with it as the password"
        raise RefusedError(401, "Unauthorized", text, WWW_Authenticate='Basic realm="earlyexit"')


class Encoder:
    """Turns the texts of requests into rows; one thread at a time may use it, as truncation is a state of a tokenizer.

    Args:
        tokenizer: of the model, of which a copy is made.
        max_length: tokens of a row.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self.max_length = copy.deepcopy(tokenizer), max_length

    def rows(
        self, items: Sequence[tuple[str, ...]], *, truncate: bool, field: str = "inputs"
    ) -> list[dict[str, list[int]]]:
        """Return the inputs by name of each item of one or two texts, which came in a field of the request.

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
                raise _bad_input(field, index, f"expected at most {limit}, got {characters}; {SHORTEN}")
        rows: dict[int, dict[str, list[int]]] = {}
        problems: dict[int, str] = {}
        for texts in {len(item) for item in items}:  # an input of one text, or a pair
            numbers = [number for number, item in enumerate(items) if len(item) == texts]
            values = [items[number][0] if texts == 1 else items[number] for number in numbers]
            encoded = encode(values, self._tokenizer, max_length=self.max_length, truncate=truncate)
            problems |= {numbers[index]: text for index, text in encoded.problems.items()}
            rows |= {numbers[index]: row for index, row in zip(encoded.numbers, encoded.rows, strict=True)}
        if problems:
            first = min(problems)
            raise _bad_input(field, first, problems[first].replace(SHORTEN_IN_PYTHON, SHORTEN))
        return [rows[number] for number in range(len(items))]


def _bad_input(field: str, index: int, problem: str) -> RefusedError:
    return RefusedError(422, "Validation", f"{field}.{index}: {problem}")
