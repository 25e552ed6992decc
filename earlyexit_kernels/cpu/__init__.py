"""Encoder layers fused for inference on the CPU."""
