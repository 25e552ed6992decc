"""Saves that fail or are killed at any file-system call leave the old model or the new one."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from support.checkpoint_files import WEIGHTS, change_config, change_weights
from support.models import early_exit, ragged
from transformers import PreTrainedModel

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, Margin
from earlyexit_kernels.hf import saving, weight_files
from earlyexit_kernels.hf.checkpoint import DIGEST
from earlyexit_kernels.hf.saving import STAGING, complete_copies, save_or_rescue

load = ee.EarlyExitForSequenceClassification.from_pretrained
#: Events of `sys.addaudithook` that change a folder or open a file in it.
CALLS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir"}
CALLS |= {"shutil.rmtree", "shutil.copyfile", "shutil.copystat", "os.utime", "os.chmod"}
SHARDS, FEWER_SHARDS, VARIANT = {"max_shard_size": "150KB"}, {"max_shard_size": "300KB"}, {"variant": "fp16"}


@pytest.fixture(scope="module")
def models():
    return {
        "old": early_exit(seed=1, criterion=Entropy(threshold=0.9), num_hidden_layers=2),
        "new": early_exit(seed=2, criterion=Margin(threshold=0.3), num_hidden_layers=2),
    }


def answers(model) -> list:
    out = model(**ragged())
    return [out.logits.tolist(), out.exit_layer.tolist()]


def contents(folder: Path) -> tuple:
    """Return all files that a load could read, and whether there is a complete copy of a save."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    own = (item for item in files.items() if not item[0].startswith(STAGING))
    return bool(complete_copies(folder)), *own


def child_save(model, folder: Path, options: dict, before_call: Callable[[int], None], links: bool = True) -> int:
    """Save in a child process, with ``before_call(number)`` ahead of each file-system call in `folder`.

    Without `links` the file system has no hard links.

    Returns:
        The number of calls if the save succeeded, at most 200, 255 if it raised OSError; minus the signal that ended
        the child.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls, inside, status = 0, False, 254

    def hook(event, arguments):
        nonlocal calls, inside
        if inside or event not in CALLS:
            return
        if any(isinstance(a, (str, os.PathLike)) and str(folder) in str(a) for a in arguments):
            calls, inside = calls + 1, True
            try:
                before_call(calls)
            finally:
                inside = False
            if event == "os.link" and not links:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    try:
        sys.addaudithook(hook)
        model.save_pretrained(folder, **options)
        status = min(calls, 200)
    except OSError:
        status = 255
    finally:
        os._exit(status)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[], None]:
    """Return a function that raises the error of the system with this number."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


#: The failure, and whether all later calls also fail.
FAILURES = {
    "kill": (kill, True),
    "full disk": (failing(errno.ENOSPC), False),
    "read-only": (failing(errno.EROFS), True),
}


def fail_at(call: int, failure: str) -> Callable[[int], None]:
    """Return the `before_call` of `child_save` that fails at a call."""
    fail, lasting = FAILURES[failure]
    return lambda number: fail() if number == call or (lasting and number > call) else None


def failed_saves(old: Path, model, options: dict, failure: str, links: bool) -> Iterator[tuple[Path, str]]:
    """Save over a copy of `old` once for each file-system call, which fails; give the folder and how the save ended.

    It ends "killed", "raised", "saved nevertheless" or, last, "saved" after fewer calls.
    """
    folder = old.parent / "folder"
    for call in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        status = child_save(model, folder, options, fail_at(call, failure), links)
        saved = "saved" if status < call else "saved nevertheless"
        ended = {-signal.SIGKILL: "killed", 255: "raised"}.get(status, saved)
        yield folder, ended
        if ended == "saved":
            return


def killed_saves(old: Path, model, options: dict, links: bool) -> Iterator[tuple[Path, str]]:
    """Give what `failed_saves` gives for kills, from one save whose folder is copied before each call."""
    folder, copies = old.parent / "folder", old.parent / "copies"
    shutil.copytree(old, folder)
    calls = child_save(model, folder, options, lambda call: shutil.copytree(folder, copies / str(call)), links)
    assert 0 < calls < 200
    yield from ((copies / str(call), "killed") for call in range(1, calls + 1))
    yield folder, "saved"


