"""Random batches through the graph engine of a small model, for compute-sanitizer.

    python -m benchmarks.gpu.replays --replays 1000
    python -m benchmarks.gpu.replays --replays 20 --launched    # the same loop launched by the host, without a graph

Some answers are compared with a trace on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import BertConfig

from benchmarks.end_to_end.answers import Truth, check_answers
from benchmarks.end_to_end.engines import GRAPH, engine_model
from benchmarks.end_to_end.forced import entropy_per_exit
from benchmarks.end_to_end.models import CLASSES, Model, Subject, random_subject
from benchmarks.end_to_end.workloads import padded
from benchmarks.machine import device
from earlyexit_kernels.backends import resolve
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import ResidentLoop

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SMALL = {"vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.15}
MAX_ROWS, LONGEST = 16, 48
#: An answer in so many is checked, and may be so far off float32 on the CPU.
EVERY, ROUNDING = 25, 2e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, and print how many answers were checked; return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--launched", action="store_true", help="without a graph: the host launches each kernel")
    args = parser.parse_args(arguments)
    with torch.inference_mode():
        checked, wrong = replay(args.replays, launched=args.launched)
    by = resolve("auto", device())
    print(f"{args.replays} replays by {by}, {checked} batches checked, {len(wrong)} wrong {' '.join(wrong[:5])}")
    return 1 if wrong else 0


def replay(replays: int, *, launched: bool = False) -> tuple[int, list[str]]:
    """Run batches; return how many answers were checked, and what is wrong with them."""
    subject = random_subject("small", BertConfig(num_labels=CLASSES, **SIZES, **SMALL))
    rule = _rule(subject)
    model = engine_model(subject, GRAPH)
    model.set_criterion(rule)
    on_cpu = copy.deepcopy(subject.model).cpu()
    on_cpu.set_engine("eager")
    loop = _loop(model) if launched else None
    checked, wrong, layers = 0, [], set[int]()
    for number, batch in enumerate(_batches(replays)):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if loop is None:
            out = model(**batch)
            logits, exits = out.logits, out.exit_layer
        else:
            loop.load(Inputs(ids, mask))
            loop.launch()
            logits, exits = loop.answers[: len(ids)], loop.exit_layer[: len(ids)]
        if number % EVERY and number != replays - 1:
            continue
        checked += 1
        layers |= set(exits.tolist())
        trace = on_cpu.trace(**{name: x.cpu() for name, x in batch.items()})
        truth = Truth(trace, trace.logits[:, -1], ROUNDING, ROUNDING)
        refused = check_answers([truth], [(logits.cpu(), exits.cpu())], rule).wrong
        wrong += [f"batch {number}: {refused};"] * bool(refused)
    if len(layers) < 2:
        wrong.append(f"all rows left at {layers}, expected several layers")
    return checked, wrong


def _loop(model: Model) -> ResidentLoop:
    kind = device()
    return ResidentLoop(
        model.view(), bucket_of(MAX_ROWS, LONGEST), resolve("auto", kind, ("triton", "torch")), model.backend
    )


def _rule(subject: Subject) -> Entropy:
    """Return thresholds between two entropies, which a third of the live rows are below at every exit."""
    (batch,) = _batches(1, rows=MAX_ROWS)
    entropy = entropy_per_exit(subject.model.trace(**batch).logits).sort(dim=0).values
    third = len(entropy) // 3
    return Entropy(threshold=entropy[third - 1 : third + 1, :-1].mean(dim=0).tolist())


def _batches(number: int, rows: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield seeded batches of random sizes and lengths, or of so many rows."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(number):
        lengths = [draw(1, LONGEST) for _ in range(rows or draw(1, MAX_ROWS))]
        ids = [torch.randint(1, SMALL["vocab_size"], (n,), generator=generator) for n in lengths]
        yield padded([row.to(device()) for row in ids])


if __name__ == "__main__":
    sys.exit(main())
