"""Scoring the rows of many files by workers, block by block."""