#: The options of the earlier save, and of the one that replaces it.
SIZES = {
    "one file": ({}, {}),
    "shards over one file": ({}, SHARDS),
    "one file over shards": (SHARDS, {}),
    "fewer shards": (SHARDS, FEWER_SHARDS),
    "as many shards": (SHARDS, SHARDS),
    "a variant": (VARIANT, VARIANT),
    "shards of a variant": (VARIANT, {**VARIANT, **SHARDS}),
}


def outcome(folder: Path, expected: dict, seen: dict, variant: str | None) -> str:
    """Return which model a folder holds, "old" or "new", or "refused"; equal contents are loaded once."""
    state = contents(folder)
    if state not in seen:
        try:
            got = answers(load(folder, variant=variant))
        except RuntimeError as error:
            (copy_of_save,) = complete_copies(folder)
            assert "different saves" in str(error) and f"its files are in {copy_of_save}" in str(error)
            assert answers(load(copy_of_save, variant=variant)) == expected["new"]
            seen[state] = "refused"
        else:
            seen[state] = {str(value): name for name, value in expected.items()}[str(got)]
        if variant:
            load(folder)  # the default weights have a digest of their own
    return seen[state]


#: How saves fail, the sizes, whether the file system has hard links, and whether the old config has a digest.
CASES = [("copies", sizes, True, True) for sizes in SIZES]
CASES += [("copies", sizes, True, False) for sizes in ("one file over shards", "shards of a variant")]
CASES += [("copies", "one file over shards", False, True), ("kill", "shards over one file", True, True)]
CASES += [("full disk", "shards over one file", True, True), ("read-only", "one file", True, True)]


@pytest.mark.thorough
@pytest.mark.parametrize(("failure", "sizes", "links", "digest"), CASES)
def test_failure_at_every_call_leaves_old_or_new(tmp_path, models, sizes, failure, links, digest):
    """Or a folder that is refused with the name of a complete copy."""
    before, after = SIZES[sizes]
    variant = after.get("variant")
    expected = {name: answers(model) for name, model in models.items()}
    old = tmp_path / "old"
    models["old"].save_pretrained(old)
    models["old"].save_pretrained(old, **before)
    if not digest:
        change_config(old, **{f"{DIGEST}.{variant}" if variant else DIGEST: None})
    (old / "README.md").write_text("mine")
    if failure == "copies":
        saves = killed_saves(old, models["new"], after, links)
    else:
        saves = failed_saves(old, models["new"], after, failure, links)
    met, seen = [], {}
    for folder, ended in saves:
        assert (ended == "killed") == (failure in ("kill", "copies")) or ended == "saved"
        found = outcome(folder, expected, seen, variant)
        assert found == "new" or not ended.startswith("saved"), "a save that does not raise must succeed"
        if ended != "saved nevertheless":
            met.append(found)
        assert (folder / "README.md").read_text() == "mine"
        if found == "refused" and met.count("refused") == 1:
            models["new"].save_pretrained(folder, **after)
            assert outcome(folder, expected, seen, variant) == "new" and not list(folder.glob(f"{STAGING}*"))
    assert ended == "saved" and {"old", "new", "refused"} == set(met)
    if digest:
        assert met == sorted(met, key=["old", "refused", "new"].index), "a later failure does not undo the save"


@pytest.mark.thorough
def test_one_of_two_processes_that_save_at_once_wins(tmp_path, models):
    children = []
    for name, options in (("old", SHARDS), ("new", {})):
        if not (child := os.fork()):
            status = 1
            try:
                for _ in range(8):
                    models[name].save_pretrained(tmp_path, **options)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert answers(load(tmp_path)) in [answers(model) for model in models.values()]
    assert not list(tmp_path.glob(f"{STAGING}*"))


