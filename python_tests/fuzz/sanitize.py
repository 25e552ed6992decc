"""`python -m python_tests.fuzz.sanitize`: the CPU extension under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds it in ``build/sanitize``, so that the normal build stays as it is, then runs the tests of the C++ ops and some
thousand cases of the fuzz targets `ops` and `hostile` with it. Any report of a sanitizer is a failure. A program with a
known fault runs first: it shows that reports arrive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
LIBRARY = FOLDER / "lib"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
TESTS = ("exit_step", "exit_step_inputs", "compact", "criteria", "encoder_ops", "encoder_ops_layer", "opcheck")
#: A read past the end of a heap buffer.
FAULT = 'extern "C" int fault(int k) { int* p = new int[4](); int v = p[k]; delete[] p; return v; }\n'
CALL_FAULT = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).fault(int(sys.argv[2]))"
LOADED = (
    "import earlyexit_kernels._C as c; maps = open('/proc/self/maps').read(); "
    "assert '/sanitize/' in c.__file__ and 'libasan' in maps and 'libubsan' in maps, c.__file__"
)


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build() -> None:
    """Compile the extension, and copy the package's Python files beside it."""
    variables = {
        "EARLYEXIT_BUILD": "cpu",
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {FLAGS}",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {FLAGS}",
    }
    package = LIBRARY / "earlyexit_kernels"
    for path in package.rglob("*.py"):  # one that is gone from the sources must not stay
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
    """Path of a library of the compiler."""
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{compiler()} has no {name}; install the sanitizer libraries of the compiler")
    return path


def environment(reports: Path) -> dict[str, str]:
    """Environment of a process under the sanitizers, which write reports as files that begin with `reports`."""
    options = f"log_path={reports}:halt_on_error=1:print_stacktrace=1"
    return {
        **os.environ,
        # exceptions pass through the interceptors of ASan only where libstdc++ is loaded before them
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(LIBRARY), str(ROOT), str(ROOT / "python_tests")]),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }


def run(command: list[str], reports: Path) -> int:
    """Run a Python command under the sanitizers, from where the sanitized package is found first."""
    return subprocess.run([sys.executable, *command], cwd=LIBRARY, env=environment(reports)).returncode


def check_reports_arrive() -> None:
    """Stop where a program with a known fault ends without a report, or one without a fault with one."""
    source, target, reports = FOLDER / "fault.cpp", FOLDER / "libfault.so", FOLDER / "known"
    source.write_text(FAULT)
    subprocess.run([*compiler().split(), *FLAGS.split(), "-O1", "-shared", "-fPIC", source, "-o", target], check=True)
    for index, fails in ((3, False), (4, True)):
        code = run(["-c", CALL_FAULT, str(target), str(index)], reports)
        found = list(FOLDER.glob("known.*"))
        if bool(code) != fails or bool(found) != fails:
            sys.exit(
                f"reading element {index} of 4: exit status {code}, {len(found)} reports; the sanitizers don't work"
            )
    for path in found:
        path.unlink()
    if run(["-c", LOADED], reports):
        sys.exit("the sanitized extension isn't the one that is imported")


def main() -> int:
    """Build, run, and print every report; 1 where there is one or a step failed."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.fuzz.sanitize", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of each fuzz target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz targets (default: %(default)s)")
    args = parser.parse_args()
    build()
    check_reports_arrive()
    for path in FOLDER.glob("report.*"):
        path.unlink()
    shutil.rmtree(FOLDER / "fuzz", ignore_errors=True)
    fuzz = ["-m", "python_tests.fuzz", "--only", "ops,hostile", "--cases", str(args.cases), "--minutes", "30"]
    fuzz += ["--backends", "cpp", "--seed", str(args.seed), "--folder", str(FOLDER / "fuzz")]
    tests = [str(ROOT / "python_tests" / f"test_{name}.py") for name in TESTS]
    steps = {
        "tests of the C++ ops": [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not triton",
            "-k",
            "cpp",
            *tests,
        ],
        "fuzz targets ops and hostile": fuzz,
    }
    failed = []
    for name, command in steps.items():
        print(f"under ASan and UBSan: {name}", flush=True)
        if run(command, FOLDER / "report"):
            failed.append(name)
    reports = sorted(FOLDER.glob("report.*"))
    for path in reports:
        print(f"\n{path}\n{path.read_text(errors='replace')[:6000]}")
    print(f"\nreports of the sanitizers: {len(reports)}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if reports or failed else 0


if __name__ == "__main__":
    sys.exit(main())
