"""Arguments of the command line: help and errors without torch, values and files that are refused, exit codes."""

from __future__ import annotations

import errno
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.command_values import INVALID, REQUIRED
from support.commands import error_of, exit_code
from support.own_files import write_rows

import earlyexit_cli
from earlyexit_cli import arguments, main
from earlyexit_kernels import __version__
from earlyexit_kernels.cli import card, env, train
from earlyexit_kernels.cli.calibrate import target_from
from earlyexit_kernels.cli.checks import written
from earlyexit_kernels.data.table import FORMATS
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tuning.metrics import METRIC_NAMES
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp

ROOT = Path(__file__).resolve().parents[2]
#: Parses the arguments that follow, and fails if torch was imported.
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from earlyexit_cli import main
code = 0
try:
    code = main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules and "earlyexit_kernels" not in sys.modules
sys.exit(code)
"""
FULL = OSError(errno.EIO, "I/O error")


def without_torch(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run the command in a process that must not import torch."""
    program = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), *words]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.sample(4)
@pytest.mark.parametrize("command", [[], *([name] for name in earlyexit_cli.COMMANDS)])
def test_help_does_not_import_torch(command):
    done = without_torch(*command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {' '.join(['earlyexit', *command])} "), done.stderr


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "the following arguments are required: command"),
        (["train", "m", "--data", "no.csv", "--output", "o"], "--data: expected a file, no.csv does not exist"),
        (["predict", "nowhere", "--text", "a"], "MODEL: expected a folder with a saved model, nowhere is not one"),
    ],
)
def test_wrong_arguments_do_not_import_torch(tmp_path, words, error):
    done = without_torch(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {error}"), done.stderr


def test_a_port_that_is_taken_is_refused_without_torch(tmp_path):
    for package in ("fastapi", "jinja2", "prometheus_client", "uvicorn"):
        pytest.importorskip(package)
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = without_torch("serve", ".", "--port", port, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --port: cannot listen at 127.0.0.1:{port}"), done


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
        main(["--version"])
    assert not stop.value.code and capsys.readouterr().out == f"earlyexit {__version__}\n"


def test_lists_are_those_of_the_package():
    assert tuple(sorted(METHODS)) == arguments.METHODS and set(arguments.METRICS) == set(METRIC_NAMES)
    assert tuple(FORMATS) == arguments.ENDINGS and arguments.HOLDOUT == train.HOLDOUT
    assert earlyexit_cli.files.CARD.decode() == card.BEGIN
    folder = ROOT / "earlyexit_kernels" / "cli"
    assert all((folder / f"{name}.py").is_file() for name in earlyexit_cli.COMMANDS)


@pytest.mark.parametrize("command", REQUIRED)
def test_debug_goes_before_or_after_the_command(command):
    parser, words = earlyexit_cli.build_parser(), [command, *REQUIRED[command]]
    assert parser.parse_args(["--debug", *words]).debug is True
    assert parser.parse_args([*words, "--debug"]).debug is True
    assert parser.parse_args(words).debug is False


def test_debug_raises_the_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--debug", "eval", str(tmp_path)])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in INVALID.items() for option in options]
)
def test_value_out_of_range_is_refused(capsys, command, option):
    for value in INVALID[command][option]:
        message = error_of(capsys, [command, *REQUIRED[command], f"{option}={value}"])
        assert option in message and len(message) < 500, value


def test_every_option_has_invalid_values():
    parser = earlyexit_cli.build_parser()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    # without values, or with values that only the network knows
    others = {*"--help -h --debug --set --quick --bf16 --overwrite --host".split()}
    tried = {name: set(options) | others for name, options in INVALID.items()}
    for name, command in commands.items():
        assert {option for action in command._actions for option in action.option_strings} <= tried[name]


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
    assert target_from(earlyexit_cli.build_parser().parse_args(["calibrate", "out", *options.split()])) == target


#: Command -> words of the error, in a folder with files of others, a model `base`, and a README of others in `written`.
REFUSED = {
    "train base --data no.csv --output out": "--data: expected a file, no.csv does not exist",
    "train base --data folder.csv --output out": "--data: expected a file that can be read, got folder.csv (Is a",
    "train base --data in.csv --dev no.csv --output out": "--dev: expected a file, no.csv does not exist",
    "train ./no --data in.csv --output out": "MODEL: expected a folder with a saved model, or a hub name; ./no does",
    "train in.csv --data in.csv --output out": "or a hub name; in.csv is a file",
    "train written --data in.csv --output out": "or a hub name; written has no config.json",
    "train base --data in.csv --output base": "has a model already, which is not overwritten",
    "train base --data in.csv --output written": "README.md is not a model card of `earlyexit train`",
    "train base --data in.csv --output in.csv": "--output: expected a folder that can be written to, got in.csv",
    "train base --data in.csv --output in.csv/below": "--output: expected a folder that can be written to",
    "train base --data in.csv --output out --dev in.csv --holdout 3": "not allowed with argument --dev",
    "train base --data in.csv": "the following arguments are required: --output",
    "calibrate base": "one of the arguments --max-drop --speed-up --latency-ms --risk is required",
    "calibrate base --max-drop 0.1 --speed-up 2": "not allowed with",
    "calibrate base --max-drop 0.1 --data no.csv": "--data: expected a file",
    "calibrate base --max-drop 0.1 --output mine.json": "was not written by earlyexit",
    "calibrate written --max-drop 0.1": "written has no config.json",
    "eval no": "MODEL: expected a folder with a saved model, no is not one",
    "eval base --report mine.html": "--report: mine.html exists and was not written by earlyexit",
    "eval base --report mine.page.html": "--report: mine.page.json exists and was not written by earlyexit",
    "eval base --output .": "--output: expected a file that can be written to, . is a folder",
    "eval base --output in.csv/x.json": "--output: expected a folder that can be written to",
    "predict base": "expected either files INPUT or --text",
    "predict base in.csv --text a": "expected either files INPUT or --text",
    "predict base in.csv": "expected --output, a new file or a folder",
    "predict base --text a --output new.csv": "--output: expected beside a file",
    "predict base --text a --text-column x": "--text-column: expected beside a file",
    "predict base in.csv --output in.csv": "in.csv exists, and is not overwritten",
    "predict base --text a --workers 2": "--workers: expected beside a file",
    "predict base in.csv --output new.txt": "--output: expected a file name that ends in .csv",
    "predict base in.txt --output new.csv": "INPUT: expected a file name that ends in .csv",
    "predict base in.csv in.csv --output new.csv": "--output: expected a folder for 2 files INPUT; new.csv is a file",
    "predict base in.csv --output new.csv --workers 2": "--workers: expected beside a folder as --output; new.csv is",
    "predict base in.csv --output new.csv --overwrite": "--overwrite: expected beside a folder as --output",
    "predict base no.csv --output new.csv": "INPUT: expected a file, no.csv does not exist",
    "predict base in.csv --output in.csv/new.csv": "--output: expected a folder that can be written to",
    "serve no": "MODEL: expected a folder with a saved model, no is not one",
    "demo --output in.csv": "--output: expected a folder that can be written to",
    "demo --output .": "--output: . has files of something else",
}


@pytest.mark.parametrize("command", REFUSED)
def test_files_are_checked_before_the_package_is_imported(command, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("earlyexit_kernels.cli.run", None)
    write_rows(Path("in.csv"), 4)
    Path("folder.csv").mkdir()
    Path("written").mkdir()
    Path("base").symlink_to(base)
    for name in ("mine.json", "mine.html", "mine.page.json", "written/README.md"):
        Path(name).write_text('{"mine": 1}')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert REFUSED[command] in error_of(capsys, command.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_package_that_is_missing_is_named(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(earlyexit_cli.files, "find_spec", lambda name: None)
    write_rows(tmp_path / "in.csv", 4)
    message = error_of(capsys, ["eval", str(base), "--report", str(tmp_path / "page.html")])
    assert "--report requires packages that are not installed: `pip install matplotlib`" in message
    command = ["train", str(base), "--data", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out")]
    assert "pip install accelerate" in error_of(capsys, command)


def test_own_results_may_be_replaced(tmp_path):
    (tmp_path / "old.json").write_text('{"environment": {}}')
    (tmp_path / "empty.json").touch()
    for name in ("old.json", "empty.json", "new/file.json"):
        earlyexit_cli.files.check_results("--output", tmp_path / name)
    assert (tmp_path / "old.json").read_text() and not (tmp_path / "new" / "file.json").exists()


# while a command runs


def test_env_shows_versions_and_backends(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and all(name in out for name in ("torch", "triton", "cpp", "usable"))


def test_env_refuses_another_value_of_the_self_test_before_it_prints(capsys, monkeypatch):
    monkeypatch.setenv("EARLYEXIT_SELF_TEST", "yes")
    assert main(["env"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "EARLYEXIT_SELF_TEST" in error and "got 'yes'" in error


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error"), OSError("I/O error")])
def test_failed_write_names_its_path(error):
    with pytest.raises(OSError, match=r"^model could not be written: I/O error$"), written(Path("model")):
        raise error


@pytest.mark.parametrize("error", [TypeError("wrong"), RuntimeError("wrong"), KeyError("wrong"), AssertionError()])
def test_bug_shows_its_traceback(monkeypatch, error):
    monkeypatch.setattr(env, "run", _raising(error))
    with pytest.raises(type(error)):
        main(["env"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 2), (OSError(), 2)])
def test_other_errors_have_exit_code_and_one_line(capsys, monkeypatch, error, code):
    monkeypatch.setattr(env, "run", _raising(error))
    assert exit_code(["env"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines == ([] if code == 130 else [f"error: {type(error).__name__}"])


def _raising(error: BaseException):
    def run(args):
        raise error

    return run