def test_interrupted_save_of_another_shape_names_its_copy(tmp_path, models):
    models["old"].save_pretrained(tmp_path)
    complete = tmp_path / f"{STAGING}elsewhere-1-abc.complete"
    deeper = early_exit(seed=3, num_hidden_layers=3)
    deeper.save_pretrained(complete)
    shutil.copy(complete / WEIGHTS, tmp_path / WEIGHTS)
    for options in ({}, {"allow_new_heads": True}):
        with pytest.raises(RuntimeError, match=rf"different saves.*its files are in {complete}"):
            load(tmp_path, **options)
    change_config(tmp_path, DIGEST)
    with pytest.raises(RuntimeError, match="different saves"):
        load(tmp_path)
    deeper.save_pretrained(tmp_path)
    assert load(tmp_path).depth == 3 and complete.is_dir(), "only that machine knows whether the process has ended"


def test_variants_have_digests_of_their_own(tmp_path, models):
    """A save of one variant keeps the digests of the others."""
    models["old"].save_pretrained(tmp_path / "old")
    for options in (VARIANT, {**VARIANT, **SHARDS}, {}):
        models["new"].save_pretrained(tmp_path / "new", **options)
    assert {DIGEST, f"{DIGEST}.fp16"} <= json.loads((tmp_path / "new" / "config.json").read_text()).keys()
    shutil.copy(tmp_path / "old" / WEIGHTS, tmp_path / "new" / "model.fp16.safetensors")
    assert answers(load(tmp_path / "new")) == answers(models["new"])
    with pytest.raises(RuntimeError, match=r"different saves.*remove 'weights_digest\.fp16' from"):
        load(tmp_path / "new", variant="fp16")


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_mixed_saves_are_refused(tmp_path, models, options):
    """Files of two saves with equal shapes, which only the digest can distinguish."""
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, **options)
    taken = max(path.name for path in (tmp_path / "new").glob("*.safetensors")) if options else "config.json"
    shutil.copy(tmp_path / "new" / taken, tmp_path / "old" / taken)
    with pytest.raises(RuntimeError, match="different saves") as caught:
        load(tmp_path / "old")
    assert all(name in str(caught.value) for name in ("config.json", ".safetensors", "weights_digest"))
    change_config(tmp_path / "old", weights_digest=None)
    load(tmp_path / "old")
    change_config(tmp_path / "old", weights_digest=["no digest"])
    with pytest.raises(RuntimeError, match="different saves"):
        load(tmp_path / "old")


@pytest.mark.parametrize("place", [0, -1])
def test_the_digest_covers_both_ends_of_a_long_tensor(tmp_path, models, place, monkeypatch):
    monkeypatch.setattr(weight_files, "SAMPLE_BYTES", 1024)
    models["new"].save_pretrained(tmp_path)
    change_weights(tmp_path, lambda state: max(state.values(), key=torch.Tensor.numel).view(-1)[place].add_(1))
    with pytest.raises(RuntimeError, match="different saves"):
        load(tmp_path)


def test_the_config_is_moved_last_and_an_index_after_its_shards(tmp_path, models, monkeypatch):
    """A save that is interrupted then has the digest of the one before, or lacks weights that its index names."""
    moved, link = [], saving._link
    monkeypatch.setattr(saving, "_link", lambda path, *rest: (moved.append(path.name), link(path, *rest)))
    models["new"].save_pretrained(tmp_path, **SHARDS)
    shards = [name for name in moved if name.endswith(".safetensors")]
    assert len(shards) > 1 and moved[: len(shards) + 1] == [*shards, f"{WEIGHTS}.index.json"]
    assert moved[-1] == "config.json"


