"""``make gpu-sanitize``: how it reads compute-sanitizer's output, and the replays it runs."""

from __future__ import annotations

import pytest
import torch
from support.gpu_checks import document, good

from benchmarks import harness
from benchmarks.gpu import check, replays, sanitize, steps
from benchmarks.gpu.steps import Outcome

RIGHT = "1000 replays by cpp, 40 batches checked, 0 wrong "
WRONG = RIGHT.replace("0 wrong", "2 wrong")
MEMCHECK = "========= COMPUTE-SANITIZER\n{}\n========= ERROR SUMMARY: {} errors\n"
REFUSED = "========= Error: Device not supported. Please refer to the list"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, MEMCHECK.format(RIGHT, 0), {"errors": 0, "goal_met": True, "printed": RIGHT}),
        (
            sanitize.ERROR_STATUS,
            "========= Invalid __global__ write of size 4 bytes\n" + MEMCHECK.format(RIGHT, 3),
            {"errors": 3, "goal_met": False, "first": "Invalid __global__ write of size 4 bytes"},
        ),
        (
            0,
            f"{RIGHT}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n",
            {"errors": 0, "goal_met": True},
        ),
        (1, MEMCHECK.format(WRONG, 0), {"refused": WRONG}),
        (139, MEMCHECK.format("", 0), {"refused": "the replays ended with status 139"}),
        (1, REFUSED, {"not_measured": f"compute-sanitizer refuses the device: {REFUSED}"}),
        (0, "a warning: not supported on this platform\n" + MEMCHECK.format(RIGHT, 0), {"errors": 0}),
    ],
)
def test_output_of_compute_sanitizer(status, output, expected):
    memcheck = sanitize.PASSES["memcheck"]
    found = sanitize.outcome_of("memcheck", memcheck, 9.0, lambda *_: (status, output), "compute-sanitizer")
    (record,) = found.records
    assert not found.failed and record.items() >= expected.items() and record["suite"] == "gpu_sanitize_memcheck"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (None, "", "stopped after 9 s"),
        (139, "Segmentation fault", "no summary was printed; the status is 139: Segmentation fault"),
    ],
)
def test_failed_pass(status, output, expected):
    racecheck = sanitize.PASSES["racecheck"]
    found = sanitize.outcome_of("racecheck", racecheck, 9.0, lambda *_: (status, output), "compute-sanitizer")
    assert found == Outcome([], expected)


def test_missing_compute_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_tool() is None
    found = sanitize.outcome_of("memcheck", sanitize.PASSES["memcheck"], 9.0)
    assert "is neither on PATH" in found.records[0]["not_measured"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch()
    assert sanitize.find_tool() == str(tmp_path / "bin" / "compute-sanitizer")


def test_all_passes_are_recorded(monkeypatch, driver, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "RESULTS", driver.results)
    monkeypatch.setattr(harness, "machine_name", lambda: "fake-gpu")
    monkeypatch.setattr(check, "rewrite_documents", lambda: None)
    monkeypatch.setattr(steps, "build", lambda seconds: good("build"))
    monkeypatch.setattr(sanitize, "outcome_of", lambda name, each, seconds: good(f"sanitize_{name}", errors=0))
    assert sanitize.main([]) == 0
    assert set(document(driver)["suites"]) == {"gpu_build", *(f"gpu_sanitize_{name}" for name in sanitize.PASSES)}
    monkeypatch.setattr(sanitize, "outcome_of", lambda name, each, seconds: Outcome([], "stopped after 9 s"))
    assert sanitize.main([]) == 0, "all passes are finished"
    assert sanitize.main(["--only", "racecheck", "--redo"]) == 1


@pytest.mark.parametrize("launched", [False, True])
def test_replays_are_checked(gpu, launched, monkeypatch, capsys):
    monkeypatch.setattr(replays, "EVERY", 2)
    monkeypatch.setattr(replays, "resolve", lambda *_: "torch")
    monkeypatch.setattr(replays, "ResidentLoop", lambda parts, bucket, *_: loop_on_cpu(parts, bucket))
    assert replays.main(["--replays", "4", *["--launched"] * launched]) == 0
    assert capsys.readouterr().out == "4 replays by torch, 3 batches checked, 0 wrong \n"


def loop_on_cpu(parts, bucket):
    from earlyexit_kernels.engine.resident import ResidentLoop

    return ResidentLoop(parts, bucket, "torch", "torch")


def test_wrong_replays_are_found(gpu, monkeypatch):
    monkeypatch.setattr(replays, "ROUNDING", -1.0)
    checked, wrong = replays.replay(2)
    assert checked == 2 and len(wrong) == 2
