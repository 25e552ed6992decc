"""Choosing a criterion: traces, grids of settings, sweeps, calibration, metrics, multiply-adds, timing and reports."""
