"""Compilation of the CUDA sources, without a GPU and with any build of torch."""

from __future__ import annotations

import functools
import importlib.util
import re
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from support import cuda_emulation

from earlyexit_kernels.criteria import RULES

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
CARDS = ("sm_80", "sm_90", "sm_100")
#: File -> number of kernels, counting every dtype or word type, and every rule of an exit.
KERNELS = {"compact": 5, "exit_step": 3 * len(RULES)}
#: File -> bytes of code that its largest kernel may have for sm_90. An exit with all rules in one kernel had 130,000.
CODE_BYTES = {"compact": 6_000, "exit_step": 19_000}
#: Header that a build of torch without CUDA lacks.
GENERATED = Path("c10/cuda/impl/cuda_cmake_macros.h")


class Compiled(NamedTuple):
    """A file compiled for some cards: the messages of ptxas, the number of cards, and the code for sm_90."""

    log: str
    cards: int
    binary: Path


@pytest.fixture(scope="module")
def setup() -> dict:
    """The definitions of setup.py, without running the setup."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: None)
        patch.setattr(sys, "argv", ["setup.py"])
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def toolkit(setup) -> Path:
    home = setup["find_toolkit"]()
    if home is None:
        pytest.skip("no CUDA toolkit with nvcc was found; install one and set CUDA_HOME")
    return home


def run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def test_toolkit_of_another_major_version_is_refused(setup, monkeypatch):
    unsupported_reason = setup["cuda_unsupported_reason"]
    torch_12 = SimpleNamespace(version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setitem(unsupported_reason.__globals__, "find_toolkit", lambda: Path("cuda"))
    for version, words in (("12.1", None), ("13.0", "torch has CUDA 12.8")):
        monkeypatch.setitem(unsupported_reason.__globals__, "toolkit_version", lambda home, version=version: version)
        reason = unsupported_reason(torch_12)
        assert reason is None if words is None else words in reason


def test_every_kernel_file_is_tested():
    assert {path.stem for path in CUDA.glob("*.cu")} == set(KERNELS)


def test_build_supports_every_card(setup):
    """By code of the same major and no later minor version, or by PTX of an earlier version."""
    built = [re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", entry).groups() for entry in setup["CUDA_ARCHITECTURES"].split(";")]
    built = [((int(major), int(minor)), ptx) for major, minor, ptx in built]
    for card in CARDS:
        major, minor = int(card[3:-1]), int(card[-1])
        earlier = [(version, ptx) for version, ptx in built if version <= (major, minor)]
        assert any(ptx or version[0] == major for version, ptx in earlier), card


@pytest.fixture(scope="module")
def compiled(setup, toolkit, tmp_path_factory) -> Callable[[str], Compiled]:
    """A function that compiles a file for all cards, once."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    nvcc = toolkit / "bin" / "nvcc"
    supported = run(nvcc, "--list-gpu-code").split()
    cards = [card for card in CARDS if card in supported]
    assert "sm_90" in cards
    targets = [f"-gencode=arch={card.replace('sm', 'compute')},code={card}" for card in cards]
    flags = ["-std=c++17", *setup["NVCC_FLAGS"], *COMMON_NVCC_FLAGS, "--threads=0", "-Xptxas=-v", *targets]

    @functools.cache
    def compile_file(name: str) -> Compiled:
        folder = tmp_path_factory.mktemp(name)
        log = run(nvcc, "-c", CUDA / f"{name}.cu", "-o", folder / "kernels.o", *flags, "--keep", f"--keep-dir={folder}")
        (binary,) = folder.glob("*_90.cubin")
        return Compiled(log, len(cards), binary)

    return compile_file


@pytest.mark.thorough
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(compiled, name):
    """A stack frame or spills would put variables of a thread into slow memory."""
    log = compiled(name).log
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames == [("0", "0", "0")] * (KERNELS[name] * compiled(name).cards), log
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 64, "two blocks of 512 threads, or eight of 128, do not fit on a multiprocessor"
    assert max(code_bytes(compiled(name).binary)) <= CODE_BYTES[name]


@pytest.mark.thorough
def test_exits_have_their_loads_in_flight(compiled, toolkit):
    """Copies of the weight (LDGSTS) come before all loads, of which that of the row's id is awaited first.

    Of a mean, a thread loads eight packs of 16 bytes before it adds the first.
    """
    tool = disassembler(toolkit)
    if tool is None:
        pytest.skip("no nvdisasm was found in the CUDA toolkit or in triton; install one of them")
    kernels = re.split(r"\.section\s+\.text\.", run(tool, "-c", compiled("exit_step").binary))[1:]
    assert len(kernels) == KERNELS["exit_step"]
    for code in kernels:
        loads = re.findall(r"\b(LDGSTS|LDG)\.", code)
        assert loads[0] == "LDGSTS" and "LDG" in loads, code[:200]
        work = "".join("L" if load else "+" for load in re.findall(r"\b(?:(LDG?\.E\.128)\b|FADD\b|HADD2\b)", code))
        assert "L" * 8 in work, code[:200]


def disassembler(toolkit: Path) -> Path | None:
    """Return nvdisasm of the toolkit or of triton."""
    folders = [toolkit / "bin"]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "nvdisasm" for folder in folders if (folder / "nvdisasm").is_file()), None)


def code_bytes(binary: Path) -> list[int]:
    """The bytes of code of each kernel in an ELF file."""
    data = binary.read_bytes()
    (table,), (size, count, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + number * size) for number in range(count)]
    text = headers[names][4]
    named = [(data[text + header[0] : data.index(b"\0", text + header[0])], header[5]) for header in headers]
    return [length for name, length in named if name.startswith(b".text.")]


@pytest.mark.thorough
def test_bindings_compile(setup, toolkit, tmp_path):
    from torch.utils.cpp_extension import include_paths

    if cuda_emulation.compiler() is None:
        pytest.skip("there is no C++ compiler; set CXX or install one")
    include = [Path(path) for path in include_paths()]
    if not any((path / GENERATED).is_file() for path in include):
        assert torch.version.cuda is None
        stub = tmp_path / GENERATED
        stub.parent.mkdir(parents=True)
        stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
        include.append(tmp_path)
    flags = [flag for flag in setup["CXX_FLAGS"] if flag != "-fopenmp"]
    headers = [f"-isystem{path}" for path in (*include, toolkit / "include")]
    for source in CUDA.glob("*.cpp"):
        run(cuda_emulation.compiler(), "-std=c++20", "-Werror", "-fsyntax-only", *flags, *headers, source)
