"""Runs of pytest in processes forked from one that has imported torch and transformers, which takes longest.

Triton chooses at its import whether it interprets, so all runs of a process are of one kind, by TRITON_INTERPRET.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: Imported once; nothing of the project, which changes.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.testing", "torch.utils.data", "numpy", "pytest", "hypothesis"),
    *("transformers", "transformers.trainer", "transformers.masking_utils", "safetensors.torch", "tokenizers"),
    "sklearn.metrics",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("albert", "bert", "modernbert", "qwen3", "deberta_v2")
    ),
)
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(list(PRELOADED))


class Ended(NamedTuple):
    """How a run ended: its exit code, or None if it hung, its output and its duration."""

    code: int | None
    output: str
    seconds: float


def run_tests(folder: Path, environment: Mapping[str, str], arguments: Sequence[str], limit: float) -> Ended:
    """Run pytest in a folder, in a process group of its own, which ends with it.

    Args:
        folder: of the project.
        environment: variables besides those of this process.
        arguments: of pytest.
        limit: seconds.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as files:
        output = Path(files) / "output.txt"
        process = FORKED.Process(target=_pytest, args=(folder, {**environment, "TMPDIR": files}, arguments, output))
        process.start()
        process.join(limit)
        code = process.exitcode
        with suppress(ProcessLookupError, TypeError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        text = output.read_text(errors="replace") if output.is_file() else ""
        return Ended(code, text, time.monotonic() - started)


def _pytest(folder: Path, environment: Mapping[str, str], arguments: Sequence[str], output: Path) -> None:
    os.setsid()
    os.environ.update(environment)
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.dont_write_bytecode = True
    root = Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if path and Path(path) not in (root, root / "python_tests")]
    sys.path[:] = [str(folder), *others]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mutants", "python_tests")]:
        del sys.modules[name]
    tempfile.tempdir = None
    import pytest

    code = pytest.main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))
