"""Build csrc/cuda for the CPU with cuda_emulator.h, as the ops ``torch.ops.earlyexit_emulated``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "earlyexit_emulated"

#: CUDA syntax that a C++ compiler does not support, and its replacement.
CUDA_SYNTAX = (
    (r"(\w+(?:<[\w():]+>)?)\s*<<<([^;]*?)>>>\(([^;]*?)\);", r"emulator::run([=] { \1(\3); }, \2);"),
    (
        r"extern __shared__ __align__\(16\) float (\w+)\[\];",
        r"auto* \1 = reinterpret_cast<float*>(emulator::shared_memory);",
    ),
    (r"__shared__ ", "static "),
    (r"asm\(\"\" : \"\+l\"\(\w+\)\);", ""),
    (r"TORCH_LIBRARY_IMPL\(earlyexit_kernels, CUDA,", f"TORCH_LIBRARY_IMPL({NAMESPACE}, CPU,"),
)
HEADERS = (
    "cuda_runtime_api.h",
    "cuda_fp16.h",
    "cuda_pipeline_primitives.h",
    "c10/cuda/CUDAException.h",
    "c10/cuda/CUDAGuard.h",
    "c10/cuda/CUDAStream.h",
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def translated(folder: Path) -> list[Path]:
    """Copy csrc into `folder` with the CUDA files translated to C++; return the files to compile."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in HEADERS:
        header = folder / "headers" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("")
    files = []
    for path in sorted((folder / "csrc" / "cuda").iterdir()):
        text = path.read_text()
        for pattern, replacement in CUDA_SYNTAX:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        path.write_text(text)
        if path.suffix == ".cu":
            path = path.rename(path.with_suffix(".cu.cpp"))
        files += [path] if path.suffix == ".cpp" else []
    return files


def load(folder: Path) -> None:
    """Build the ops in `folder` and load them; the caller defines their schemas."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / "emulated.so"
    arguments = "-std=c++20 -O1 -shared -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Werror -Wno-unknown-pragmas"
    command = [
        compiler(),
        *arguments.split(),
        "-U_FORTIFY_SOURCE",  # fortified functions report jumps between stacks as overflows
        # a GPU refuses loads and stores at addresses that are not multiples of their size
        *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
        *("-include", "cuda_emulator.h", f"-I{folder / 'headers'}", f"-I{ROOT / 'python_tests' / 'support'}"),
        *(f"-isystem{path}" for path in include_paths()),
        *translated(folder),
        *(f"-L{path}" for path in library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-o", library),
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
