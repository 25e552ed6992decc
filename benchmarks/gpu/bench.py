"""What the sections measure with: a device, sizes, a clock that the host can't disturb, and graphs of a few calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.end_to_end.models import DTYPES, NotMeasuredError
from earlyexit_kernels.backends import NAMESPACE, available_backends
from earlyexit_kernels.tuning.timing import interleave, paired_ratio, quantiles

Record: TypeAlias = dict[str, Any]
Call: TypeAlias = Callable[[], Any]
#: Bytes written before a timing, over those of the L2 cache: the host has to launch the call before they are.
FLUSHES = 16


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured; the tests make a small one, of the CPU and a stand-in for `torch.cuda`.

    Attributes:
        device: kind of device.
        encoder, exits: back-ends of the encoder's ops and of the exits.
        batches, length, width: B, S and H.
        dtypes: names of `models.DTYPES`.
        copies: of an input, each with a call of its own in one timing.
        nodes: of a graph that tells the price of one.
        products: tokens of the matrix products.
        shapes: rows and length of the batches that the engines meet in.
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
    shapes: tuple[tuple[int, int], ...] = ((1, 32), (1, 128), (4, 128), (16, 128), (64, 128), (256, 128), (512, 128))
    rounds: int = 50
    warmup: int = 5

    @classmethod
    def here(cls) -> Bench:
        """Of this machine's GPU.

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
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(DTYPES[dtype])

    def ints(self, values: Sequence[int] | range) -> Tensor:
        """Int32 numbers on the device."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def graph_of(self, calls: Sequence[Call]) -> Call:
        """What launches a CUDA graph of some calls, after a warm-up."""
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

    def conditional_graph(self, record: Callable[[Any], None], warm_up: Call = lambda: None) -> Call:
        """What launches a graph with IF nodes.

        Args:
            record: given the graph while the stream captures, for its handles and nodes.
            warm_up: launches the same on that stream, without nodes; the libraries keep their workspaces by stream.

        Raises:
            NotMeasuredError: the extension lacks the class.
        """
        if reason := available_backends("cuda")["cpp"]:
            raise NotMeasuredError(f"no graphs with IF nodes: {reason}")
        graph = getattr(torch.classes, NAMESPACE).ConditionalGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
            stream.synchronize()
            try:
                graph.begin(torch.cuda.current_device(), *torch.cuda.graph_pool_handle())
                record(graph)
                graph.end()
            except BaseException:
                graph.abandon()
                raise
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def by_events(self, call: Call) -> float:
        """Milliseconds of a call on the device, queued behind a flush of its L2 cache, which hides the host's part."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _filler(self.device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def times(
        self, ways: Mapping[str, Call], *, restore: Call = lambda: None, by_host: bool = False
    ) -> dict[str, list[float]]:
        """Milliseconds of each round, ways taking turns.

        Args:
            ways: name -> what is timed.
            restore: called before each of them, untimed.
            by_host: by the wall clock between synchronisations, what the host takes to launch included.
        """
        return interleave(
            ways,
            repeats=self.rounds,
            warmup=self.warmup,
            sync=torch.cuda.synchronize,
            prepare=lambda name: restore(),
            clock=None if by_host else self.by_events,
        )


@functools.cache
def _filler(device: str) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(FLUSHES * size, dtype=torch.int8, device=device)


def middle(times: Sequence[float], calls: int = 1) -> Record:
    """The numbers of one way by itself, in microseconds of one of the calls in a timing."""
    low, median, high = (1000 * value / calls for value in quantiles(times))
    return {
        "rounds": len(times),
        "median_us": round(median, 3),
        "low_us": round(low, 3),
        "high_us": round(high, 3),
        "median_ms": round(median / 1000, 6),
    }


def beside(times: Sequence[float], baseline: Sequence[float], name: str) -> Record:
    """A way's times over those of another, from rounds in which both ran."""
    ratio = paired_ratio(times, baseline)
    return {
        "baseline": name,
        "ratio": round(ratio.median, 4),
        "ratio_low": round(ratio.low, 4),
        "ratio_high": round(ratio.high, 4),
    }


def head(suite: str, case: str, way: str, *, shape: str = "", dtype: str = "", backend: str = "") -> Record:
    """The fields by which a record is known."""
    known = {"suite": suite, "case": case, "shape": shape, "dtype": dtype}
    return {**known, "engine": way, "backend": backend, "baseline": ""}
