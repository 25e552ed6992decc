"""Encoder layers captured in CUDA graphs."""
