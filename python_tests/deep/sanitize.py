"""`python -m python_tests.deep.sanitize`: test the CPU extension with AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the extension in ``build/sanitize``, and runs the tests of the C++ ops and the targets `ops` and `hostile` of
`make fuzz`. Every report of a sanitizer is a failure. A program with known faults runs first, to verify that the
sanitizers work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
LIBRARY = FOLDER / "lib"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
TESTS = (
    "ops/test_exit_step.py",
    "ops/test_op_calls.py",
    "ops/test_compact.py",
    "ops/test_first_tokens_linear.py",
    "ops/test_opcheck.py",
    "ops/test_packed_layer.py",
    "cpu/test_embedding.py",
    "criteria/test_criteria.py",
)
#: A read past the end of a heap buffer (ASan), and an overflowing sum (UBSan).
FAULTS = """#include <cstring>
extern "C" int fault(int index, int term) {
  int* values = new int[4]();
  int value;
  volatile std::size_t size = sizeof(value);  // makes it a call, which only ASan checks
  std::memcpy(&value, reinterpret_cast<char*>(values) + 4 * index, size);
  delete[] values;
  return value + 1 + term;
}
"""
CALL_FAULTS = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).fault(int(sys.argv[2]), int(sys.argv[3]))"
#: Arguments of `fault` -> whether they cause one.
KNOWN = {(3, 7): False, (4, 7): True, (3, 2**31 - 1): True}
LOADED = "from support.sanitized import check; check()"


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build() -> None:
    """Compile the extension, and copy the Python files of the package beside it."""
    variables = {
        "EARLYEXIT_BUILD": "cpu",
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {FLAGS}",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {FLAGS}",
    }
    package = LIBRARY / "earlyexit_kernels"
    for path in package.rglob("*.py"):  # files that were deleted from the sources
        path.unlink()
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "build.log"
    command = [sys.executable, "setup.py", "build", "--build-base", FOLDER, "--build-lib", LIBRARY]
    print(f"building the extension with {FLAGS} (log: {log})", flush=True)
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--build-temp", FOLDER / "temp"],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode or not list(package.glob("_C*.so")):
        sys.exit(f"{log.read_text()}\nthe build failed")


def library(name: str) -> str:
    """Return the path of a library of the compiler."""
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{compiler()} has no {name}; install the sanitizer libraries of the compiler")
    return path


def environment(reports: Path) -> dict[str, str]:
    """Return the environment of a sanitized process; names of report files start with `reports`."""
    options = f"log_path={reports}:halt_on_error=1:print_stacktrace=1"
    return {
        **os.environ,
        # the interceptors of ASan support exceptions only if libstdc++ is loaded before them
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "PYTHONDONTWRITEBYTECODE": "1",
        # the paths of pyproject.toml would come before LIBRARY, and have the extension without sanitizers
        "PYTEST_ADDOPTS": "-o pythonpath= -p support.sanitized",
        "PYTHONPATH": os.pathsep.join([str(LIBRARY), str(ROOT), str(ROOT / "python_tests")]),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }


def run(command: list[str], reports: Path, **others: Any) -> int:
    """Run a Python command with the sanitized package, and return its exit status.

    ASan writes reports to files and UBSan to stderr; both end the process with a status other than 0.
    """
    return subprocess.run([sys.executable, *command], cwd=LIBRARY, env=environment(reports), **others).returncode


def check_faults_are_seen() -> None:
    """Exit if a known fault is not detected, or if the imported extension is not the sanitized one."""
    source, target = FOLDER / "faults.cpp", FOLDER / "libfaults.so"
    source.write_text(FAULTS)
    command = [*compiler().split(), *FLAGS.split(), "-O1", "-shared", "-fPIC"]
    subprocess.run([*command, source, "-o", target], check=True)
    for arguments, fails in KNOWN.items():
        code = run(["-c", CALL_FAULTS, str(target), *map(str, arguments)], FOLDER / "known", stderr=subprocess.DEVNULL)
        if bool(code) != fails:
            sys.exit(f"fault{arguments} ended with exit status {code}; the sanitizers do not work here")
    if not list(FOLDER.glob("known.*")):
        sys.exit("a read past the end of a buffer left no report; AddressSanitizer does not work here")
    for path in FOLDER.glob("known.*"):
        path.unlink()
    if run(["-c", LOADED], FOLDER / "known"):
        sys.exit("the imported extension is not the sanitized one")


def main() -> int:
    """Build, run the steps and print the reports; return 1 if there is a report or a step failed."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.deep.sanitize", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2, help="of fuzzing (default: %(default)s)")
    args = parser.parse_args()
    build()
    check_faults_are_seen()
    for path in FOLDER.glob("report.*"):
        path.unlink()
    tests = [str(ROOT / "python_tests" / name) for name in TESTS]
    steps = {
        "tests of the C++ ops": [
            *"-m pytest -q -p no:cacheprovider -k".split(),
            "not torch",
            "-m",
            "not triton",
            *tests,
        ],
        "targets ops and hostile": f"-m python_tests.deep --only ops,hostile --minutes {args.minutes}".split(),
    }
    failed = []
    for name, command in steps.items():
        print(f"under ASan and UBSan: {name}", flush=True)
        if run(command, FOLDER / "report"):
            failed.append(name)
    reports = sorted(FOLDER.glob("report.*"))
    for path in reports:
        print(f"\n{path}\n{path.read_text(errors='replace')[:6000]}")
    print(f"\nreports of AddressSanitizer: {len(reports)}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if reports or failed else 0


if __name__ == "__main__":
    sys.exit(main())
