"""The parser of the command line: help and version without torch, and lists equal to those of the package."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import earlyexit_cli
from earlyexit_kernels import __version__, cli
from earlyexit_kernels.cli import train
from earlyexit_kernels.cli.calibrate import target_from
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tasks.load import TASK_NAMES
from earlyexit_kernels.tuning.settings import MIN_POINTS
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp

ROOT = Path(__file__).resolve().parents[2]
#: Parses the arguments that follow, and fails if torch was imported.
PROGRAM = """
import sys
from earlyexit_cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules and "earlyexit_kernels" not in sys.modules
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("command", [[], *([name] for name in earlyexit_cli.COMMANDS)])
def test_help_does_not_import_torch(command):
    done = run_python("-c", PROGRAM, *command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {' '.join(['earlyexit', *command])} "), done.stderr


def test_missing_command_does_not_import_torch():
    done = run_python("-c", PROGRAM)
    assert done.returncode == 2 and done.stderr.startswith("error: the following arguments are required: command")


def test_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["earlyexit_kernels", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("earlyexit_kernels", run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out == f"earlyexit {__version__}\n"


def test_version_without_installed_package(capsys, monkeypatch):
    def not_installed(name):
        raise earlyexit_cli.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(earlyexit_cli.importlib.metadata, "version", not_installed)
    with pytest.raises(SystemExit) as stop:
        earlyexit_cli.main(["--version"])
    assert not stop.value.code and capsys.readouterr().out == f"earlyexit {__version__}\n"


def test_lists_are_those_of_the_package(capsys):
    assert earlyexit_cli.TASKS == TASK_NAMES
    assert tuple(sorted(METHODS)) == earlyexit_cli.METHODS
    assert earlyexit_cli.HOLDOUT == train.HOLDOUT
    assert set(earlyexit_cli.COMMANDS) == set(cli.COMMANDS)
    with pytest.raises(SystemExit):
        earlyexit_cli.main(["eval", "--help"])
    assert f"at least {MIN_POINTS} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["train --model m --task toy --output o", "eval --model m", "serve m", "env"])
def test_debug_goes_before_or_after_the_command(command):
    parser, arguments = earlyexit_cli.build_parser(), command.split()
    assert parser.parse_args(["--debug", *arguments]).debug is True
    assert parser.parse_args([*arguments, "--debug"]).debug is True
    assert parser.parse_args(arguments).debug is False


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ("--max-drop 0.01", MaxDrop(0.01)),
        ("--speed-up 2", SpeedUp(2.0)),
        ("--latency-ms 5", Latency(5.0)),
        ("--latency-ms 5 --latency-batch-size 8", Latency(5.0, 8)),
        ("--risk 0.1", Risk(0.1)),
        ("--risk 0.1 --epsilon 0.2 --against full_depth", Risk(0.1, 0.2, "full_depth")),
    ],
)
def test_options_of_calibrate_make_the_target(options, target):
    args = earlyexit_cli.build_parser().parse_args(["calibrate", "--model", "out", *options.split()])
    assert target_from(args) == target
