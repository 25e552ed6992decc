"""Launches and synchronisations of the host while something runs, counted in a profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

#: Calls that put work on the device.
LAUNCHES = frozenset(
    "cudaLaunchKernel cudaLaunchKernelExC cuLaunchKernel cuLaunchKernelEx cudaLaunchCooperativeKernel cudaGraphLaunch "
    "cudaMemsetAsync cudaMemcpyAsync cudaMemset cudaMemcpy".split()
)
#: Calls that wait for all of its work, and for what is before an event.
SYNCHRONISATIONS = frozenset(
    "cudaStreamSynchronize cudaDeviceSynchronize cuStreamSynchronize cuCtxSynchronize cudaMemcpy cudaMemcpy2D "
    "cudaFree".split()
)
EVENT_WAITS = frozenset({"cudaEventSynchronize", "cuEventSynchronize"})
RANGE = "counted"


def calls_of(run: Callable[[], Any]) -> Counter[str]:
    """Return name of each call into the CUDA runtime or driver within `run` -> how often."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        torch.cuda.synchronize()
        with record_function(RANGE):
            run()
        torch.cuda.synchronize()
    return within(profiled.events())


def within(events: Any) -> Counter[str]:
    """Count the host's events inside the range by name; the profiler itself synchronises before and after it."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in on_host if event.name == RANGE]
    return Counter(
        event.name
        for event in on_host
        if event.name.startswith("cu") and span.start <= event.time_range.start and event.time_range.end <= span.end
    )


def miscounted(device: str) -> str:
    """Return why these counts are not reliable here, or an empty string; tries a program whose counts are known."""
    one = torch.ones(1, device=device)
    one.add_(1)
    counted = calls_of(lambda: one.add_(1).item())
    if launches(counted) and synchronisations(counted):
        return ""
    return f"the profiler does not show the launch and the synchronisation of a small program, but {dict(counted)}"


def launches(counted: Counter[str]) -> int:
    """Return the number of kernels, copies and fills."""
    return sum(counted[name] for name in LAUNCHES)


def synchronisations(counted: Counter[str]) -> int:
    """Return how often the host waited for all work of the device."""
    return sum(counted[name] for name in SYNCHRONISATIONS)


def event_waits(counted: Counter[str]) -> int:
    """Return how often the host waited for an event, as for the counts of an exit."""
    return sum(counted[name] for name in EVENT_WAITS)
