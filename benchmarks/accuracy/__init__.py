"""Experiments on real text: each is a list of runs, and writes one JSON per run to ``benchmarks/results/accuracy``.

A run whose JSON exists is skipped, and so is the training of a model that exists, so that an interrupted experiment
continues. See ``python -m benchmarks.accuracy.methods --help`` and so on. The text comes from EARLYEXIT_DATA or the
hub.
"""
