"""A plugin of pytest that fails a run whose extension is not the one with sanitizers (see `deep.sanitize`)."""

from __future__ import annotations

from pathlib import Path


def check() -> None:
    """Raise if this process has imported another extension, or has no sanitizers."""
    from earlyexit_kernels import _C

    maps = Path("/proc/self/maps").read_text()
    if "/sanitize/" not in _C.__file__ or "libasan" not in maps or "libubsan" not in maps:
        raise RuntimeError(f"expected the extension with sanitizers, got {_C.__file__}")


def pytest_collection_finish(session) -> None:
    check()
