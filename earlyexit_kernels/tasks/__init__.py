"""Data sets for training and evaluation: named tasks, a user's own files, the hub, and a generated toy task."""
