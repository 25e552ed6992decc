"""Seeded fuzzing of the package; `python -m python_tests.fuzz --help`, or `make fuzz`.

A case is determined by its target, the seed and its number, so every finding can be replayed alone. Each target is a
module with a function ``run(case)``, which counts its calls of the package in ``case.calls`` and raises

- `WrongError` if the result of a valid call differs from that of the oracle,
- `AcceptedError` if an invalid call is accepted, or writes something before it is refused.

Any other exception is reported as a traceback: the package raised an undocumented error. A process that dies or times
out is reported as a crash.
"""

import sys
from pathlib import Path

#: For imports of the oracles and models of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
