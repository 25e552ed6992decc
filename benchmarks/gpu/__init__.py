"""Measurements on a GPU: ``make gpu-check`` and ``make gpu-sanitize``."""
