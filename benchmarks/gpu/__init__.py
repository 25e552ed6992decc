"""Measurements on a GPU: ``make gpu-check``."""
