"""Mutants: small faults that the tests must notice, put one at a time into a copy of the last commit."""

import sys
from pathlib import Path

#: The folder that the tests import from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
