"""What the host asks of the driver while something runs: launches and synchronisations, counted in a profile."""

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
#: Calls that wait for it.
SYNCHRONISATIONS = frozenset(
    "cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize cuStreamSynchronize cuCtxSynchronize "
    "cuEventSynchronize cudaMemcpy cudaMemcpy2D cudaFree".split()
)
RANGE = "counted"


def calls_of(run: Callable[[], Any]) -> Counter[str]:
    """Name of each call into the CUDA runtime or driver within `run` -> how often."""
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
    """The events of the host that lie in the range, by name: the profiler itself synchronises before and after."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in on_host if event.name == RANGE]
    return Counter(
        event.name
        for event in on_host
        if event.name.startswith("cu") and span.start <= event.time_range.start and event.time_range.end <= span.end
    )


def miscounted(device: str) -> str:
    """Why these counts aren't to be trusted here, or empty, by a small program whose counts are known."""
    one = torch.ones(1, device=device)
    one.add_(1)
    counted = calls_of(lambda: one.add_(1).item())
    if launches(counted) and synchronisations(counted):
        return ""
    return f"the profiler doesn't show the launch and the synchronisation of a small program, but {dict(counted)}"


def launches(counted: Counter[str]) -> int:
    """Kernels, copies and fills."""
    return sum(counted[name] for name in LAUNCHES)


def synchronisations(counted: Counter[str]) -> int:
    """Times that the host waited for the device."""
    return sum(counted[name] for name in SYNCHRONISATIONS)
