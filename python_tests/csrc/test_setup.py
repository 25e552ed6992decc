"""What setup.py builds where a compiler fails, with fakes of the compilers and small sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from support import cuda_emulation

ROOT = Path(__file__).resolve().parents[2]
FAKE_NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
echo "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!" >&2
echo "1 error detected in the compilation of kernel.cu" >&2
exit 1
"""
FAKE_CXX = """#!/bin/sh
case " $* " in *" --version "*|*" -v "*|*" -dump"*) exec c++ "$@";; esac
echo "bindings.cpp:1:10: fatal error: nothing.h: No such file or directory" >&2
echo "compilation terminated." >&2
exit 1
"""
MODULE = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
#: Runs setup.py as with a build of torch for CUDA 13.0.
RUN = """
import os, runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda = "13.0"
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""
PREFIX = "earlyexit_kernels: EARLYEXIT_BUILD=auto: "
NO_CUDA = (
    "CPU kernels only, because the CUDA kernels do not compile (host_config.h:143:2: error: #error -- unsupported GNU "
    "version! gcc versions later than 15 are not supported!); mend that, or set EARLYEXIT_BUILD=cpu to leave them out"
)
NOTHING = (
    "pure Python package, because the CPU kernels do not compile (bindings.cpp:1:10: fatal error: nothing.h: No such "
    "file or directory); mend that or set CXX to another compiler, and build again with EARLYEXIT_BUILD=cpu"
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout with small sources, and a library of an earlier build."""
    if cuda_emulation.compiler() is None:
        pytest.skip("there is no C++ compiler; set CXX or install one")
    files = {
        "checkout/csrc/bindings.cpp": MODULE,
        "checkout/csrc/cpu/ops.cpp": "",
        "checkout/csrc/cuda/ops.cpp": "",
        "checkout/csrc/cuda/kernel.cu": "",
        "checkout/earlyexit_kernels/__init__.py": "",
        "checkout/earlyexit_cli/__init__.py": "",
        f"checkout/earlyexit_kernels/_C{EXTENSION_SUFFIXES[0]}": "",
        "cuda/bin/nvcc": FAKE_NVCC,
        "cuda/include/cuda_runtime.h": "",
        "bin/failing-c++": FAKE_CXX,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    return tmp_path / "checkout"


def build(tree: Path, mode: str, *, cxx: str | None = None, command: tuple[str, ...] = ("build_ext", "--inplace")):
    """Run setup.py with a failing nvcc; return status, lines of the package and all output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "EARLYEXIT_BUILD": mode, "CUDA_HOME": str(tree.parent / "cuda"), "PATH": path}
    environment |= {"CXX": str(tree.parent / "bin" / cxx), "CC": str(tree.parent / "bin" / cxx)} if cxx else {}
    arguments = [sys.executable, "-c", RUN, *command]
    done = subprocess.run(
        arguments, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    prefix = f"earlyexit_kernels: EARLYEXIT_BUILD={mode}: "
    lines = [line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix)]
    return done.returncode, lines, done.stdout


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob("_C*.so"))


def test_auto_builds_the_cpu_kernels_where_nvcc_fails(tree):
    status, lines, output = build(tree, "auto")
    assert status == 0, output
    assert lines[0].startswith("CPU and CUDA kernels, because") and lines[1:] == [NO_CUDA]
    assert "unsupported GNU version" in output.split(NO_CUDA)[0], "the compiler's output is printed"
    (built,) = libraries(tree / "earlyexit_kernels")
    assert b"libtorch_cuda" not in built.read_bytes(), "libraries and objects of the first attempt are left out"


def test_auto_is_pure_python_where_no_compiler_works(tree):
    status, lines, output = build(tree, "auto", cxx="failing-c++")
    assert status == 0, output
    _, without_cuda, without_extension = lines
    assert without_cuda.startswith("CPU kernels only, because the CUDA kernels do not compile (")
    assert without_extension == NOTHING
    assert not libraries(tree), "of an earlier build neither"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mode", "cxx", "error"),
    [("cuda", None, "unsupported GNU version"), ("cpu", "failing-c++", "fatal error: nothing.h")],
)
def test_a_requested_build_ends_with_the_error_of_the_compiler(mode, cxx, error, tree):
    status, lines, output = build(tree, mode, cxx=cxx)
    assert status != 0 and error in output and len(lines) == 1, output
    assert "CUDA kernels" in lines[0] if mode == "cuda" else "CPU kernels" in lines[0]


@pytest.mark.thorough
def test_auto_packages_what_it_built(tree):
    """After each outcome, in one folder of objects."""
    for cxx, outcome, built in ((None, NO_CUDA, 1), ("failing-c++", NOTHING, 0)):
        status, lines, output = build(tree, "auto", cxx=cxx, command=("bdist_wheel",))
        assert status == 0 and lines[-1] == outcome, output
        (wheel,) = (tree / "dist").iterdir()
        names = [Path(name).name for name in zipfile.ZipFile(wheel).namelist()]
        assert sum(name.startswith("_C.") for name in names) == built
        wheel.unlink()
