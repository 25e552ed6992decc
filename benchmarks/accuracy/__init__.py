"""Experiments on real text, from EARLYEXIT_DATA or the hub: ``python -m benchmarks.accuracy.experiments``."""
