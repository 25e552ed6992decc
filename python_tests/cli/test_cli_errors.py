"""Errors of a command while it runs: their exit codes and messages."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.commands import exit_code

from earlyexit_cli import main
from earlyexit_kernels.cli import env
from earlyexit_kernels.cli.outputs import written


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), SafetensorError("I/O error"), OSError("I/O error")])
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
