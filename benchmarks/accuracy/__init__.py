"""Experiments on real text: each is a list of runs, and writes one JSON a run, under ``benchmarks/results/accuracy``.

A run whose JSON is there is skipped, and so is the training of a model that is there: an experiment that was cut short
goes on where it stopped. ``python -m benchmarks.accuracy.methods --help`` and so on; the text comes from
EARLYEXIT_DATA, or from the hub.
"""
