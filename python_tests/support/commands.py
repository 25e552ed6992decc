"""Run commands of the command line in this process."""

from __future__ import annotations

from earlyexit_cli import main


def exit_code(argv: list[str]) -> int:
    """Run a command and return its exit code, also if argparse refuses its arguments."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def error_of(capsys, argv: list[str]) -> str:
    """Run a command that fails, and return its last line on stderr; lines before it are logs of transformers."""
    assert exit_code(argv) == 2
    *logged, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not any("Traceback" in other for other in logged)
    return line
