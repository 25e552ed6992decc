"""Cost of conditional nodes and of empty launches in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.bench import Bench, header, micros
from benchmarks.harness import Call, Record
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.engine.capturing import available_nodes
from earlyexit_kernels.engine.resident import Nodes
from earlyexit_kernels.ops import bare_op, rows_add_norm, rows_attention, rows_linear
from earlyexit_kernels.ops.resident_exit import COUNTS

NODES, EMPTY = "gpu_nodes", "gpu_empty_launches"
HEADS = 12


class Setter:
    """An exit of one row that never leaves; it opens a node."""

    def __init__(self, bench: Bench) -> None:
        self.exit, self.rule = bare_op("resident_exit", bench.exits, bench.device), Entropy(threshold=0.0)
        self.logits = bench.random(1, 3)
        self.row_ids, self.offsets = bench.ints([0]), bench.ints([0, 1])
        self.old_offsets, self.source, self.counts = bench.ints([0, 0]), bench.ints([0]), bench.ints([0] * COUNTS)
        self.state = self.rule.new_state(1, self.logits.device, 3)
        self.answers = torch.zeros_like(self.logits)
        self.exit_layer = torch.zeros(1, dtype=torch.int64, device=self.logits.device)

    def __call__(self, handle: int | None = None) -> None:
        self.exit(
            None, None, None, self.logits, None, self.row_ids, self.offsets, self.old_offsets, self.source,
            self.counts, self.state, self.answers, self.exit_layer, self.rule.name, self.rule.params(1), "none", 1, 2,
            1, 1, handle,
        )  # fmt: skip


def node_records(bench: Bench) -> Iterator[Record]:
    """Yield the time of a skipped IF node, and of a taken one over the same launches without nodes.

    The records say whether the nodes are those of the extension or of torch.

    Raises:
        NotMeasuredError: graphs with IF nodes are not supported here.
    """
    setter, ran = Setter(bench), torch.zeros(1, dtype=torch.int64, device=bench.device)
    unset = torch.zeros_like(setter.counts)

    def step() -> None:
        ran.add_(1)

    def skipped(nodes: Nodes) -> None:
        for handle in [nodes.handle() for _ in range(bench.nodes)]:
            nodes.when(handle, unset, step)

    def taken(nodes: Nodes) -> None:
        for handle in [nodes.handle() for _ in range(bench.nodes)]:
            setter(handle)
            nodes.when(handle, setter.counts, step)

    plain = bench.graph_of([setter, step] * bench.nodes)
    ways = {"no nodes": plain, "taken": bench.conditional_graph(taken), "skipped": bench.conditional_graph(skipped)}
    node = f"IF node of {available_nodes(bench.exits).name}"
    for name, runs in (("taken", bench.nodes), ("skipped", 0)):
        ran.zero_()
        ways[name]()
        if int(ran) != runs:
            yield header(NODES, name, node) | {"refused": f"{int(ran)} bodies of {bench.nodes} ran, expected {runs}"}
            return
    times = bench.times(ways)
    extra = [a - b for a, b in zip(times["taken"], times["no nodes"], strict=True)]
    yield header(NODES, "taken, over the same launches", node) | micros(extra, bench.nodes)
    yield header(NODES, "skipped", node) | micros(times["skipped"], bench.nodes)
    yield header(NODES, "exit and a small kernel", "no nodes") | micros(times["no nodes"], bench.nodes)


def empty_records(bench: Bench) -> Iterator[Record]:
    """Yield the time of each encoder kernel in a graph when no token is live."""
    rows, width, dtype = max(bench.batches), bench.width, bench.dtypes[0]
    tokens = rows * bench.length
    nobody, none = bench.ints([-1] * rows), bench.ints([0] * (rows + 1))
    weight, norm = bench.random(width, width, dtype=dtype), bench.random(width, dtype=dtype)
    x, out, qkv = (weight.new_zeros(tokens, size) for size in (width, width, 3 * width))
    run = {"backend": bench.encoder}
    launches: dict[str, Call] = {
        "rows_linear": lambda: rows_linear(x, weight, norm, none, out, **run),
        "rows_attention": lambda: rows_attention(qkv, none, nobody, HEADS, bench.length, out, **run),
        "rows_add_norm": lambda: rows_add_norm(x, out, norm, norm, 1e-5, none, out, **run),
    }
    times = bench.times({name: bench.graph_of([call] * bench.nodes) for name, call in launches.items()})
    for name, found in times.items():
        fields = {"shape": f"T {tokens}, H {width}", "dtype": dtype, "backend": bench.encoder}
        yield header(EMPTY, "no token present", name, **fields) | micros(found, bench.nodes)
