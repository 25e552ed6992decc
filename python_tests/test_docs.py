"""The documents: their Python runs, their links resolve, the README stays short, examples and docstring examples run.

The Python blocks of a page are cumulative: they run in order, in one namespace and an empty folder, without a network.
Those of docs/extending*.md, which register classes, run in a process of their own.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_layering import MAY_IMPORT

import earlyexit_kernels as ee

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
IN_A_PROCESS = {"extending.md", "extending_models.md", "extending_ops.md"}
FUTURE = "from __future__ import annotations\n"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Lines and bytes of the README, the tables included.
MAX_LINES, MAX_BYTES = 160, 14_000
MAX_EXAMPLE_LINES = 40


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for name, body in BLOCK.findall(text_of(path)) if name == language]


def program_of(path: Path) -> str:
    """All Python of a page, on the lines of the page so that a traceback names them.

    A program may have `FUTURE` in its first block only; a page that shows a whole module has it there too.
    """
    lines = ["\n"] * (text_of(path).count("\n") + 1)
    for match in BLOCK.finditer(text_of(path)):
        if match[1] == "python":
            first = text_of(path)[: match.start(2)].count("\n")
            body = match[2].splitlines(keepends=True)
            if FUTURE in lines:
                body = ["\n" if line == FUTURE else line for line in body]
            lines[first : first + len(body)] = body
    return "".join(lines)


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch, other_device):
    """An empty working folder, seeded draws, no hub, inputs checked for their device; the environment is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("EARLYEXIT_DATA", raising=False)
    before = dict(os.environ)
    torch.manual_seed(0)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def output_of(path: Path) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program_of(path), str(path), "exec"), {"__name__": "__main__"})
    return printed.getvalue()


PAGES_WITH_PYTHON = [path for path in PAGES if blocks(path, "python") and path.name not in IN_A_PROCESS]


@pytest.mark.sample(3)
@pytest.mark.parametrize("path", PAGES_WITH_PYTHON, ids=lambda path: path.name)
def test_python_of_a_page_runs(path, in_empty_folder):
    output_of(path)


@pytest.mark.thorough
def test_python_of_pages_that_register_classes_runs(in_empty_folder):
    """In one process, which ends with what they registered."""
    for name in sorted(IN_A_PROCESS):
        (in_empty_folder / f"{name}.py").write_text(program_of(ROOT / "docs" / name), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", f"import runpy\nfor name in {sorted(IN_A_PROCESS)}: runpy.run_path(name + '.py')"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr


LINE = re.compile(r"^(?P<sentence>.+\.) +(?P<label>\w+), exit (?P<layer>\d) of (?P<depth>\d)$", re.MULTILINE)


def test_the_quick_start_prints_what_the_readme_says(in_empty_folder):
    """Sentences and labels are those of the README; the exit layers depend on the machine's rounding."""
    (shown,) = blocks(README, "text")
    expected = [match.groupdict() for match in LINE.finditer(shown)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory")
        output = output_of(README)
    assert "'loss'" not in output, "the Trainer's lines are not shown"
    found = [match.groupdict() for match in LINE.finditer(output)]
    assert len(expected) == 3
    for key in ("sentence", "label", "depth"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    plain, _, contrast = (int(row["layer"]) for row in found)
    assert plain < contrast, found
    (speed_up,) = re.findall(r"\((\d\.\d\d)x fewer layers\)", output)
    assert 1.8 < float(speed_up) < 3.5, "the comment after calibrate says 2.5"
    assert {path.name for path in Path("quick-start").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_the_readme_keeps_its_budget():
    text = text_of(README)
    assert text.count("\n") <= MAX_LINES
    assert len(text.encode()) <= MAX_BYTES
    assert "pip install" in "\n".join(text.splitlines()[:25])


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub and MkDocs make of a page's headings."""
    outside_of_code = BLOCK.sub("", text_of(path))
    titles = re.findall(r"^#+ (.+)$", outside_of_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_links_resolve():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", BLOCK.sub("", text_of(path))):
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            assert linked.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors_of(linked), f"{path.name}: {target}"


def test_every_page_is_in_the_navigation_and_in_the_overview():
    navigation = re.findall(r"(\w+\.md)", text_of(ROOT / "mkdocs.yml"))
    assert sorted(navigation) == sorted(path.name for path in PAGES)
    linked = set(re.findall(r"\]\((\w+\.md)", text_of(ROOT / "docs" / "index.md")))
    assert linked == {path.name for path in PAGES} - {"index.md"}


def test_the_site_loads_nothing_from_elsewhere():
    """Fonts, scripts and images are part of the site; pages only link elsewhere."""
    configuration = text_of(ROOT / "mkdocs.yml")
    assert "font: false" in configuration and "offline" not in configuration and "http" not in configuration
    for path in DOCUMENTS:
        assert not re.search(r"!\[[^\]]*\]\(https?:", text_of(path)), path.name


ROOM = r"^\| `([a-z]\w+)` \|.*\|(.*)\|$"


def test_the_design_says_who_may_import_whom():
    section = text_of(ROOT / "docs" / "design.md").partition("| room | contents | imports |")[2].partition("\n\n")[0]
    shown = {room: set(re.findall(r"\w+", names)) for room, names in re.findall(ROOM, section, re.MULTILINE)}
    allowed = {
        room: {"all"} if "*" in names.split() else set(names.split()) & set(MAY_IMPORT)
        for room, names in MAY_IMPORT.items()
        if not room.startswith("__")
    }
    assert shown == allowed, "docs/design.md and MAY_IMPORT differ"


EXAMPLES = ["convert_and_train", "text_pipeline", "export_onnx", "own_loop", "cross_encoder"]
#: Example -> packages of the extra `test` that it requires beside the package's own.
REQUIRES = {"export_onnx": ("onnx", "onnxscript", "onnxruntime"), "cross_encoder": ("sentence_transformers",)}


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """The folder in which the examples run one after the other; the first one saves the model that others load."""
    return tmp_path_factory.mktemp("examples")


def run_example(name: str, folder: Path, monkeypatch) -> str:
    for package in REQUIRES.get(name, ()):
        pytest.importorskip(package, reason=f"{name}.py requires {package}, from the extra 'test'")
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, example_folder, monkeypatch, other_device):
    if name in ("text_pipeline", "export_onnx") and not (example_folder / "early-exit-model").is_dir():
        run_example("convert_and_train", example_folder, monkeypatch)
    assert run_example(name, example_folder, monkeypatch).strip()


@pytest.mark.parametrize("name", ["text_pipeline", "export_onnx"])
def test_example_without_a_saved_model_says_what_is_missing(name, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"expected the folder early-exit-model here: run convert_and_train.py first"):
        run_example(name, tmp_path, monkeypatch)


def test_examples_are_short_listed_and_tested():
    files = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert sorted(files) == sorted(EXAMPLES)
    overview = text_of(ROOT / "docs" / "index.md")
    for name, path in files.items():
        assert text_of(path).count("\n") <= MAX_EXAMPLE_LINES, name
        assert f"../examples/{name}.py" in overview


MODULES = ("earlyexit_kernels", "earlyexit_kernels.criteria", "earlyexit_kernels.ops")


def public_names() -> dict[str, object]:
    """Dotted name -> function or class, of everything public that has a docstring of its own."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or callable(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", public_names())
def test_docstring_examples_run(name, in_empty_folder):
    value = public_names()[name]
    finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
    names = {**vars(sys.modules[value.__module__]), "ee": ee, "torch": torch}
    tests = [test for test in finder.find(value, name, globs=names) if test.examples]
    assert tests, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report = io.StringIO()
    for test in tests:
        runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()
