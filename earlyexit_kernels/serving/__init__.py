"""Serving and scoring: tables of answers to texts, the pipeline of transformers, and drift of the exit layers."""
