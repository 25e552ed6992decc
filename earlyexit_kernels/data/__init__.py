"""Labelled rows for training and evaluation: tables in files, their texts and labels, and a generated task."""
