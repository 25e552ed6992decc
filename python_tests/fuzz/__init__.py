"""Seeded fuzzing of the package; `python -m python_tests.fuzz --help`, or `make fuzz`.

A case is determined by its target, the seed and its number, so that any finding can be replayed alone. Each target is
one module with a function ``run(case)``, which counts its calls in ``case.calls`` and raises

- `WrongError` where a valid call gives a result that the oracle does not give,
- `AcceptedError` where an invalid call is accepted, or a refused one has written something.

Any other exception is reported as a traceback: the package raised an error that its documentation does not name. A
process that dies, or that does not answer in time, is reported as a crash.
"""

import sys
from pathlib import Path

#: The oracles and models of the tests are imported by their own names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
