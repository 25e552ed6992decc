"""Imports between rooms, read from the source, and imports of the package without its optional parts."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from earlyexit_kernels.backends import available_backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "earlyexit_kernels"

#: Room -> what it may import: other rooms of the package, and packages from outside the standard library.
#: `*` is every room; `__init__` is the package itself.
MAY_IMPORT = {
    "errors": "",
    "arguments": "",
    "types": "torch",
    "hashing": "torch",
    "page_style": "",
    "backends": "errors torch triton",
    "backbones": "arguments errors types torch transformers",
    "criteria": "arguments backends errors hashing types torch",
    "ops": "backends criteria types torch",
    "heads": "arguments types torch transformers",
    "methods": "arguments types torch",
    "core": "backbones backends criteria errors hashing heads ops types numpy torch transformers",
    "cpu": "backbones backends core errors ops torch",
    "cuda": "backbones core errors ops torch",
    "hf": "arguments backbones core cpu criteria cuda errors heads methods types huggingface_hub numpy "
    "safetensors torch transformers",
    "tuning": "arguments backbones backends criteria core hf page_style types jinja2 mapie matplotlib numpy "
    "safetensors scipy sklearn torch tqdm",
    "serving": "arguments backends criteria hf ops page_style tuning types fastapi jinja2 numpy "
    "prometheus_client pyarrow pydantic ray starlette torch tqdm transformers uvicorn",
    "data": "pyarrow tokenizers torch transformers",
    "cli": "* __init__ earlyexit_cli numpy safetensors torch tqdm transformers",
    "__init__": "* transformers",
    "__main__": "earlyexit_cli",
}
#: Reads code from data, or talks to the network.
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "socket", "http", "urllib", "requests", "ftplib"}


def sources() -> dict[str, Path]:
    """Dotted module name without the package's -> file; the package itself is ``__init__``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> list[str]:
    """Return the absolute dotted names that a file imports, also in functions; ``from a import b`` gives ``a.b``."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def targets(module: str) -> set[str]:
    """Return what a module imports: modules of the package, ``__init__`` for itself, ``outside:...`` for other ones."""
    found = set()
    for name in imports(MODULES[module]):
        inside = name.removeprefix(PACKAGE + ".")
        if name == PACKAGE:
            found.add("__init__")
        elif inside == name:
            found.add("outside:" + name.split(".")[0])
        else:
            parts = inside.split(".")
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES]
            found.add("_C" if parts[0] == "_C" else known[0] if known else "__init__")
    return found


TARGETS = {module: targets(module) for module in MODULES}


def may_import(room: str, target: str) -> bool:
    allowed = set(MAY_IMPORT[room].split())
    if target.startswith("outside:"):
        name = target.removeprefix("outside:")
        return name not in NEVER and (name in sys.stdlib_module_names or name in allowed)
    return room_of(target) in {room, *allowed} or ("*" in allowed and target != "__init__")


def test_imports_only_what_a_room_may():
    rooms = {room_of(module) for module in MODULES}
    assert rooms == set(MAY_IMPORT), "a new room: list what it may import in MAY_IMPORT and in docs/design.md"
    wrong = [(module, t) for module, found in TARGETS.items() for t in found if not may_import(room_of(module), t)]
    assert wrong == [], "these modules may not import these targets"


def outside() -> set[str]:
    """Return the packages that the package imports."""
    return {t.removeprefix("outside:") for found in TARGETS.values() for t in found if t.startswith("outside:")}


def test_every_name_of_the_table_is_imported():
    named = {name for allowed in MAY_IMPORT.values() for name in allowed.split()}
    assert named - set(MAY_IMPORT) - {"*"} <= outside()


def test_no_cycles():
    graph = {m: {t for t in TARGETS[m] if t in MODULES and t != m} for m in MODULES}
    graphlib.TopologicalSorter(graph).prepare()
    rooms: dict[str, set[str]] = {}
    for module, found in graph.items():
        rooms.setdefault(room_of(module), set()).update({room_of(t) for t in found} - {room_of(module)})
    graphlib.TopologicalSorter(rooms).prepare()


def test_only_listed_modules_lie_in_the_root():
    """Every other module lies in the folder of its room."""
    loose = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert loose == {"__init__", "__main__", "arguments", "errors", "types", "backends", "hashing", "page_style"}


def test_every_package_from_outside_is_declared():
    """In pyproject.toml, or required by transformers, which we declare."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    declared += [r for r in importlib.metadata.requires("transformers") or [] if "extra ==" not in r]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("-", "_") for requirement in declared}
    names |= {"sklearn"} if "scikit_learn" in names else set()
    assert outside() - sys.stdlib_module_names - {"earlyexit_cli"} <= names


#: Imports the package in a fresh process where {blocked} cannot be imported; a socket or an unpickled name raises.
PROGRAM = """
import json, sys
def watch(event, arguments):
    assert event not in ("socket.connect", "socket.getaddrinfo", "pickle.find_class"), (event, arguments)
sys.addaudithook(watch)
for name in {blocked!r}:
    sys.modules[name] = None
import torch
import earlyexit_kernels as ee
from transformers import AutoConfig
assert AutoConfig.for_model("early-exit").model_type == "early-exit"
from python_tests.support.models import early_exit, ragged
model = early_exit(criterion=ee.criteria.MaxProbability(threshold=0.3))
exit_layer = model(**ragged()).exit_layer.tolist()
print(json.dumps([ee.available_backends("cpu"), ee.available_backends("cuda"), model.explain().backend, exit_layer]))
"""


#: Blocked module -> the back-end that requires it, and words of the reason.
OPTIONAL = {
    "triton": ("triton", ("triton cannot be imported", "install triton")),
    f"{PACKAGE}._C": ("cpp", ("is not built", "make build")),
}


@pytest.mark.thorough
@pytest.mark.parametrize("blocked", OPTIONAL)
def test_works_where_an_optional_part_is_missing(blocked):
    code = PROGRAM.format(blocked=[blocked])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    on_cpu, on_cuda, backend, exit_layer = json.loads(done.stdout.splitlines()[-1])
    lost, words = OPTIONAL[blocked]
    assert all(word in reasons[lost] for word in words for reasons in (on_cpu, on_cuda))
    assert {**on_cpu, lost: ""} == {**available_backends("cpu"), lost: ""}
    assert backend == ("cpp" if on_cpu["cpp"] == "" else "torch") and exit_layer == [1] * 4
