"""A copy of the checkout, in which mutants are put, built and tested."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mutants.mutant import Mutant, arguments_of

MARKS = "not gpu and not thorough"
#: Exit codes of pytest: all tests passed, some failed, and it was ended, as by an error while it collected.
PASSED, FAILED, INTERRUPTED = 0, 1, 2
#: Seconds that a run may take beyond three times that of the tests without a mutant.
MARGIN = 60.0
#: Seconds that tests without a mutant may take, and a build.
LONGEST = 1200.0
FAILURE = re.compile(r"^(?:FAILED|ERROR) (?:python_tests/)?(\S+?)(?: - (.*))?$", re.MULTILINE)


class Outcome(NamedTuple):
    """How a run of tests ended.

    Attributes:
        result: ``"survived"``, ``"killed"`` or, where nothing was measured, ``"error"``.
        by: the first test that failed, or what else ended the run.
        seconds: that it took.
    """

    result: str
    by: str
    seconds: float


class Ended(NamedTuple):
    """How a command ended: its exit code, or None if it hung, its output and its duration."""

    code: int | None
    output: str
    seconds: float


class Scratch:
    """A copy of the checkout that stays between runs, so that only what changed is compiled.

    Args:
        root: the checkout.
        folder: of the copy.
    """

    def __init__(self, root: Path, folder: Path | None = None) -> None:
        self.root = root
        name = f"earlyexit-mutants-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
        self.folder = folder or Path(tempfile.gettempdir()) / name
        self._environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "EARLYEXIT_BUILD": "cpu",
            "PYTHONPATH": str(self.folder),
            # compiled files are compared by time and size, which a mutant may not change
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the copy.

        Raises:
            SystemExit: another run holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"mutants: another run uses {self.folder}; wait for it, or end it") from None
            yield

    def prepare(self) -> None:
        """Make the copy like the checkout, with an extension built from it.

        Raises:
            SystemExit: it cannot be built or imported.
        """
        names = self._git("ls-files", "-z", "-co", "--exclude-standard").split("\0")
        files = [Path(name) for name in names if name and (self.root / name).is_file()]
        digest = hashlib.sha256()
        for path in sorted(files):
            content = (self.root / path).read_bytes()
            digest.update(b"%s\0%s\0" % (str(path).encode(), content))
            copy = self.folder / path
            if not copy.is_file() or copy.read_bytes() != content:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
                shutil.copymode(self.root / path, copy)
        self._remove_others(set(files))
        self._digest = digest.hexdigest()
        self._build_clean()
        where = self._run([sys.executable, "-c", "import earlyexit_kernels as e; print(e.__file__)"], LONGEST, cwd="/")
        if not where.output.strip().startswith(str(self.folder)):
            raise SystemExit(f"mutants: expected the package of {self.folder}, got {where.output}")

    def _remove_others(self, files: set[Path]) -> None:
        """Remove files that the checkout does not have any more."""
        for top in ("csrc", "earlyexit_kernels", "python_tests", "benchmarks", "docs", "examples"):
            for path in (self.folder / top).rglob("*"):
                if path.is_file() and path.suffix != ".so" and path.relative_to(self.folder) not in files:
                    path.unlink()

    def commit(self) -> str:
        """Return the commit of the checkout, with ``+`` if code or tests have changed since."""
        changed = self._git("status", "--porcelain", "--", ":!python_tests/mutants")
        return self._git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def seconds_without_mutant(self, tests: str) -> Outcome:
        """Run covering tests without a mutant, or return what an earlier run of the same checkout measured."""
        path = self.folder.with_suffix(".json")
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("digest") != self._digest:
            known = {"digest": self._digest, "seconds": {}}
        if tests in known["seconds"]:
            return Outcome("survived", "", known["seconds"][tests])
        outcome = self._test(tests, LONGEST)
        if outcome.result == "survived":
            known["seconds"][tests] = outcome.seconds
            path.write_text(json.dumps(known))
        return outcome

    def outcome(self, mutant: Mutant, expected_seconds: float) -> Outcome:
        """Put a mutant in, run its tests, and take it out."""
        path = self.folder / mutant.file
        original = path.read_text()
        try:
            path.write_text(mutant.applied(original))
            if mutant.is_native and (error := self._build()):
                return Outcome("error", f"does not compile: {error}", 0.0)
            return self._test(mutant.tests, 3 * expected_seconds + MARGIN)
        finally:
            path.write_text(original)
            if mutant.is_native:
                self._restore_clean()

    def _build(self) -> str:
        """Build the extension; return the error or ``""``."""
        ended = self._run([sys.executable, "setup.py", "build_ext", "--inplace", "--force"], LONGEST)
        if ended.code == 0:
            return ""
        return next((line for line in ended.output.splitlines() if "error" in line), f"exit code {ended.code}")

    def _libraries(self) -> list[Path]:
        return sorted((self.folder / "earlyexit_kernels").glob("_C*.so"))

    def _build_clean(self) -> None:
        clean, stamp = self.folder / "build" / "clean", self.folder / "build" / "clean" / "stamp"
        sources = sorted((self.folder / "csrc").rglob("*"))
        state = hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.is_file())).hexdigest()
        if not stamp.is_file() or stamp.read_text() != state:
            print("building the extension", flush=True)
            if error := self._build():
                raise SystemExit(f"mutants: the extension does not compile: {error}")
            clean.mkdir(parents=True, exist_ok=True)
            for library in self._libraries():
                shutil.copyfile(library, clean / library.name)
            stamp.write_text(state)
        self._restore_clean()

    def _restore_clean(self) -> None:
        """Put back the library that was built without a mutant."""
        for library in (self.folder / "build" / "clean").glob("_C*.so"):
            place = self.folder / "earlyexit_kernels" / library.name
            place.unlink(missing_ok=True)
            shutil.copyfile(library, place)

    def _test(self, tests: str, limit: float) -> Outcome:
        interpreted, arguments = arguments_of(tests)
        marks = f"{'triton' if interpreted else 'not triton'} and {MARKS}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
        more = {"TRITON_INTERPRET": "1"} if interpreted else {}
        ended = self._run([*command, "-m", marks, *arguments], limit, **more)
        failure = FAILURE.search(ended.output)
        by = failure.group(1) if failure else ""
        if ended.code is None:
            return Outcome("killed", f"hangs for {limit:.0f} s", ended.seconds)
        if ended.code == PASSED:
            return Outcome("survived", "", ended.seconds)
        if ended.code == FAILED or (ended.code == INTERRUPTED and by):
            return Outcome("killed", by or "a test", ended.seconds)
        if ended.code < 0 or ended.code >= 128:
            return Outcome("killed", f"crash: {signal.Signals(abs(ended.code) % 128).name}", ended.seconds)
        last = ended.output.strip().splitlines()[-1:] or ["no output"]
        return Outcome("error", f"pytest ended with {ended.code}: {last[0]}", ended.seconds)

    def _run(self, command: Sequence[str], limit: float, cwd: str | None = None, **more: str) -> Ended:
        """Run a command in the copy, in a process group of its own, which ends with it."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as files, tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd or self.folder,
                env={**self._environment, "TMPDIR": files, **more},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return Ended(code, output.read(), time.monotonic() - started)
