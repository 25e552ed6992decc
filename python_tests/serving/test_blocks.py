"""Blocks of a table without Ray: which files a pattern names, ranges of rows, and what an output folder accepts."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from support.text_models import saved_model, texts  # noqa: E402

import earlyexit_kernels as ee  # noqa: E402
from earlyexit_kernels.serving.tables import blocks as module  # noqa: E402
from earlyexit_kernels.serving.tables.actors import BlockScorer, Job, shares  # noqa: E402
from earlyexit_kernels.serving.tables.blocks import DiskError, Output, model_digest, plan  # noqa: E402
from earlyexit_kernels.serving.tables.files import find_files  # noqa: E402

ROWS = texts(40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


def parquet(path, rows=ROWS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path, **options)
    return path


def names(*patterns):
    return [Path(file.path).name for file in find_files([str(pattern) for pattern in patterns])]


def contents(path, start, stop, block_rows=1000):
    (file,) = find_files([str(path)])
    (block,), failed = plan([file], ["text"], block_rows)
    assert not failed
    return [row for table in file.format.read(file, block.schema, start, stop) for row in table.to_pylist()]


def test_patterns(tmp_path):
    for name in ("a/1.parquet", "a/2.parquet", "a/deep/3.parquet", "b/_temporary/4.parquet", "b/5 [x].parquet"):
        parquet(tmp_path / name)
    (tmp_path / "a" / "_SUCCESS").touch()
    (tmp_path / "a" / "notes.txt").touch()
    assert names(tmp_path) == ["1.parquet", "2.parquet", "3.parquet", "5 [x].parquet"]
    assert names(tmp_path / "a" / "*.parquet") == ["1.parquet", "2.parquet"]
    assert names(tmp_path / "**" / "[23].parquet") == ["2.parquet", "3.parquet"]
    assert names(tmp_path / "b" / "5 [x].parquet", tmp_path / "b") == ["5 [x].parquet"]
    assert names(f"file://{tmp_path}/a/?.parquet") == ["1.parquet", "2.parquet"]
    assert names(f"file://{tmp_path}/a/?.parquet?use_mmap=true") == ["1.parquet", "2.parquet"]
    with pytest.raises(ValueError, match="use_mmap"):
        names(f"file://{tmp_path}/a?use_mmap=neither")
    for wrong in (tmp_path / "none", tmp_path / "*.csv", tmp_path / "a" / "1.parquet" / "*"):
        with pytest.raises(FileNotFoundError, match="names none"):
            names(wrong)
    with pytest.raises(ValueError, match=r"expected files that end in .*notes.txt"):
        names(tmp_path / "a" / "*")
    with pytest.raises(ValueError, match="unknown"):
        names("unknown://bucket/*.parquet")


def test_ranges_of_every_format(tmp_path):
    rows = [*ROWS, 'two\nlines, and "quotes"', "ä", ""]
    parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        file.write("id,text\n")
        file.writelines('{},"{}"\n'.format(at, row.replace('"', '""')) for at, row in enumerate(rows))
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": at, "text": row}) + "\n\n" for at, row in enumerate(rows))
    (tmp_path / "a.tsv").write_text('id\ttext\n0\tsaid "so\n1\t\n')
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        for start, stop in ((0, 43), (0, 7), (5, 23), (14, 15), (42, 43)):
            found = contents(tmp_path / name, start, stop)
            assert [row["text"] for row in found] == rows[start:stop], (name, start, stop)
            assert [int(row["id"]) for row in found] == [*range(start, stop)]
    assert [row["text"] for row in contents(tmp_path / "a.tsv", 0, 2)] == ['said "so', ""]


def test_json_keeps_columns_that_some_rows_lack(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "2020-01-01", "n": 1}\n{"text": null, "n": 1.5}\n{"more": [1]}\n')
    assert contents(tmp_path / "a.jsonl", 0, 3) == [
        {"text": "2020-01-01", "n": 1.0, "more": None},
        {"text": None, "n": 1.5, "more": None},
        {"text": None, "n": None, "more": [1]},
    ]


def test_a_plan_names_files_that_cannot_be_read(tmp_path):
    parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "c.csv").write_text("text,n\ngood,1\nbad\n")
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "e.csv").write_text("text,text\n1,2\n")
    (tmp_path / "f.jsonl").write_text('{"text": "good", "n": 1}\n{"text": "good", "n": {"a": "b"}}\n')
    blocks, failed = plan(find_files([str(tmp_path)]), ["text"], 15)
    assert [(block.start, block.stop) for block in blocks] == [(0, 15), (15, 30), (30, 40)]
    assert [block.name for block in blocks][1:] == [f"000000-a-0000000000{at}.parquet" for at in (15, 30)]
    assert [Path(name).name for name in failed] == ["b.parquet", "c.csv", "d.jsonl", "e.csv", "f.jsonl"]
    reasons = list(failed.values())
    assert "line 2: expected a JSON object" in reasons[2] and "'text' twice" in reasons[3]


@pytest.mark.parametrize("name", ["label", "score", "exit_layer", "error"])
def test_names_that_are_taken(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"text,{name}\na film,1\n")
    with pytest.raises(ValueError, match=f"has a column '{name}', which the answers would replace"):
        plan(find_files([str(tmp_path)]), ["text"], 10)
    with pytest.raises(ValueError, match="expected a column 'review', got text"):
        plan(find_files([str(tmp_path)]), ["review"], 10)


def test_a_block_is_scored_as_by_a_scorer(tmp_path, saved):
    rows = [*ROWS[:20], None, "", *ROWS[20:], "film " * 100]
    parquet(tmp_path / "a.parquet", rows)
    (block,), _ = plan(find_files([str(tmp_path / "a.parquet")]), ["text"], 100)
    output = Output(tmp_path / "out")
    with output.opened({"model": "", "options": "", "inputs": {}}, overwrite=False):
        assert not output.is_finished(block)
        options = {"truncate": False, "max_length": None, "max_tokens": 64}
        assert BlockScorer(Job(str(saved), str(tmp_path / "out"), ("text",), options, 1)).score(block) == ""
        assert output.is_finished(block) and (output.rows("scored"), output.rows("errors")) == (40, 3)
    scored = pq.read_table(tmp_path / "out" / "scored").to_pydict()
    wanted = ee.Scorer(str(saved))(ROWS)
    assert (scored["text"], scored["label"], scored["exit_layer"]) == (ROWS, wanted["label"], wanted["exit_layer"])
    assert scored["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert scored["id"] == [*range(20), *range(22, 42)]
    errors = pq.read_table(tmp_path / "out" / "errors").to_pydict()
    assert list(errors) == ["id", "text", "error"] and errors["id"] == [20, 21, 42]
    assert [text.partition(",")[0] for text in errors["error"]] == ["expected a text", "expected some text",
                                                                    "expected at most 70 tokens"]  # fmt: skip


def test_a_file_that_changes_meanwhile(tmp_path, saved):
    parquet(tmp_path / "a.parquet")
    (block,), _ = plan(find_files([str(tmp_path / "a.parquet")]), ["text"], 100)
    output = Output(tmp_path / "out")
    with output.opened({"model": "", "options": "", "inputs": {}}, overwrite=False):
        scorer = BlockScorer(Job(str(saved), str(tmp_path / "out"), ("text",), {}, 1))
        parquet(tmp_path / "a.parquet", ROWS[:10])
        assert scorer.score(block) == "its rows have changed since it was first read"
        assert not output.is_finished(block) and not any((tmp_path / "out" / ".partial").glob("*.parquet"))
        data = bytearray(parquet(tmp_path / "a.parquet").read_bytes())
        data[4:64] = bytes(60)  # the pages; the description of the columns is at the end
        (tmp_path / "a.parquet").write_bytes(data)
        assert scorer.score(block) and not output.is_finished(block)
        (tmp_path / "a.parquet").write_bytes(b"")
        assert "Parquet" in scorer.score(block)


def test_a_full_disk(tmp_path, saved, monkeypatch):
    parquet(tmp_path / "a.parquet")
    blocks, _ = plan(find_files([str(tmp_path / "a.parquet")]), ["text"], 20)
    output = Output(tmp_path / "out")
    with output.opened({"model": "", "options": "", "inputs": {}}, overwrite=False):
        scorer = BlockScorer(Job(str(saved), str(tmp_path / "out"), ("text",), {}, 1))
        scorer.score(blocks[0])

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(DiskError, match=rf"{blocks[1].name} could not be written: No space left on device"):
            scorer.score(blocks[1])
        assert [output.is_finished(block) for block in blocks] == [True, False]
        assert not any((tmp_path / "out" / ".partial").glob("*.parquet"))


def test_a_folder_of_another_run(tmp_path):
    run = {"model": "m", "options": {"columns": ["text"]}, "inputs": {"a": [1, 2], "b": [1, 2]}}
    output = Output(tmp_path / "out")

    def opened(changed=None, overwrite=False):
        with (
            output.opened({**run, **(changed or {})}, overwrite=overwrite),
            pytest.raises(OSError, match="another process writes to"),
            output.opened(run, overwrite=True),
        ):
            pass

    opened()
    opened({"model": "other"})  # nothing is finished
    opened()
    parquet(tmp_path / "out" / "scored" / "000000-a-000000000000.parquet")
    opened()
    opened({"inputs": {"a": [1, 2], "b": [1, 3]}})  # b has been repaired, say
    for changed, words in (
        ({"model": "other"}, "since which the model has changed; give another folder, or --overwrite"),
        ({"options": {}}, "columns or other arguments"),
        ({"inputs": {"a": [1, 2]}}, "input files are others"),
        ({"inputs": {"a": [2, 2], "b": [1, 2]}}, "file a has changed"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(changed)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        opened()
    opened(overwrite=True)
    assert not any((tmp_path / "out" / "scored").iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with (
        pytest.raises(FileExistsError, match="expected a new folder"),
        Output(tmp_path / "mine").opened(run, overwrite=True),
    ):
        pass


def test_the_digest_follows_criterion_and_tokenizer(tmp_path, saved):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    assert model_digest(copy) == model_digest(saved)
    for name in ("config.json", "tokenizer.json"):
        shutil.copytree(saved, copy, dirs_exist_ok=True)
        with (copy / name).open("a") as file:
            file.write(" ")
        assert model_digest(copy) != model_digest(saved)


@pytest.mark.parametrize(
    "cores, workers, blocks, expected",
    [
        ([2], None, 100, (2, 1)),
        ([2], None, 1, (1, 2)),
        ([8], None, 100, (8, 1)),
        ([64], None, 100, (8, 8)),
        ([16, 16], None, 100, (16, 2)),
        ([64], 4, 100, (4, 16)),
        ([4, 4, 4], 2, 100, (2, 4)),
        ([3, 3], 3, 100, (3, 1)),
    ],
)
def test_shares(cores, workers, blocks, expected):
    assert shares(cores, workers, blocks) == expected


def test_more_workers_than_cores():
    with pytest.raises(ValueError, match="--workers: expected at most 4, one a core, got 5"):
        shares([2, 2], 5, 100)
