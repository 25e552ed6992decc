"""Data sets for training and evaluation: named tasks, folders, the hub, and a generated toy task."""
