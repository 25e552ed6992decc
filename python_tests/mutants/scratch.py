"""A copy of the last commit, in which mutants are put, built and tested."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mutants.forked import run_tests
from mutants.mutant import Mutant, arguments_of

MARKS = "not gpu and not thorough"
#: Exit codes of pytest: all tests passed, some failed, and it was ended, as by an error while it collected.
PASSED, FAILED, INTERRUPTED = 0, 1, 2
#: Until the first failure, which is the first option, in one process.
OPTIONS = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (?:python_tests/)?(.+?)(?: - .*)?$", re.MULTILINE)
#: A test that is not there, without its parameters.
MISSING = re.compile(r"^ERROR: (?:file or directory )?not found: .*?python_tests/([^\[\s]+)", re.MULTILINE)
#: Part of the last line of pytest where a test ran.
RAN = re.compile(r"\b\d+ passed\b")
#: Whether Triton interprets in this process and in those that run its tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


class Scratch:
    """A copy of the last commit that stays between runs, so that only what changed is compiled.

    Args:
        root: the checkout.
        limit: seconds after which tests count as hanging.
        folder: of the copy; default: one in the temporary folder.
    """

    def __init__(self, root: Path, limit: float, folder: Path | None = None) -> None:
        self.root, self.limit = root, limit
        name = f"earlyexit-mutants-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
        self.folder = folder or Path(tempfile.gettempdir()) / name
        self._marks = f"{'triton' if INTERPRETED else 'not triton'} and {MARKS}"
        self._environment = {
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

    def prepare(self) -> str:
        """Make the copy like the last commit of the checkout, with an extension built from it; return the commit.

        Raises:
            SystemExit: it cannot be built or imported.
        """
        if not (self.folder / ".git").is_dir():
            self._git("init", "-q")
        self._git("fetch", "-q", str(self.root), "HEAD")
        self._git("checkout", "-q", "--force", "--detach", "FETCH_HEAD")
        self._git("clean", "-fdq")
        self._build_clean()
        _, where = self._run([sys.executable, "-c", "import earlyexit_kernels as e; print(e.__file__)"], cwd="/")
        if not where.strip().startswith(str(self.folder)):
            raise SystemExit(f"mutants: expected the package of {self.folder}, got {where}")
        return self._git("rev-parse", "--short", "HEAD")

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def failures_without_mutant(self, tests: Sequence[str]) -> set[str]:
        """Run tests, by their names in the outcomes, without a mutant; return those that fail or are gone.

        Raises:
            SystemExit: they cannot be run.
        """
        if not tests:
            return set()
        arguments = [*OPTIONS[1:], "-m", self._marks, *(f"python_tests/{test}" for test in tests)]
        ended = run_tests(self.folder, self._environment, arguments, self.limit)
        if missing := set(MISSING.findall(ended.output)):
            gone = {test for test in tests if test.partition("[")[0] in missing}
            return gone | self.failures_without_mutant([test for test in tests if test not in gone])
        if ended.code not in (PASSED, FAILED):
            raise SystemExit(f"mutants: the tests that notice mutants cannot be run without one:\n{ended.output}")
        return set(FAILURE.findall(ended.output))

    def outcome(self, mutant: Mutant, first: str = "") -> Outcome:
        """Put a mutant in, run its tests, and take it out.

        Args:
            mutant: to measure.
            first: the test that noticed it before. Only where it does not now, the others run.
        """
        path = self.folder / mutant.file
        original = path.read_text()
        try:
            path.write_text(mutant.applied(original))
            if mutant.is_native and (error := self._build()):
                return Outcome("error", f"does not compile: {error}", 0.0)
            if first and (outcome := self._test([f"python_tests/{first}"])).result == "killed":
                return outcome
            return self._test(arguments_of(mutant.tests))
        finally:
            path.write_text(original)
            if mutant.is_native:
                self._restore_clean()

    def _build(self) -> str:
        """Build the extension; return the error or ``""``."""
        code, output = self._run([sys.executable, "setup.py", "build_ext", "--inplace", "--force"])
        return next((line for line in output.splitlines() if "error" in line), f"exit code {code}") if code else ""

    def _build_clean(self) -> None:
        clean, stamp = self.folder / "build" / "clean", self.folder / "build" / "clean" / "stamp"
        state = self._git("rev-parse", "HEAD:csrc")
        if not stamp.is_file() or stamp.read_text() != state:
            print("building the extension", flush=True)
            if error := self._build():
                raise SystemExit(f"mutants: the extension does not compile: {error}")
            clean.mkdir(parents=True, exist_ok=True)
            for library in (self.folder / "earlyexit_kernels").glob("_C*.so"):
                shutil.copyfile(library, clean / library.name)
            stamp.write_text(state)
        self._restore_clean()

    def _restore_clean(self) -> None:
        """Put back the library that was built without a mutant."""
        for library in (self.folder / "build" / "clean").glob("_C*.so"):
            place = self.folder / "earlyexit_kernels" / library.name
            place.unlink(missing_ok=True)
            shutil.copyfile(library, place)

    def _test(self, tests: Sequence[str]) -> Outcome:
        """Run tests until the first failure."""
        ended = run_tests(self.folder, self._environment, [*OPTIONS, "-m", self._marks, *tests], self.limit)
        failure = FAILURE.search(ended.output)
        by = failure.group(1) if failure else ""
        if ended.code is None:
            return Outcome("killed", f"hangs for {self.limit:g} s", ended.seconds)
        if ended.code == PASSED and RAN.search(ended.output):
            return Outcome("survived", "", ended.seconds)
        if ended.code == FAILED or (ended.code == INTERRUPTED and by):
            return Outcome("killed", by or "a test", ended.seconds)
        if ended.code < 0 or ended.code >= 128:
            return Outcome("killed", f"crash: {signal.Signals(abs(ended.code) % 128).name}", ended.seconds)
        last = ended.output.strip().splitlines()[-1:] or ["no output"]
        return Outcome("error", f"pytest ended with {ended.code}: {last[0]}", ended.seconds)

    def _run(self, command: Sequence[str], cwd: str | None = None) -> tuple[int, str]:
        """Run a command in the copy; return its exit code and its output."""
        ended = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return ended.returncode, ended.stdout
