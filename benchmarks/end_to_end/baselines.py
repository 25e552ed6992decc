"""What others do with the same weights: the plain model, compiled, other runtimes, and early exit in plain PyTorch.

A builder takes a model, the rule that decides (None: nobody leaves) and a layer to stop after, and gives ``batch ->
(logits [N, C], exit_layer [N] or None)``. The loops run the family's own padded layers and the same exits as ours, and
write the entropy rule out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from benchmarks.end_to_end import peers
from benchmarks.end_to_end.models import NotMeasuredError, Subject, device, exit_logits
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.full_depth import first

Answer: TypeAlias = tuple[Tensor, Tensor | None]
Answering: TypeAlias = Callable[[dict[str, Tensor]], Answer]
Builder: TypeAlias = Callable[[Subject, Criterion | None, int], Answering]
PLAIN, TRUNCATION, ITEM_LOOP = "transformers", "truncation", "item loop"
COMPILED_WHOLE = "torch.compile, reduce-overhead"
#: Baselines that run fewer layers, and other runtimes.
LEAVE_EARLY = frozenset({ITEM_LOOP, "mask loop", TRUNCATION})
PEERS = frozenset({"ONNX Runtime", "OpenVINO"})
#: Until torch has compiled a model, run it once more, and recorded its graph.
CALLS_TO_RECORD = 3


def plain(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """Plain Hugging Face: sdpa attention, padded rows, full depth."""
    return lambda batch: (subject.plain(**batch).logits, None)


def compiled(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The plain model with each of its layers under `torch.compile`: one graph serves all layers."""
    torch.compiler.reset()  # else a second shape of model is compiled for any hidden size
    memo = {id(x): x for x in [*subject.plain.parameters(), *subject.plain.buffers()]}
    module = copy.deepcopy(subject.plain, memo)
    for block in _Padded.of(module).layers:
        block.compile()
    return lambda batch: (module(**batch).logits, None)


def compiled_whole(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The plain model compiled as a whole for each shape, and run from CUDA graphs where there is a GPU.

    A batch without padding comes without its mask: to look at it, and to apply it, would cost the model time.
    Where torch leaves the graphs out, which it says in its log alone, the first call raises NotMeasuredError.
    """
    torch.compiler.reset()
    before = _without_graphs()
    memo = {id(x): x for x in [*subject.plain.parameters(), *subject.plain.buffers()]}
    module = torch.compile(copy.deepcopy(subject.plain, memo), mode="reduce-overhead", dynamic=False)
    # each batch is kept beside its input, so that no other one gets its id
    given: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def answer(batch: dict[str, Tensor]) -> Answer:
        if id(batch) not in given:
            padded = not bool(batch["attention_mask"].all())
            given[id(batch)] = batch, batch if padded else {"input_ids": batch["input_ids"]}
            for _ in range(CALLS_TO_RECORD):
                module(**given[id(batch)][1])
            if device() == "cuda" and _without_graphs() > before:
                raise NotMeasuredError("torch.compile runs it without CUDA graphs")
        _, inputs = given[id(batch)]
        return module(**inputs).logits, None

    return answer


def _without_graphs() -> int:
    """How often torch has compiled or run something without the CUDA graphs that it was asked for."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def truncated(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """The first `layer` layers and the exit after them, for every row."""
    heads = _in_float32(subject)

    def answer(batch: dict[str, Tensor]) -> Answer:
        stack = _Padded.of(subject.plain)
        hidden, mask = stack.embed(batch)
        for block in stack.layers[:layer]:
            hidden = first(block(hidden, mask))
        return exit_logits(heads, layer, hidden, batch["attention_mask"]), None

    return answer


def item_loop(subject: Subject, rule: Criterion | None, layer: int) -> Answering:
    """One row at a time, as PABEE's public code does: a Python `if` on `.item()` after every layer."""
    heads = _in_float32(subject)

    def one_row(row: dict[str, Tensor]) -> tuple[Tensor, int]:
        stack = _Padded.of(subject.plain)
        hidden, mask = stack.embed(row)
        for number, block in enumerate(stack.layers, start=1):
            hidden = first(block(hidden, mask))
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
    """Padded batches, and a boolean mask that picks the rows that go on after every layer."""
    heads = _in_float32(subject)

    def answer(batch: dict[str, Tensor]) -> Answer:
        stack = _Padded.of(subject.plain)
        hidden, mask = stack.embed(batch)
        tokens, rows = batch["attention_mask"], torch.arange(hidden.shape[0], device=hidden.device)
        answers = torch.empty(hidden.shape[0], heads.out[-1].out_features, device=hidden.device)
        exit_layer = torch.full_like(rows, len(stack.layers))
        for number, block in enumerate(stack.layers, start=1):
            hidden = first(block(hidden, mask))
            logits = exit_logits(heads, number, hidden, tokens)
            if number == len(stack.layers):
                answers[rows] = logits
                break
            leaves = _entropy(logits) < _threshold(rule, number)
            answers[rows[leaves]], exit_layer[rows[leaves]] = logits[leaves], number
            alive = ~leaves
            hidden, tokens, rows = hidden[alive], tokens[alive], rows[alive]
            mask = None if mask is None else mask[alive]
            if not len(rows):
                break
        return answers, exit_layer

    return answer


#: Name -> builder.
BASELINES: dict[str, Builder] = {
    PLAIN: plain,
    "torch.compile": compiled,
    COMPILED_WHOLE: compiled_whole,
    ITEM_LOOP: item_loop,
    "mask loop": mask_loop,
    TRUNCATION: truncated,
    "ONNX Runtime": lambda subject, rule, layer: peers.onnx_runtime(subject),
    "OpenVINO": lambda subject, rule, layer: peers.openvino(subject),
}
#: What the suites take; the model compiled as a whole, which takes long, is for GPUs.
USUAL = tuple(name for name in BASELINES if name != COMPILED_WHOLE)


class _Padded:
    """The parts of a plain classifier's encoder, for a loop of one's own."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.layers = encoder, encoder.encoder.layer

    @classmethod
    def of(cls, classifier: Any) -> _Padded:
        return cls(getattr(classifier, "bert", None) or classifier.encoder)

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[N, S, H]`` and the family's own mask for sdpa."""
        hidden = self.encoder.embeddings(input_ids=batch["input_ids"])
        mask = create_bidirectional_mask(
            config=self.encoder.config, inputs_embeds=hidden, attention_mask=batch["attention_mask"]
        )
        return hidden, mask


def _in_float32(subject: Subject) -> Any:
    """The exits, cast once and not at every layer."""
    return copy.deepcopy(subject.model.heads).float()


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _threshold(rule: Criterion | None, layer: int) -> float:
    return 0.0 if rule is None else rule.params(layer)[0]
