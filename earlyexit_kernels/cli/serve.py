"""Serve a saved early-exit model over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from earlyexit_kernels.cli.inputs import check_packages
from earlyexit_kernels.cli.recipe import recipe_of
from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.hf.saving import CONFIG
from earlyexit_kernels.serving.http.settings import Settings
from earlyexit_kernels.tuning.record import Calibration

#: Environment variable with the API key.
KEY_VARIABLE = "EARLYEXIT_API_KEY"
#: Arguments that are settings of the same name.
NAMES = """host port workers max_tokens max_wait_ms max_queue max_inputs max_body_bytes rate_limit min_threshold
    max_threshold""".split()
#: Packages of the extra `serve`.
REQUIRED = ("fastapi", "uvicorn", "prometheus-client")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    check_packages("serve", REQUIRED)
    recipe = recipe_of("MODEL", args.model)
    if not (args.model / CONFIG).is_file():
        raise FileNotFoundError(f"MODEL: expected a folder with a saved model, {args.model} has no {CONFIG}")
    settings = Settings(
        model=args.model,
        max_length=None if recipe is None else recipe.max_length,
        api_key=api_key(args.api_key_file),
        **{name: getattr(args, name) for name in NAMES},
    )
    if args.ray is not None:
        return _run_replicas(settings, args)
    if args.address is not None:
        raise ValueError("--address: expected --ray beside it, the number of replicas")
    from earlyexit_kernels.serving.http import server  # requires the extra `serve`

    server.run(settings, lambda url, info: print(started_line(url, settings, info), flush=True))
    return 0


def _run_replicas(settings: Settings, args: argparse.Namespace) -> int:
    """Serve by replicas on Ray Serve.

    Raises:
        ValueError: a setting that replicas do not share.
    """
    check_packages("serve --ray", ("ray[serve]",))
    if settings.rate_limit is not None:
        raise ValueError("--rate-limit: expected none with --ray, whose replicas count apart; limit in a proxy")
    if settings.port == 0:
        raise ValueError("--port: expected a port other than 0 with --ray")
    from earlyexit_kernels.serving.http import replicas, worker
    from earlyexit_kernels.serving.http.service import check_thresholds

    settings = dataclasses.replace(settings, model=settings.model.resolve())
    info = worker.described(worker.load(str(settings.model)))  # an error here rather than in each replica
    check_thresholds(settings, info)
    least, most = args.ray
    number = f"{least} replica(s)" if least == most else f"{least} to {most} replicas"

    def started(url: str) -> None:
        print(f"{started_line(url, settings, info)} in each of {number}", flush=True)

    replicas.run(settings, args.ray, args.address, started)
    return 0


def api_key(file: Path | None) -> str | None:
    """Return the API key in a file, or in the environment; None where there is neither.

    Raises:
        OSError: the file cannot be read.
        ValueError: the key is empty or not plain ASCII, or both are given.
    """
    variable = os.environ.get(KEY_VARIABLE)
    if file is None and variable is None:
        return None
    if file is not None and variable is not None:
        raise ValueError(f"--api-key-file: expected either the file or the variable {KEY_VARIABLE}, got both")
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"--api-key-file: expected a file with a key, {file} is none")
    key = (variable if file is None else file.read_text(encoding="utf-8")) or ""
    key = key.strip()
    if not key or not key.isascii() or len(key.split()) > 1:
        source = KEY_VARIABLE if file is None else f"--api-key-file {file}"
        raise ValueError(f"{source}: expected a key of ASCII characters without spaces")
    return key


def started_line(url: str, settings: Settings, info: dict[str, Any]) -> str:
    """Return the line that is printed when the server listens."""
    parts = [f"method {info['method']['name']}", str(from_dict(info["criterion"]))]
    if info["calibration"] is None:
        parts.append("not calibrated")
    else:
        found = Calibration.from_dict(info["calibration"])
        parts.append(f"calibrated for {found.target['name']} (mean exit layer {found.mean_exit_layer:.2f})")
    parts.append(f"{info['depth']} layers on {info['device']}, {settings.workers} worker(s)")
    return f"serving {settings.model} at {url}: {', '.join(parts)}"
