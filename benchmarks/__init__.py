"""Benchmarks of earlyexit_kernels: `make bench` runs them, writes results/*.json and the README's tables from those."""
