"""Check the files, folders and packages of a command before it begins; each check raises with what to do."""

from __future__ import annotations

import argparse
import errno
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from earlyexit_cli.arguments import ENDINGS

#: One of these is among the first bytes of a file of results: its HTML title, or the first entry of its JSON.
MARKS, MARKED = (b"<title>Early-exit report", b'"environment"'), 4096
#: In a model card of `earlyexit train`.
CARD = b"<!-- earlyexit: calibration -->"
#: What `earlyexit demo` writes to its folder.
DEMO_FILES = frozenset({"base", "model", "new.csv", "predictions.csv", "report.html", "report.json", "reviews.csv"})


def check_folder(option: str, folder: Path) -> None:
    """Create a folder if it does not exist, and check that files can be written there.

    Raises:
        OSError: names the option and the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(f"{option}: expected a folder that can be written to, got {folder} ({error.strerror})") from error


def check_results(option: str, file: Path) -> None:
    """Check that a file of results can be written; one with something else in it is not replaced.

    Raises:
        OSError: names the option and the file.
    """
    check_folder(option, file.parent)
    if file.is_dir():
        raise IsADirectoryError(f"{option}: expected a file that can be written to, {file} is a folder")
    if file.is_file() and file.stat().st_size:
        with file.open("rb") as held:
            begin = held.read(MARKED)
        if not any(mark in begin for mark in MARKS):
            raise FileExistsError(
                f"{option}: {file} exists and was not written by earlyexit, so that it is not overwritten; give "
                "another file"
            )


def check_input(option: str, file: Path | None) -> None:
    """Check that a file can be read.

    Raises:
        OSError: names the option and the file.
    """
    if file is None:
        return
    if not file.exists():
        raise FileNotFoundError(f"{option}: expected a file, {file} does not exist")
    try:
        file.open("rb").close()
    except OSError as error:
        raise OSError(f"{option}: expected a file that can be read, got {file} ({error.strerror})") from error
    if file.suffix.lower() == ".parquet":
        check_packages(f"{option}: Parquet", "pyarrow")


def check_packages(what: str, *requirements: str) -> None:
    """Raise if packages are not installed.

    Args:
        what: requires them, for the message.
        requirements: as pip takes them, ``name`` or ``name[extra]``.

    Raises:
        ImportError: names those that are not installed.
    """
    missing = [name for name in requirements if find_spec(name.partition("[")[0].replace("-", "_")) is None]
    if missing:
        raise ImportError(f"{what} requires packages that are not installed: `pip install {' '.join(missing)}`")


def check_address(host: str, port: int) -> None:
    """Raise if another program listens at an address; what else is wrong with it is said when the server binds it.

    Raises:
        OSError: names the address.
    """
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address, family=family).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return  # asyncio passes over an address that the machine lacks, such as ::1 of localhost
        raise OSError(f"--port: cannot listen at {host}:{port} ({error}); choose another port or --host") from error


def check_saved(args: argparse.Namespace) -> None:
    """Check the folder of a model."""
    if not args.model.is_dir():
        raise FileNotFoundError(f"MODEL: expected a folder with a saved model, {args.model} is not one")
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(f"MODEL: expected a folder with a saved model, {args.model} has no config.json")


def check_train(args: argparse.Namespace) -> None:
    """Check the files of `earlyexit train`."""
    name, output = args.model, args.output
    if Path(name).is_file():
        raise NotADirectoryError(f"MODEL: expected a folder with a saved model, or a hub name; {name} is a file")
    if not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"MODEL: expected a folder with a saved model, or a hub name; {name} does not exist")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"MODEL: expected a folder with a saved model, or a hub name; {name} has no config.json"
        )
    check_input("--data", args.data)
    check_input("--dev", args.dev)
    check_packages("train", "accelerate")
    if args.keep_rows:
        check_packages("train, which keeps rows in a Parquet file unless --no-keep-rows is given,", "pyarrow")
    if not args.overwrite and (output / "config.json").is_file():
        raise FileExistsError(
            f"--output: {output} has a model already, which is not overwritten; give another folder, or --overwrite"
        )
    card = output / "README.md"
    if card.is_file() and CARD not in card.read_bytes():
        raise FileExistsError(
            f"--output: {card} is not a model card of `earlyexit train`, and would be replaced; give another folder, "
            "or move the file"
        )
    check_folder("--output", output)


def check_calibrate(args: argparse.Namespace) -> None:
    """Check the files of `earlyexit calibrate`."""
    check_saved(args)
    check_input("--data", args.data)
    if args.risk is not None:
        check_packages("--risk", "mapie")
    if args.output is not None:
        check_results("--output", args.output)
    if not args.dry_run:
        check_folder("MODEL", args.model)


def check_eval(args: argparse.Namespace) -> None:
    """Check the files of `earlyexit eval`."""
    check_saved(args)
    check_input("--data", args.data)
    if args.output is not None:
        check_results("--output", args.output)
    if args.report is not None:
        check_packages("--report", "matplotlib")
        for file in (args.report, args.report.with_suffix(".json")):
            check_results("--report", file)


def names_folder(output: Path) -> bool:
    """Return whether answers are to be written to a folder: it exists, or its name has no ending."""
    return output.is_dir() or not output.suffix


def check_predict(args: argparse.Namespace) -> None:
    """Check the files of `earlyexit predict`."""
    check_saved(args)
    if bool(args.input) == (args.text is not None):
        raise ValueError("predict: expected either files INPUT or --text")
    given = [name for name in ("output", "text_column", "pair_column", "workers", "overwrite") if getattr(args, name)]
    if args.text is not None:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: expected beside a file; --text prints its answers")
        return
    if args.output is None:
        raise ValueError("predict: expected --output, a new file or a folder, where the answers are written")
    if names_folder(args.output):
        check_packages("predict, which writes Parquet files to a folder,", "pyarrow")
        if (args.workers or 1) > 1:
            check_packages("predict with several --workers", "ray[data]")
        return
    if args.output.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"--output: expected a file name that ends in {', '.join(ENDINGS)}, or a folder, whose name has no dot if "
            f"it is new; got {args.output}"
        )
    file = f"{args.output} is a file"
    if other := [name for name in given if name in ("workers", "overwrite")]:
        raise ValueError(f"--{other[0]}: expected beside a folder as --output; {file}")
    if len(args.input) > 1:
        raise ValueError(f"--output: expected a folder for {len(args.input)} files INPUT; {file}")
    (name,) = args.input
    if Path(name).suffix.lower() not in ENDINGS:
        raise ValueError(f"INPUT: expected a file name that ends in {', '.join(ENDINGS)}, got {name!r}")
    check_input("INPUT", Path(name))
    if args.output.exists():
        raise FileExistsError(f"--output: {args.output} exists, and is not overwritten; give a new file")
    check_folder("--output", args.output.parent)


def check_serve(args: argparse.Namespace) -> None:
    """Check the model, the packages and the address of `earlyexit serve`."""
    check_saved(args)
    check_packages("serve", "fastapi", "jinja2", "prometheus-client", "uvicorn")
    check_address(args.host, args.port)


def check_demo(args: argparse.Namespace) -> None:
    """Check the folder and the packages of `earlyexit demo`; a folder with other files is not written to."""
    check_packages("demo", "accelerate", "pyarrow", "matplotlib")
    check_folder("--output", args.output)
    if others := sorted({file.name for file in args.output.iterdir()} - DEMO_FILES):
        raise FileExistsError(f"--output: {args.output} has files of something else ({others[0]}); give a new folder")
