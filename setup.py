"""Build the compiled extension `earlyexit_kernels._C`; the other metadata of the package is in pyproject.toml.

EARLYEXIT_BUILD=auto   CPU kernels, and CUDA kernels if torch and the machine can build them (default); what does not
                       compile is left out
EARLYEXIT_BUILD=cpu    CPU kernels, or the compiler's error
EARLYEXIT_BUILD=cuda   CPU and CUDA kernels, or an error that says what is missing or that of the compiler
EARLYEXIT_BUILD=none   no extension: a pure Python package with the torch and triton back-ends

The choice depends on the installed torch and the compilers found, not on a GPU: machines without one build the same
wheel. Lines that begin with "earlyexit_kernels: " say what is built and why; the last one holds.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
#: Commands that compile; the others (sdist, egg_info, ...) need neither torch nor a compiler.
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
# no -march, so that results are bit-identical on every machine
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
# no fused multiply-adds: decisions differ from those on CPU by the order of sums and the last bit of exp and log only
NVCC_FLAGS = ["-O3", "-lineinfo", "--fmad=false", "--expt-relaxed-constexpr"]

# the kernels are tuned for sm_90; they run on 8.x too, and later cards translate the PTX
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
#: A message of a compiler or linker that ends the build: `error: ...`, `error #20: ...`, `nvcc fatal   : ...`.
COMPILER_ERROR = re.compile(r"\berror\s*(#[\w-]+\s*)?:|\bfatal\s*:|\bld: cannot |undefined reference")


def say(choice: str, reason: str) -> None:
    print(f"earlyexit_kernels: EARLYEXIT_BUILD={build_mode()}: {choice}, because {reason}", file=sys.stderr)


def build_mode() -> str:
    mode = os.environ.get("EARLYEXIT_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"EARLYEXIT_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def check_setuptools() -> None:
    """Raise if setuptools is too old for pyproject.toml, which it would report in a message without a remedy."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(f"expected setuptools>=77, got {setuptools.__version__}; run: pip install -U setuptools")


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"earlyexit_kernels is compiled against the torch it will run with, and torch cannot be imported here "
            f"({error}).\nInstall torch first, then: pip install --no-build-isolation earlyexit_kernels\n"
            f"or set EARLYEXIT_BUILD=none for the pure Python package."
        ) from None
    return torch


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def find_toolkit() -> Path | None:
    """Return the CUDA toolkit: CUDA_HOME or CUDA_PATH, else that of nvcc on PATH, else /usr/local/cuda.

    nvcc on PATH may be a wrapper outside of the toolkit, so a folder must have the headers too.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates = [Path(named)] if named else [*beside, Path("/usr/local/cuda")]
    for home in candidates:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def toolkit_version(home: Path) -> str:
    text = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def cuda_unsupported_reason(torch) -> str | None:
    """Return None if the CUDA kernels can be built, else what is missing and what to do."""
    if not sources("cuda/*.cu"):
        return "there are no CUDA sources (csrc/cuda/*.cu) in this version"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    home = find_toolkit()
    if home is None:
        return "no CUDA toolkit with nvcc was found; install one and set CUDA_HOME"
    version = toolkit_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc in {home} has CUDA {version}, torch has CUDA {torch.version.cuda}; set CUDA_HOME to a match"
    return None


def extension(with_cuda: bool) -> setuptools.Extension:
    """Return the extension `_C`."""
    if with_cuda:
        # torch reads these when cpp_extension is imported
        os.environ["CUDA_HOME"] = str(find_toolkit())
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    from torch.utils import cpp_extension

    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return kind(
        name="earlyexit_kernels._C",
        sources=sources("*.cpp", "cpu/**/*.cpp", *(("cuda/*.cpp", "cuda/*.cu") if with_cuda else ())),
        depends=sources("**/*.h", "**/*.cuh"),
        # -fopenmp only for compilation: the OpenMP runtime that torch loads provides the symbols, with one thread pool
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


@contextlib.contextmanager
def copied_output() -> Iterator[list[str]]:
    """Yield a list of the lines that this process and its compilers print meanwhile; they are printed all the same."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    output, errors = os.dup(1), os.dup(2)
    reads, writes = os.pipe()

    def copy_lines() -> None:
        with open(reads, "rb") as pipe:
            for line in pipe:
                os.write(output, line)
                lines.append(line.decode(errors="replace"))

    for stream in (1, 2):
        os.dup2(writes, stream)
    os.close(writes)
    thread = threading.Thread(target=copy_lines, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        # not for ever: the server of a compiler cache may keep the pipe open
        thread.join(10)


def build_failure(build) -> str | None:
    """Call a function that compiles; return None, or the first error of the compiler as one line."""
    with copied_output() as lines:
        try:
            build()
            return None
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
    found = next((line for line in lines if COMPILER_ERROR.search(line)), raised)
    return " ".join(found.split())[:300]


def native_arguments(with_cuda: bool) -> dict:
    """Return the keyword arguments of setup() that build `_C`; in the mode auto, what does not compile is left out."""
    native = extension(with_cuda)
    from torch.utils.cpp_extension import BuildExtension

    class BuildWhatCompiles(BuildExtension):
        def build_extensions(self) -> None:
            if build_mode() != "auto":
                super().build_extensions()
                return
            compiler = copy.copy(self.compiler)  # torch replaces its methods
            reason = build_failure(super().build_extensions)
            if reason and with_cuda:
                advice = "mend that, or set EARLYEXIT_BUILD=cpu to leave them out"
                say("CPU kernels only", f"the CUDA kernels do not compile ({reason}); {advice}")
                self.compiler = compiler
                # the same object, in which setuptools has set attributes of its own
                vars(native).update(vars(extension(with_cuda=False)))
                reason = build_failure(super().build_extensions)
            if reason:
                advice = "mend that or set CXX to another compiler, and build again with EARLYEXIT_BUILD=cpu"
                say("pure Python package", f"the CPU kernels do not compile ({reason}); {advice}")
                self.remove_earlier_build()
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            if not self.extensions:
                self.remove_earlier_build()

        def remove_earlier_build(self) -> None:
            """Remove a library of other sources, which would be packaged or imported."""
            Path(self.get_ext_fullpath(native.name)).unlink(missing_ok=True)

    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildWhatCompiles}}


def native_build() -> dict:
    """Choose what to build, print the choice, and return the arguments of setup() for it."""
    mode = build_mode()
    if mode == "none":
        say("pure Python package", "it was requested")
        return {}
    if not BUILDING & set(sys.argv[1:]):
        return {}
    compiler = os.environ.get("CXX", "c++")
    if mode == "auto" and shutil.which(compiler.split()[0]) is None:
        say("pure Python package", f"there is no C++ compiler ({compiler!r} is not on PATH; set CXX or install one)")
        return {}
    torch = import_torch()
    if mode == "cpu":
        say("CPU kernels", "they were requested")
        return native_arguments(with_cuda=False)
    reason = cuda_unsupported_reason(torch)
    if mode == "cuda" and reason:
        raise SystemExit(f"EARLYEXIT_BUILD=cuda: cannot build the CUDA kernels: {reason}")
    if reason:
        say("CPU kernels only", reason)
    else:
        say("CPU and CUDA kernels", f"torch is built for CUDA {torch.version.cuda} and nvcc is in {find_toolkit()}")
    return native_arguments(with_cuda=reason is None)


check_setuptools()
setuptools.setup(**native_build())
