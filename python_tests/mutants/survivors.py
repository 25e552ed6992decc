"""Why some mutants survive."""

#: Name of a mutant -> why no test of `make test` notices it.
REASONS: dict[str, str] = {
    "fixed-state-of-the-gone": "equivalent: the state of a row that has left is never read",
    "replay-due": "equivalent but for time: full depth decides at the last exit only",
}
