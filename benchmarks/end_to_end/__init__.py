"""Whole models against the plain Hugging Face model on the same weights and the same batch."""
