"""Baselines on the same weights: the plain model, compiled, other runtimes, and early exit in plain PyTorch.

A builder takes a model, the criterion (None: no row leaves) and a layer to stop after, and returns ``batch -> (logits
[N, C], exit_layer [N] or None)``. The loops run the family's own padded layers and the same exits as our model, with
the entropy rule written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from benchmarks.end_to_end import peers
from benchmarks.end_to_end.models import Subject, exit_logits
from benchmarks.machine import NotMeasuredError, device
from earlyexit_kernels.core.calls import hidden_of
from earlyexit_kernels.criteria import Criterion

Answer: TypeAlias = tuple[Tensor, Tensor | None]
Answering: TypeAlias = Callable[[dict[str, Tensor]], Answer]
Builder: TypeAlias = Callable[[Subject, Criterion | None, int], Answering]
PLAIN, TRUNCATION, ITEM_LOOP = "transformers", "truncation", "item loop"
COMPILED_WHOLE = "torch.compile, reduce-overhead"
#: Baselines that run fewer layers.
LEAVE_EARLY = frozenset({ITEM_LOOP, "mask loop", TRUNCATION})
#: Calls until torch has compiled a model, warmed it up and recorded its graph.
CALLS_TO_RECORD = 3


def plain(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """Plain Hugging Face: sdpa attention, padded rows, full depth."""
    return lambda batch: (subject.plain(**batch).logits, None)


def _copy_of_plain(subject: Subject) -> Any:
    torch.compiler.reset()  # otherwise a second model is compiled for any hidden size
    memo = {id(x): x for x in [*subject.plain.parameters(), *subject.plain.buffers()]}
    return copy.deepcopy(subject.plain, memo)


def compiled(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The plain model with each layer under `torch.compile`; one graph serves all layers."""
    module = _copy_of_plain(subject)
    for block in _Encoder(module).layers:
        block.compile()
    return lambda batch: (module(**batch).logits, None)


def compiled_whole(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The plain model compiled as a whole for each shape, run from CUDA graphs on a GPU.

    A batch without padding comes without its mask, which spares the model the work of applying it. If torch skips CUDA
    graphs, which it reports only in its log, the first call raises NotMeasuredError.
    """
    module = torch.compile(_copy_of_plain(subject), mode="reduce-overhead", dynamic=False)
    skipped = _skipped_graphs()
    # each batch is kept beside its input, so that its id is not reused
    given: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def answer(batch: dict[str, Tensor]) -> Answer:
        if id(batch) not in given:
            is_padded = not bool(batch["attention_mask"].all())
            given[id(batch)] = batch, batch if is_padded else {"input_ids": batch["input_ids"]}
            for _ in range(CALLS_TO_RECORD):
                module(**given[id(batch)][1])
            if device() == "cuda" and _skipped_graphs() > skipped:
                raise NotMeasuredError("torch.compile runs it without CUDA graphs")
        return module(**given[id(batch)][1]).logits, None

    return answer


def _skipped_graphs() -> int:
    """Return how often torch compiled or ran something without the CUDA graphs that it was asked for."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


class _Encoder:
    """The parts of a plain classifier's encoder that a hand-written loop uses."""

    def __init__(self, classifier: Any) -> None:
        self.encoder = getattr(classifier, "bert", None) or classifier.encoder
        self.layers = self.encoder.encoder.layer

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return hidden states ``[N, S, H]`` and the family's own mask for sdpa."""
        hidden = self.encoder.embeddings(input_ids=batch["input_ids"])
        mask = create_bidirectional_mask(
            config=self.encoder.config, inputs_embeds=hidden, attention_mask=batch["attention_mask"]
        )
        return hidden, mask


def truncated(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The first `layer` layers and the exit after them, for every row."""
    heads, stack = copy.deepcopy(subject.model.heads).float(), _Encoder(subject.plain)

    def answer(batch: dict[str, Tensor]) -> Answer:
        hidden, mask = stack.embed(batch)
        for block in stack.layers[:layer]:
            hidden = hidden_of(block(hidden, mask))
        return exit_logits(heads, layer, hidden, batch["attention_mask"]), None

    return answer


def item_loop(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """One row at a time, as in PABEE's public code: a Python `if` on `.item()` after every layer."""
    heads, stack = copy.deepcopy(subject.model.heads).float(), _Encoder(subject.plain)

    def one_row(row: dict[str, Tensor]) -> tuple[Tensor, int]:
        hidden, mask = stack.embed(row)
        for number, block in enumerate(stack.layers, start=1):
            hidden = hidden_of(block(hidden, mask))
            logits = exit_logits(heads, number, hidden, row["attention_mask"])
            if number == len(stack.layers) or _entropy(logits).item() < _threshold(rule, number):
                break
        return logits[0], number

    def answer(batch: dict[str, Tensor]) -> Answer:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        rows = ({name: x[n : n + 1, :length] for name, x in batch.items()} for n, length in enumerate(lengths))
        logits, exits = zip(*map(one_row, rows), strict=True)
        return torch.stack(logits), torch.tensor(exits)

    return answer


def mask_loop(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """Padded batches, with a boolean mask that selects the live rows after every layer."""
    heads, stack = copy.deepcopy(subject.model.heads).float(), _Encoder(subject.plain)

    def answer(batch: dict[str, Tensor]) -> Answer:
        hidden, mask = stack.embed(batch)
        tokens, rows = batch["attention_mask"], torch.arange(hidden.shape[0], device=hidden.device)
        answers = torch.empty(hidden.shape[0], heads.out[-1].out_features, device=hidden.device)
        exit_layer = torch.full_like(rows, len(stack.layers))
        for number, block in enumerate(stack.layers, start=1):
            hidden = hidden_of(block(hidden, mask))
            logits = exit_logits(heads, number, hidden, tokens)
            if number == len(stack.layers):
                answers[rows] = logits
                break
            leaves = _entropy(logits) < _threshold(rule, number)
            answers[rows[leaves]], exit_layer[rows[leaves]] = logits[leaves], number
            live = ~leaves
            hidden, tokens, rows = hidden[live], tokens[live], rows[live]
            mask = None if mask is None else mask[live]
            if not len(rows):
                break
        return answers, exit_layer

    return answer


def _all_layers(build: Callable[[Subject], Answering]) -> Builder:
    return lambda subject, rule, layer: build(subject)


#: Name -> builder.
BASELINES: dict[str, Builder] = {
    PLAIN: plain,
    "torch.compile": compiled,
    COMPILED_WHOLE: compiled_whole,
    ITEM_LOOP: item_loop,
    "mask loop": mask_loop,
    TRUNCATION: truncated,
    **{name: _all_layers(build) for name, build in peers.RUNTIMES.items()},
}
#: The other runtimes in the dtype of the model, and the baselines of the CPU suites; compiling a model as a whole takes
#: long and pays on GPUs.
PEERS = ("ONNX Runtime", "OpenVINO")
USUAL = (PLAIN, "torch.compile", ITEM_LOOP, "mask loop", TRUNCATION, *PEERS)


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _threshold(rule: Criterion | None, layer: int) -> float:
    return 0.0 if rule is None else rule.params(layer)[0]
