"""Serve a saved early-exit model over HTTP."""

from __future__ import annotations

import argparse
import os
import sys

from transformers import AutoConfig

from earlyexit_kernels.hf.config import EarlyExitConfig
from earlyexit_kernels.tuning.record import Calibration

#: Arguments that are options of the same name.
NAMES = "host port workers max_tokens max_wait_ms max_queue max_inputs max_body_bytes".split()


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; the exit code is 2 if a worker cannot load the model."""
    from earlyexit_kernels.serving import workers  # requires the extra `serve`
    from earlyexit_kernels.serving.server import Options, api_key
    from earlyexit_kernels.serving.source import Source

    options = Options(
        source=Source.of(args.model, None),
        modules=tuple(args.modules),
        api_key=api_key(),
        **{name: getattr(args, name) for name in NAMES},
    )
    about = f"{_described(args.model)}, {options.workers} worker(s)"
    print(f"loading {args.model} in {options.workers} worker(s)", file=sys.stderr, flush=True)
    return workers.run(options, lambda url: print(f"serving {args.model} at {url}: {about}", flush=True))


def _described(model: os.PathLike[str]) -> str:
    """Return criterion and calibration of a saved model in words.

    Raises:
        ValueError: it has no exits.
    """
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, EarlyExitConfig):
        raise ValueError(f"MODEL: expected a model with exits, {model} has a {config.model_type}; train it first")
    rule = config.exit_criterion()
    found = None if config.calibration is None else Calibration.from_dict(config.calibration)
    if found is None or found.criterion != rule:
        return f"{rule}, not calibrated"
    return f"{rule}, calibrated for {found.target['name']} (mean exit layer {found.mean_exit_layer:.2f})"
