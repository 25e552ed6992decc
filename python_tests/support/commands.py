"""Commands of the command line, run in this process."""

from __future__ import annotations

from earlyexit_kernels.cli import main


def exit_code(argv: list[str]) -> int:
    """Of a command, whether its arguments are refused by argparse or later."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def error_of(capsys, argv: list[str]) -> str:
    """The one line that a failing command prints, after whatever transformers has logged."""
    assert exit_code(argv) == 2
    *logged, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not any("Traceback" in other for other in logged)
    return line
