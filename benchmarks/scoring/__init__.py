"""Scoring tables of many rows, measured."""
