"""``make gpu-check`` interrupted by Ctrl-C, or by the SIGTERM of a limit on their time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.gpu_checks import document, good

ROOT = Path(__file__).resolve().parents[2]
#: Runs a step that ends and one whose process sleeps; writes the number of that process to a file.
INTERRUPTED = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import card, check, steps
from benchmarks.gpu.bench import header
from benchmarks.gpu.steps import Outcome

results = Path(sys.argv[1])
sleep = f"import os, time; open({str(results / 'process')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
torch.cuda.is_available = lambda: True
card.facts = dict
steps.build = lambda seconds: Outcome([header("gpu_build", "extension", "build")])
steps.tests = lambda name, seconds: steps.run([sys.executable, "-c", sleep], seconds, {})
sys.exit(check.main(["--section", "tests_first", "--results", str(results)]))
"""


def wait_for(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    assert happened()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_keeps_finished_steps_and_leaves_no_process(tmp_path, by):
    """A process that went on would use the GPU while the next run measures.

    The command starts as one in the background of a shell, with SIGINT ignored.
    """
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "process").is_file() and (tmp_path / "process").read_text(), 60)
        step = int((tmp_path / "process").read_text())
        run.send_signal(by)
        _, said = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 130
    assert said.splitlines()[-1] == "interrupted; finished steps are kept, run the command again for the others"
    wait_for(lambda: not is_running(step), 10)
    (results,) = tmp_path.glob("*.json")
    assert '"gpu_build"' in results.read_text() and "tests_first" not in results.read_text()


def test_interrupted_step_runs_again(driver):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver({"a": good("a"), "b": interrupted, "c": good("c")})
    assert set(document(driver)["suites"]) == {"gpu_a"}
    summary = driver({"a": good("a"), "b": good("b"), "c": good("c")})
    assert summary.there == ["a"] and summary.done == ["b", "c"]
