"""What a GPU is asked: ``make gpu-check`` and ``make gpu-sanitize``."""
