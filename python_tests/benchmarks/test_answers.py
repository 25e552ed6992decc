"""The recording of a version's answers, and the comparison of two."""

from __future__ import annotations

import copy

import pytest
import torch

import earlyexit_kernels as ee
from benchmarks.answers.__main__ import main
from benchmarks.answers.comparison import CLOSE, DIFFERENT, EQUAL, compare
from benchmarks.answers.groups import record
from benchmarks.answers.models import FAMILIES
from benchmarks.answers.recording import RAISED, Recording
from benchmarks.answers.rules import SETTINGS
from benchmarks.answers.training_cases import METHODS

SELECTED = ("inputs", "changes", "replays")
CASE = "inputs | bert | entropy | right | eager"


@pytest.fixture(scope="module")
def recording():
    return record(SELECTED, ["bert"])


def altered(recording, name=CASE, **fields):
    """Return a copy in which one case has other fields."""
    other = copy.copy(recording)
    other.answers = {**recording.answers, name: {**recording.answers[name], **fields}}
    return other


def test_the_tables_have_every_family_criterion_and_method():
    assert set(FAMILIES) == set(ee.backbones.BACKBONES)
    assert {setting.rule.name for setting in SETTINGS.values()} == set(ee.criteria.CRITERIA)
    assert {*METHODS, "pabee"} == set(ee.methods.METHODS)


def test_the_same_version_recorded_twice_is_equal(recording, tmp_path):
    record(SELECTED, ["bert"]).save(tmp_path)
    found = compare(recording, Recording.load(tmp_path))
    assert {verdict.status for verdict in found.verdicts.values()} == {EQUAL} and not found.failed()
    assert len(found.verdicts) == len(recording.answers) > 300
    assert 0 < found.raised < len(recording.answers) / 4
    assert len(recording.answers[CASE]["exit_layer"].unique()) > 1


@pytest.mark.parametrize(("step", "status"), [(2e-7, CLOSE), (1e-4, DIFFERENT), (torch.nan, DIFFERENT)])
def test_another_number_is_found(recording, step, status):
    logits = recording.answers[CASE]["logits"].clone()
    logits[3, 1] += step
    found = compare(recording, altered(recording, logits=logits))
    assert found.verdicts[CASE].status == status and "logits[3, 1]" in found.verdicts[CASE].why
    assert found.failed() == (status == DIFFERENT) == (CASE in found.report())


def test_a_case_whose_bits_have_to_be_equal_has_no_tolerance(recording):
    name = next(name for name, tolerance in recording.tolerances.items() if tolerance == 0 and "replay" in name)
    logits = recording.answers[name]["logits"]
    assert compare(recording, altered(recording, name, logits=torch.nextafter(logits, logits + 1))).failed()


def test_another_exit_layer_error_or_set_of_fields_is_found(recording):
    layers = recording.answers[CASE]["exit_layer"].clone()
    layers[5] = layers[5] % 4 + 1
    assert "exit_layer[5]" in compare(recording, altered(recording, exit_layer=layers)).differing[CASE]
    assert compare(recording, altered(recording, more="text")).failed()
    refused = next(name for name, answer in recording.answers.items() if RAISED in answer)
    assert "KeyError" in compare(recording, altered(recording, refused, **{RAISED: "KeyError"})).differing[refused]


def test_a_missing_case_is_listed_and_fails(recording, tmp_path, capsys):
    recording.save(tmp_path / "base")
    other = copy.copy(recording)
    other.answers = {name: answer for name, answer in recording.answers.items() if name != CASE}
    other.save(tmp_path / "here")
    paths = [str(tmp_path / name) for name in ("base", "here")]
    assert main(["compare", *paths]) == 1
    assert f"1 cases only in the base:\n  {CASE}" in capsys.readouterr().out
    assert main(["compare", *paths[:1] * 2]) == 0
