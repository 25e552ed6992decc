"""The tools of the GPU sections: a device, sizes, a clock that the host does not disturb, and CUDA graphs of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Call, Record, Variant, do_nothing, ratio_fields, record_header, time_fields
from benchmarks.machine import DTYPES, NotMeasuredError, l2_filler
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.engine.capturing import available_nodes, record
from earlyexit_kernels.engine.resident import Nodes
from earlyexit_kernels.tuning.timing import interleave


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured; the tests make a small one for the CPU, with stand-ins for `torch.cuda`.

    Attributes:
        device: kind of device.
        encoder, exits: back-ends of the encoder's ops and of the exits.
        batches, length, width: B, S and H.
        dtypes: names of `DTYPES`.
        copies: of an input; each has a call of its own in one timing.
        nodes: of a graph that measures the cost of one.
        products: tokens of the matrix products.
        tiled: tokens of those that are computed in tiles of all sizes.
        shapes: rows and length of the batches on which the engines are compared.
        rounds, warmup: timed and untimed.
    """

    device: str
    encoder: str
    exits: str
    batches: tuple[int, ...] = (1, 32, 128)
    length: int = 128
    width: int = 768
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    copies: int = 20
    nodes: int = 100
    products: tuple[int, ...] = (128, 512, 2048, 8192, 32768, 65536)
    tiled: tuple[int, ...] = (128, 1024, 4096, 16384)
    shapes: tuple[tuple[int, int], ...] = ((1, 32), (1, 128), (4, 128), (16, 128), (64, 128), (256, 128), (512, 128))
    rounds: int = 50
    warmup: int = 5

    @classmethod
    def here(cls) -> Bench:
        """Return the bench of this machine's GPU.

        Raises:
            NotMeasuredError: there is none, or no back-end runs on it.
        """
        if not torch.cuda.is_available():
            raise NotMeasuredError("torch sees no CUDA device")
        reasons = available_backends("cuda")
        if reasons["triton"]:
            raise NotMeasuredError(reasons["triton"])
        return cls("cuda", "triton", "triton" if reasons["cpp"] else "cpp")

    def random(self, *shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
        """Return normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(DTYPES[dtype])

    def ints(self, values: Sequence[int] | range) -> Tensor:
        """Return int32 numbers on the device."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def graph_of(self, calls: Sequence[Call]) -> Call:
        """Capture some calls in a CUDA graph after a warm-up; return what launches it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for call in calls:
                call()
        return graph.replay

    def conditional_graph(self, launch: Callable[[Nodes | None], None], warm_up: Call = do_nothing) -> Call:
        """Capture a graph with IF nodes, those that the exits of this bench set; return what replays it.

        Args:
            launch: called with the nodes while the stream captures.
            warm_up: launches the same on that stream, without nodes; the libraries keep their workspaces by stream.

        Raises:
            NotMeasuredError: there are no nodes.
        """
        nodes = available_nodes(self.exits)
        if nodes.name == "none":
            raise NotMeasuredError(f"no graphs with IF nodes: {nodes.reason}")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
            stream.synchronize()
            replay = record(nodes.name, launch, stream)
        torch.cuda.current_stream().wait_stream(stream)
        return replay

    def by_events(self, call: Call) -> float:
        """Return the milliseconds of a call on the device, queued behind a flush of its L2 cache."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        l2_filler(self.device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def times(
        self, variants: Mapping[str, Call], *, restore: Call = do_nothing, by_host: bool = False
    ) -> dict[str, list[float]]:
        """Return the milliseconds of each round of named calls, which take turns.

        Args:
            variants: name -> what is timed.
            restore: called before each of them, untimed.
            by_host: by the wall clock between synchronisations, which includes the host's launches.
        """
        return interleave(
            variants,
            repeats=self.rounds,
            warmup=self.warmup,
            sync=torch.cuda.synchronize,
            prepare=lambda name: restore(),
            clock=None if by_host else self.by_events,
        )


def header(suite: str, case: str, engine: str, *, shape: str = "", dtype: str = "", backend: str = "") -> Record:
    """Return the fields that identify a record."""
    return record_header(suite, case, Variant(engine, backend, dtype), shape=shape)


def micros(times: Sequence[float], calls: int = 1) -> Record:
    """Return the quantiles of a call's time, in milliseconds and as ``median_us``, ``low_us`` and ``high_us``."""
    found = time_fields(times, calls)
    return found | {f"{name}_us": round(1000 * found[f"{name}_ms"], 3) for name in ("median", "low", "high")}


def over(times: Sequence[float], baseline: Sequence[float], name: str) -> Record:
    """Return the ratio to a baseline, from rounds in which both ran, and the baseline's name."""
    return {"baseline": name, **ratio_fields(times, baseline)}
