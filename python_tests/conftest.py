"""Fixtures of all tests, and the count of decisions that differ within rounding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels.backends import TRITON_INTERPRETED

# test processes run in parallel, and more threads than cores would slow them down
torch.set_num_threads(1)

pytest_plugins = tuple(
    f"support.{name}"
    for name in (
        "fake_gpu",
        "replays",
        "ordered_products",
        "other_device",
        "profiles",
        "small_models",
    )
)

FLIPS = "decision flips"
#: Status of a test process that ends because its device does not work any more.
DEVICE_LOST = 70


def pytest_configure(config) -> None:
    # the interpreter computes with numpy, which warns about NaN
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy._core.fromnumeric")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Mark the cases that a `sample` leaves out as thorough, before `-m` selects by marks."""
    cases: Counter[tuple[str, ...]] = Counter()
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is not None:
            # cases under the interpreter are a set of their own, since they run in another process
            test = item.location[0], item.originalname, str(item.get_closest_marker("triton"))
            if cases[test] % marker.args[0]:
                item.add_marker("thorough")
            cases[test] += 1


@pytest.fixture(params=backend_params())
def backend(request) -> str:
    """Name of a back-end; tests with this fixture run on each."""
    return request.param


@pytest.fixture
def thread_counts() -> Iterator[Iterator[int]]:
    """Give 1, 2 and 3, each when torch runs in as many threads."""

    def counts() -> Iterator[int]:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count

    yield counts()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Restore denormals, which commands and benchmarks flush to zero; other tests depend on them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def count_flips(record_property):
    """Return ``count_flips(flips, rows)``, which records the decisions of a test that differ within tolerance."""
    return lambda flips, rows: record_property(FLIPS, (int(flips), int(rows)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """End the process after a failure that has broken the device: all later tests of this process would fail."""
    outcome = yield
    if outcome.get_result().failed and item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(DEVICE_LOST)  # pytest-xdist names the test, and starts another process


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"]
    counted = [value for r in reports for name, value in r.user_properties if name == FLIPS]
    if counted:
        flips, rows = (sum(column) for column in zip(*counted, strict=True))
        terminalreporter.write_line(f"decision flips within tolerance: {flips} of {rows} rows")


def pytest_sessionfinish(session, exitstatus) -> None:
    """Add a line on what ran where to the file that `make test` prints at its end."""
    path = os.environ.get("EARLYEXIT_TEST_SUMMARY")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if path is None or reporter is None or hasattr(session.config, "workerinput"):
        return
    counts = {kind: len(reporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    if TRITON_INTERPRETED:
        where += ", Triton's interpreter"
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    with open(path, "a") as file:
        file.write(f"{told or 'no tests'} on {where}\n")


@pytest.fixture(scope="session")
def traces() -> Path:
    """Folder of stored exit logits in EARLYEXIT_DATA."""
    root = os.environ.get("EARLYEXIT_DATA")
    if not root:
        pytest.skip("EARLYEXIT_DATA is not set; it names a folder with traces/*.npz")
    folder = Path(root) / "traces"
    if not folder.is_dir():
        pytest.skip(f"EARLYEXIT_DATA: there is no folder {folder}")
    return folder
