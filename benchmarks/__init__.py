"""Benchmarks of earlyexit_kernels: `make bench` writes results/*.json, and the documents' tables from those."""
