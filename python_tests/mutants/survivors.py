"""Why some mutants survive."""

#: Name of a mutant -> why no test of `make test` notices it.
REASONS: dict[str, str] = {}
