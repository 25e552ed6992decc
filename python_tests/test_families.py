"""The table of families in docs/limits.md: each cell is what a small model of the family does when it is run."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from support.models import batch_for, early_exit, stock
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import BACKBONES
from earlyexit_kernels.errors import BackendUnavailableError

LIMITS = Path(__file__).resolve().parents[1] / "docs" / "limits.md"
TOLERANCE = 1e-5
SOME = {True: "yes", False: "no"}


def table() -> dict[str, dict[str, str]]:
    """Family -> column -> cell."""
    section = LIMITS.read_text(encoding="utf-8").split("## Models", 1)[1].split("\n\n")[1]
    (_, *columns), _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    told = {}
    for names, *cells in rows:
        for name in names.split(", "):
            family = re.findall(r"`([^`]+)`", name) or [name.lower()]
            told[family[0]] = dict(zip(columns, cells, strict=True))
    return told


def eager(family) -> str:
    """Return how many tokens the layers of the family get, and compare the answers with those of the stock model."""
    base, seen = stock(family), []
    model, batch = ee.to_early_exit(base), batch_for(base)
    model.configure(path="eager")
    layer = model.view().layers[0]
    layer.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[:2])))
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, atol=TOLERANCE, rtol=0)
    tokens = int(batch["attention_mask"].sum())
    return "packed" if set(seen) == {(1, tokens)} else "similar rows"


def fused(family) -> str:
    model = early_exit(family)
    batch = batch_for(model)
    model.configure(path="eager")
    expected = model.trace(**batch).logits
    try:
        model.configure(path="fused")
    except BackendUnavailableError as error:
        assert f"family {family!r} has no fused layers" in str(error)
        return "no"
    torch.testing.assert_close(model.trace(**batch).logits, expected, atol=2e-5, rtol=0)
    return "yes"


def fixed_depth(family) -> str:
    model = early_exit(family)
    batch = batch_for(model)
    return SOME[torch.allclose(model.fixed_depth()(**batch)[0], model(**batch).logits, atol=TOLERANCE)]


def lora(family) -> str:
    """Train adapters in every linear of the layers for a step, and compare the answers with those of merged ones."""
    peft = pytest.importorskip("peft")
    model = early_exit(family, dropout=0.0)
    batch, layers = batch_for(model), [id(x) for layer in model.view().layers for x in layer.modules()]
    targets = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and id(x) in layers]
    before = model(**batch).logits
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=targets, modules_to_save=["heads"], init_lora_weights=False, r=2
    )
    adapted = peft.get_peft_model(model, config)
    start = copy.deepcopy([p for name, p in adapted.named_parameters() if "lora_" in name])
    adapted.train()(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02).step()
    now = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert all(not torch.equal(p, old) for p, old in zip(now, start, strict=True))
    got = adapted.eval()(**batch).logits
    merged = adapted.merge_and_unload().eval()
    assert (got - before).abs().max() > 1e-3
    return SOME[torch.allclose(merged(**batch).logits, got, atol=5e-5)]


COLUMNS = {
    "eager": eager,
    "fused layers on a CPU": fused,
    "fixed depth": fixed_depth,
    "LoRA": lora,
}


def test_every_family_is_in_the_table():
    told = table()
    assert sorted(told) == sorted(BACKBONES)
    assert all(list(cells) == list(COLUMNS) for cells in told.values())


@pytest.mark.sample(5)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", BACKBONES)
def test_the_table_tells_what_runs(family, column):
    assert COLUMNS[column](family) == table()[family][column]
