"""Profiles of hypothesis: ``here`` of the test-suite, and ``deep`` of `make fuzz`, which draws new examples."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

#: Logs and examples of `make fuzz`.
FOLDER = Path(__file__).resolve().parents[2] / ".fuzz"

settings.register_profile(
    "here",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep",
    settings.get_profile("here"),
    derandomize=False,
    max_examples=1000,
    database=DirectoryBasedExampleDatabase(FOLDER / "examples"),
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("here")
