"""The tools of the GPU sections: a device, sizes, and two clocks, of the device and of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import Call, Record, Variant, do_nothing, ratio_fields, record_header, time_fields
from benchmarks.machine import NotMeasuredError, l2_filler
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.tuning.timing import interleave

#: Model whose costs and times are measured.
SUBJECT = "BERT-base"
#: Cycles for which the device waits before a timing, about half a millisecond, while the host launches the calls.
PAUSE_CYCLES = 1_000_000


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured; the tests make a small one for the CPU, with stand-ins for `torch.cuda`.

    Attributes:
        device: kind of device.
        backend: of the exits.
        batches, length, width: B, S and H.
        dtypes: names of `DTYPES`.
        copies: of an input; each has a call of its own in one timing.
        rounds, warmup: timed and untimed.
        mixed: batches of random sizes, by which captures are counted.
    """

    device: str
    backend: str
    batches: tuple[int, ...] = (1, 32, 128)
    length: int = 128
    width: int = 768
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    copies: int = 20
    rounds: int = 50
    warmup: int = 5
    mixed: int = 60

    @classmethod
    def here(cls) -> Bench:
        """Return the bench of this machine's GPU.

        Raises:
            NotMeasuredError: there is none, or no back-end runs on it.
        """
        if not torch.cuda.is_available():
            raise NotMeasuredError("torch sees no CUDA device")
        reasons = available_backends("cuda")
        backend = next((name for name in ("cpp", "triton") if not reasons[name]), None)
        if backend is None:
            raise NotMeasuredError(f"cpp: {reasons['cpp']}; triton: {reasons['triton']}")
        return cls("cuda", backend)

    def by_events(self, call: Call) -> float:
        """Return the milliseconds of a call on the device, queued behind a flush of its L2 cache and a pause."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        l2_filler(self.device).zero_()
        torch.cuda._sleep(PAUSE_CYCLES)
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
    fields = time_fields(times, calls)
    return fields | {f"{name}_us": round(1000 * fields[f"{name}_ms"], 3) for name in ("median", "low", "high")}


def over(times: Sequence[float], baseline: Sequence[float], name: str) -> Record:
    """Return the ratio to a baseline, from rounds in which both ran, and the baseline's name."""
    return {"baseline": name, **ratio_fields(times, baseline)}
