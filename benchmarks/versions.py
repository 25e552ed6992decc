"""Another version of the package: check it out, build it, and import it beside this version's benchmarks.

Imports nothing of the package, since the processes that run older versions import this module.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "earlyexit_kernels"
LIBRARY = f"{PACKAGE}/_C*.so"


@contextlib.contextmanager
def checked_out(ref: str, folder: str) -> Iterator[Path]:
    """Return a worktree of a ref with its extension built; it is removed afterwards."""
    tree = Path(folder) / "tree"
    added = subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), ref])
    if added.returncode != 0:
        raise SystemExit(f"expected a git ref of this repository, got {ref!r}")
    try:
        if (tree / "setup.py").is_file():
            print(f"building the extension of {ref}", flush=True)
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            built = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            # a build of what compiles may be one without an extension
            lacking = any(ROOT.glob(LIBRARY)) and not any(tree.glob(LIBRARY))
            if built.returncode != 0 or lacking:
                raise RuntimeError(f"building the extension of {ref} failed:\n{built.stdout}\n{built.stderr}")
        yield tree
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def linked(package: Path, folder: Path) -> dict[str, str]:
    """Put a version's package beside this version's benchmarks, and return the environment that imports them.

    Args:
        package: folder that holds ``earlyexit_kernels``.
        folder: to run in; made here if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in ((PACKAGE, package), ("benchmarks", ROOT)):
        (folder / name).symlink_to((place / name).resolve())
    return {**os.environ, "PYTHONPATH": str(folder)}


def check_imported(package: Path, imported: str) -> None:
    """Raise RuntimeError unless a process imported the package in this folder."""
    if Path(imported) != (package / PACKAGE).resolve():
        raise RuntimeError(f"expected the package in {package}, the process imported {imported}")
