"""The committed registers and shared memory of the compiled Triton kernels, compared by the tests that compile them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "ops" / "kernel_table.md"
WRITE = "--write-kernel-table"
COMMAND = "make kernel-table"
CAPABILITIES = (80, 90, 100)
#: Compute capability -> registers of a thread and bytes of shared memory of a program.
Cells = dict[int, str]


def pytest_addoption(parser) -> None:
    parser.addoption(WRITE, action="store_true", help=f"rewrite {PATH.name} with what this run compiles")


def usage_of(compiled, folder: Path) -> tuple[int, int]:
    """Return registers and bytes of shared memory; no register is spilled, and nothing else is on the stack."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, *others),) = re.findall(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", report)
    assert others == ["0", "0"], report
    return int(registers), compiled.metadata.shared


def read(text: str) -> tuple[str, dict[tuple[str, str], Cells]]:
    """Return the version of Triton and the rows of a table, by kernel and configuration."""
    (version,) = re.findall(r"Triton (\d\S*\d)", text)
    rows = {}
    for line in text.splitlines():
        if "_kernel " in line:
            kernel, configuration, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[kernel, configuration] = {at: cell for at, cell in zip(CAPABILITIES, cells, strict=True) if cell}
    return version, rows


def text_of(version: str, rows: dict[tuple[str, str], Cells]) -> str:
    """Return the text of a table."""
    header = ("kernel", "configuration", *(f"sm_{capability}" for capability in CAPABILITIES))
    lines = [header, *((*name, *(rows[name].get(at, "") for at in CAPABILITIES)) for name in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    title = f"Registers of a thread and bytes of shared memory of a program, compiled by Triton {version}; `{COMMAND}`"
    return "\n".join([f"{title} rewrites them.", "", *table, ""])


class KernelTable:
    """What this run has compiled, beside what is committed."""

    def __init__(self, writes: bool):
        import triton

        self.writes, self.version = writes, triton.__version__
        self.found: dict[tuple[str, str], Cells] = {}
        self.of_version, self.rows = read(PATH.read_text()) if not writes else (self.version, {})

    def check(self, configuration: str, capability: int, compiled, folder: Path) -> int:
        """Compare a kernel with its row and return its registers; under another Triton only the limits, and skip."""
        registers, shared = usage_of(compiled, folder)
        name, cell = (compiled.metadata.name, configuration), f"{registers}, {shared}"
        if self.writes:
            assert self.found.setdefault(name, {}).setdefault(capability, cell) == cell, name
        elif self.version != self.of_version:
            pytest.skip(
                f"{PATH.name} is of Triton {self.of_version}, this is {self.version}: only spills were looked for"
            )
        else:
            committed = self.rows.get(name, {}).get(capability, "no row")
            assert cell == committed, f"{name} for sm_{capability} has changed; if it is meant to, run {COMMAND}"
        return registers


@pytest.fixture(scope="session")
def kernel_table(pytestconfig) -> Iterator[KernelTable]:
    table = KernelTable(pytestconfig.getoption(WRITE))
    yield table
    if table.writes:
        PATH.write_text(text_of(table.version, table.found))
