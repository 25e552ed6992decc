"""Choosing a criterion: traces swept over grids of settings, metrics, multiply-adds, timing and reports."""
