"""Why some mutants survive."""

#: Name of a mutant -> why no test of `make test` notices it.
REASONS: dict[str, str] = {
    "bank-shared-exit": "equivalent: a bank has one module or one for each layer",
    "divergence-zero-threshold": "equivalent: no term of the divergence is negative, so that none is below 0",
    "ensemble-batch-of-processes": "noticed by `make test-all` only, in hf/test_processes.py, which starts processes",
    "fixed-state-of-the-gone": "equivalent: the state of a row that has left is never read",
    "full-depth-due": "equivalent but for time: a rule that never leaves is answered by the last exit alone",
    "loop-strict-at-the-end": "equivalent: the count of the model's invalid rows refuses them too",
    "method-mean-of-processes": "noticed by `make test-all` only, in hf/test_processes.py, which starts processes",
    "replay-due": "equivalent but for time: full depth decides at the last exit only",
}