def test_arguments_of_transformers(tmp_path, models, monkeypatch):
    old, new = models["old"], models["new"]
    state = new.state_dict()
    old.save_pretrained(tmp_path / "state", state_dict=state)
    assert torch.equal(load(tmp_path / "state").heads.out[0].weight, new.heads.out[0].weight)
    assert state.keys() == new.state_dict().keys()
    old.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not any((tmp_path / "other").iterdir())
    old.save_pretrained(tmp_path / "variants")
    new.save_pretrained(tmp_path / "variants", variant="fp16")
    assert answers(load(tmp_path / "variants", variant="fp16")) == answers(new)
    monkeypatch.chdir(tmp_path / "variants")
    old.save_pretrained(".")
    assert answers(load(".")) == answers(old)
    kept = {"config.json", WEIGHTS, "model.fp16.safetensors"}
    assert {path.name for path in Path().iterdir()} == kept


def test_a_save_by_several_processes_goes_to_the_folder(tmp_path, models, monkeypatch):
    folders = []

    def save(self, folder, *_, **options):
        folders.append((folder, options["distributed_checkpoint"]))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    models["new"].save_pretrained(tmp_path, distributed_checkpoint=True)
    assert folders == [(tmp_path, True)]


def test_next_save_removes_files_of_killed_processes_and_of_earlier_saves(tmp_path, models):
    assert child_save(models["old"], tmp_path, {}, fail_at(60, "kill")) == -signal.SIGKILL
    assert list(tmp_path.glob(f"{STAGING}*"))
    models["new"].save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    models["old"].save_pretrained(tmp_path, **SHARDS)
    models["new"].save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS], "shards are replaced"


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.float32), (math.inf, torch.bfloat16), (-math.inf, torch.float16)]
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, models, value, dtype):
    models["old"].save_pretrained(tmp_path)
    before = contents(tmp_path)
    broken = copy.deepcopy(models["new"]).to(dtype)
    name = "backbone.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        broken.get_parameter(name)[3, 5] = value
    with pytest.raises(ValueError, match="lower learning rate") as caught:
        broken.save_pretrained(tmp_path)
    assert name in str(caught.value) and contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_full_disk_raises_oserror(tmp_path, models, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        models["old"].save_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and not any(tmp_path.iterdir())


def test_save_to_a_file_is_refused(tmp_path, models):
    path = tmp_path / "taken"
    path.write_text("a file")
    with pytest.raises(NotADirectoryError, match=r"expected a folder, got the file .*taken; choose another"):
        models["new"].save_pretrained(path)
    assert path.read_text() == "a file"


def test_save_or_rescue(tmp_path, models, monkeypatch):
    """The target folder cannot be created, since there is a file of that name."""
    taken, temporary = tmp_path / "taken", tmp_path / "temporary"
    taken.write_text("a file")
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(OSError, match="the trained model is in") as caught:
        save_or_rescue(taken, models["new"].save_pretrained)
    place = next(temporary.iterdir())
    assert str(place) in str(caught.value) and str(taken) in str(caught.value)
    assert answers(load(place)) == answers(models["new"])

    def refuse(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="is lost"):
        save_or_rescue(tmp_path / "out", models["new"].save_pretrained, refuse)
    assert not any((tmp_path / "out").iterdir()) and list(temporary.iterdir()) == [place]


def test_upload_contains_the_saved_files(tmp_path, models, monkeypatch):
    """The client of the hub is replaced by one that records its calls."""
    asked, hub = {}, SimpleNamespace(card=None)

    def upload(model, folder, repo_id, *_, **__):
        asked[repo_id] = {path.name for path in Path(folder).iterdir()}
        asked["answers"] = answers(load(folder))
        asked["digest"] = json.loads((Path(folder) / "config.json").read_text())[DIGEST]

    hub.create_repo = lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: card)
    model = copy.deepcopy(models["new"])
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, state_dict=model.state_dict())
    digest = json.loads((tmp_path / "mine" / "config.json").read_text())[DIGEST]
    files = {"config.json", WEIGHTS, "README.md"}
    assert asked == {"mine": files, "answers": answers(models["new"]), "digest": digest}
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", WEIGHTS]
