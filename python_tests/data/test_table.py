"""Reading and writing of CSV, TSV, JSON lines and Parquet: the same rows back, and errors that name the line."""

from __future__ import annotations

import json
import sys

import pytest

from earlyexit_kernels.data.table import FORMATS, read_table, write_table

COLUMNS = {"text": ["a, b", 'caf\xe9 "q"', "c"], "label": ["x", "y", "x"]}


@pytest.fixture(params=FORMATS)
def ending(request) -> str:
    """Of a format that this machine can read."""
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet requires the extra 'train'")
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
        ("a.csv", b"text,label\na,1\n\nb\n", "line 4: expected 2 columns, got 1"),
        ("a.csv", b'text,label\n"a\nb",1\nb\n', "line 4: expected 2 columns, got 1"),
        ("a.csv", b"text,label\na,b,1\n", "line 2: expected 2 columns, got 3"),
        ("a.csv", b'text,label\n"a,1\n', "line 2: expected CSV, got unexpected end of data"),
        ("a.csv", b'label,text\n1,"good\n0,bad\n', "line 3: expected CSV, got unexpected end of data"),
        ("a.csv", b'label,text\n1,"a"b\n', "line 2: expected CSV, got ',' expected after '\"'"),
        ("a.csv", b"text,label,text\na,1,b\n", "line 1: expected different columns, got 'text' twice"),
        ("a.csv", b"text,label\na,1\ncaf\xe9,1\n", "line 3: expected UTF-8 text, got the byte 0xe9"),
        ("a.csv", b"text,label\na,1\ncaf\xe9,1\n", "convert it, e.g. with iconv -f WINDOWS-1252 -t UTF-8"),
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
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="Parquet requires the extra 'train'")
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


def test_without_pyarrow_parquet_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_table(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert len(read_table(tmp_path / "a.jsonl")) == 1


def test_json_lines_keep_values_and_have_the_columns_of_all_rows(tmp_path):
    rows = [{"text": "2024-01-01", "id": 2**70}, {"text": "b", "more": [1, None]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    columns = read_table(tmp_path / "a.jsonl").columns
    assert columns == {"text": ["2024-01-01", "b"], "id": [2**70, None], "more": [None, [1, None]]}


def test_blank_lines_of_csv_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n\na,1\n\nb,2\n\n")
    table = read_table(tmp_path / "a.csv")
    assert table.columns == {"text": ["a", "b"], "label": ["1", "2"]} and table.lines == [3, 5]
