"""Reading and writing of CSV, TSV, JSON lines and Parquet: the same rows back, and errors that name the line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from earlyexit_kernels.tasks.files import FORMATS, read_table, write_table

COLUMNS = {"text": ["a, b", 'caf\xe9 "q"', "c"], "label": ["x", "y", "x"]}


@pytest.fixture(params=FORMATS)
def ending(request) -> str:
    """Of a format that this machine can read."""
    if request.param in (".jsonl", ".parquet"):
        pytest.importorskip("datasets", reason="JSON lines and Parquet require the extra 'train'")
    return request.param


def test_written_rows_are_read_again(tmp_path, ending):
    path = tmp_path / f"a[1]*?{ending}"
    write_table(path, COLUMNS)
    table = read_table(path)
    assert {name: list(values) for name, values in table.columns.items()} == COLUMNS and len(table) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileExistsError):
        write_table(path, {"text": ["other"]})
    assert list(read_table(path).columns) == ["text", "label"] and len(list(tmp_path.iterdir())) == 1


def test_quotes_are_text_in_tsv_and_line_ends_are_not(tmp_path):
    path = tmp_path / "rows.tsv"
    write_table(path, {"text": ['"a', 'b "c"']})
    assert path.read_text() == 'text\n"a\nb "c"\n' and list(read_table(path).columns["text"]) == ['"a', 'b "c"']
    with pytest.raises(ValueError, match="a tab or a line end does not fit in TSV"):
        write_table(tmp_path / "new.tsv", {"text": ["a\tb"]})
    assert [p.name for p in tmp_path.iterdir()] == ["rows.tsv"]


def test_csv_has_quotes_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.CSV"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"a, ""b""\nc",1\r\n' + b'"' + b"x" * 200_000 + b'",2\r\n')
    table = read_table(path)
    assert table.columns["text"][0] == 'a, "b"\nc' and len(table.columns["text"][1]) == 200_000
    assert table.where(1) == f"{path}, line 4"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"", "expected at least one row, got none"),
        ("a.csv", b"text,label\n", "line 2: expected at least one row"),
        ("a.csv", b"text,label\na,1\n\nb,1\n", "line 3: expected 2 columns, got 0"),
        ("a.csv", b'text,label\n"a\nb",1\nb\n', "line 4: expected 2 columns, got 1"),
        ("a.csv", b"text,label\na,b,1\n", "line 2: expected 2 columns, got 3"),
        ("a.csv", b'text,label\n"a,1\n', "line 2: expected CSV, got unexpected end of data"),
        ("a.csv", b"text,label,text\na,1,b\n", "line 1: expected different columns, got 'text' twice"),
        ("a.csv", b"text,label\na,1\ncaf\xe9,1\n", "line 3: expected UTF-8 text, got the byte 0xe9"),
        ("a.csv", b"text,label\na,1\ncaf\xe9,1\n", "convert it, e.g. with iconv -f LATIN1 -t UTF-8"),
        (
            "a.csv",
            "text,label\na,1\n".encode("utf-16"),
            "line 1: expected UTF-8 text, got the byte 0xff; convert it, e.g. with iconv -f UTF-16",
        ),
        ("a.csv", b"text;label\na;1\nb, c;2\n", "line 3: expected 1 columns, got 2; its header looks separated by ';'"),
        ("a.tsv", b"text\tlabel\na\t1\nb 1\n", "line 3: expected 2 columns, got 1"),
        ("a.jsonl", b"", "expected at least one row, got none"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: expected a JSON object"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1: expected different columns, got 'text' twice"),
        ("a.jsonl", b"3\n", "line 1: expected a JSON object, got '3'"),
        ("a.jsonl", b'{"text": "a"}{"text": "b"}\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: expected UTF-8"),
        ("a.parquet", b"PAR1", "could not be read"),
        ("a.txt", b"text\na\n", "expected a file name that ends in .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, data, words):
    if name.endswith((".jsonl", ".parquet")):
        pytest.importorskip("datasets", reason="JSON lines and Parquet require the extra 'train'")
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_table(path)
    assert str(path) in str(error.value) and words in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path, ending):
    (tmp_path / f"folder{ending}").mkdir()
    for path, error in ((tmp_path / f"no{ending}", FileNotFoundError), (tmp_path / f"folder{ending}", OSError)):
        with pytest.raises(error, match=path.name):
            read_table(path)


def test_without_datasets_json_lines_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ImportError, match="pip install datasets"):
        read_table(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("text\na\n")
    assert len(read_table(tmp_path / "a.csv")) == 1


@pytest.mark.thorough
def test_nothing_is_left_outside_of_the_files(tmp_path):
    """`datasets` caches in the home folder unless told otherwise, prints progress bars and logs errors."""
    pytest.importorskip("datasets", reason="JSON lines and Parquet require the extra 'train'")
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    program = (
        "from pathlib import Path\nfrom earlyexit_kernels.tasks.files import read_table\n"
        "read_table(Path('a.jsonl'))\ntry:\n    read_table(Path('b.jsonl'))\nexcept ValueError:\n    print('refused')\n"
    )
    clean = {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert run.stdout == "refused\n" and not run.stderr
    assert not list(home.rglob("*.arrow")) and not list(home.rglob("*json*")) and not list(scratch.glob("earlyexit-*"))
