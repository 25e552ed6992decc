"""The embeddings of the resident loop: which are computed by `rows_embed`, and that they are those of the family."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from engine.test_resident import assert_as_eager, loop_for, splitting
from support.backends import backend_params
from support.models import FAMILIES, batch_for, early_exit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert.modeling_bert import BertEmbeddings

from earlyexit_kernels.backbones import BACKBONES, EmbeddingSum, embed_with_types
from earlyexit_kernels.criteria import Patience
from earlyexit_kernels.engine.embedding_sum import embedding_unsupported_reason
from earlyexit_kernels.engine.graphs import Graphs
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import resident_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import Bucket
from earlyexit_kernels.engine.resident_embedding import (
    FamilyEmbedding,
    SummedEmbedding,
)

#: Families whose layers run in a CUDA graph.
RESIDENT = (*FAMILIES, "data2vec-text", "modernbert")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=backend_params(("torch", "triton")))
def backend(request) -> str:
    return request.param


def loaded(model, batch, backend="torch"):
    loop = loop_for(model, Bucket(8, 32), backend, poison=True)
    loop.load(Inputs(**batch))
    return loop


def batch_of(model, **given):
    """Return a batch with holes, token types and positions."""
    batch = batch_for(model, "holes", **given)
    shape = batch["input_ids"].shape
    if getattr(model.backbone.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.randint(0, 2, shape)
    batch["position_ids"] = torch.randint(0, 60, shape)
    return batch


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", RESIDENT)
def test_as_close_to_float64_as_the_module_of_the_family(family, dtype, backend):
    if (backend, dtype) == ("triton", torch.bfloat16):
        pytest.skip("the interpreter cuts float32 off to bfloat16, which a GPU rounds")
    model = early_exit(family, pooling="first").to(dtype)
    loop = loaded(model, batch_of(model), backend)
    assert type(loop.embed) is SummedEmbedding
    loop.embedded.fill_(torch.nan)
    with torch.no_grad():
        loop._begin()
        view, exact = model.view(), copy.deepcopy(model.backbone).double()
        present = int(loop.rows.offsets[-1])
        tokens = loop.rows.tokens[:3, None, :present]
        want, theirs = (view.adapter.embed(each, *tokens)[0].double() for each in (exact, model.backbone))
    ours = loop.embedded[:present].double()
    assert loop.embedded[present:].isnan().all(), "tokens that are not present"
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, want, atol=4 * ulp, rtol=4 * ulp)
    error, allowed = ((each - want).square().mean().sqrt() for each in (ours, theirs))
    assert 0 < error <= 1.25 * allowed


@pytest.mark.thorough
def test_a_row_with_an_id_beyond_the_vocabulary_is_invalid(backend):
    """On CUDA the ids of a batch are not checked, since that would synchronise."""
    model = early_exit("bert", pooling="first", criterion=Patience(patience=1))
    batch = batch_for(model)
    loop = loaded(model, batch, backend)
    loop.launch()
    clean = loop.answers.clone()
    batch["input_ids"][1, 2] = 10**6
    loop = loaded(model, batch, backend)
    loop.launch()
    others = [0, 2, 3]
    assert loop.answers[1].isnan().all() and loop.counts[1:, 2].tolist() == [1] * model.depth
    torch.testing.assert_close(loop.answers[others], clean[others], atol=1e-5, rtol=1e-4)


class Launches(TorchDispatchMode):
    """Names of the ops that are called, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [x.alias_info for x in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def launches(loop) -> list[str]:
    with torch.no_grad(), Launches() as seen:
        loop._begin()
    return seen.names


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_two_launches_before_layer_1(family):
    """One packs the tokens and resets counts and state, the other one embeds them."""
    model = early_exit(family, pooling="first", criterion=Patience(patience=1))
    loop = loaded(model, batch_of(model))
    first_state = loop.request.state.clone()
    loop.counts.fill_(9), loop.request.state.fill_(9)
    assert launches(loop) == ["pack_tokens_torch", "rows_embed_torch"]
    assert not loop.counts[1:].any() and first_state.numel()
    torch.testing.assert_close(loop.request.state, first_state, rtol=0, atol=0, equal_nan=True)


def test_further_launches_before_layer_1(monkeypatch):
    model = early_exit("albert", pooling="first", criterion=Patience(patience=1))
    own = [name for name in launches(loaded(model, batch_of(model))) if name.endswith("_torch")]
    assert own == ["pack_tokens_torch", "rows_embed_torch", "rows_linear_torch"]
    monkeypatch.setitem(BACKBONES, "bert", dataclasses.replace(BACKBONES["bert"], embed=embed_with_types))
    model = early_exit("bert", pooling="first", criterion=Patience(patience=1))
    names = launches(loaded(model, batch_of(model)))
    assert names == ["pack_tokens_torch", *["embedding"] * 2, "add", "embedding", "add", "native_layer_norm", "copy_"]


class Doubled(BertEmbeddings):
    """A subclass with its own forward."""

    def forward(self, *arguments, **given):
        return 2 * super().forward(*arguments, **given)


class OtherEmbedding(torch.nn.Embedding):
    """An embedding that may compute something else, as that of an adapter."""


def changed(**parts):
    def change(backbone) -> None:
        for name, module in parts.items():
            backbone.embeddings.set_submodule(name, module)

    return change


def doubled(backbone) -> None:
    backbone.embeddings.__class__ = Doubled


def smaller_words(backbone) -> None:
    backbone.embeddings.word_embeddings.max_norm = 0.5


def narrow_types(backbone) -> None:
    backbone.embeddings.token_type_embeddings = torch.nn.Embedding(2, 1)


def drops_out(backbone) -> None:
    backbone.embeddings.dropout.train()


CHANGES = {
    "subclass": (doubled, "(Doubled) is not supported"),
    "max_norm": (smaller_words, "word_embeddings (Embedding) is not a plain Embedding without max_norm"),
    "other embedding": (changed(position_embeddings=OtherEmbedding(70, 64)), "position_embeddings (OtherEmbedding) is"),
    "other norm": (
        changed(LayerNorm=torch.nn.RMSNorm(64)),
        "LayerNorm (RMSNorm) is not a plain LayerNorm with a weigh",
    ),
    "no weight": (changed(LayerNorm=torch.nn.LayerNorm(64, elementwise_affine=False)), "LayerNorm (LayerNorm) is not"),
    "no norm": (changed(LayerNorm=torch.nn.Identity()), "LayerNorm (Identity) is not a plain LayerNorm"),
    "further part": (changed(adapter=torch.nn.Linear(64, 64)), "adapter (Linear) is not supported"),
    "narrow types": (narrow_types, "token_type_embeddings has embeddings of width 1, the norm has 64"),
    "dropout in training": (drops_out, "dropout (Dropout) is in training mode"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_embeddings_are_those_of_the_family(name):
    change, reason = CHANGES[name]
    model = early_exit("bert", pooling="first", dropout=1e-9)
    assert embedding_unsupported_reason(model.adapter, model.backbone) is None
    change(model.backbone)
    assert reason in embedding_unsupported_reason(model.adapter, model.backbone)
    assert resident_unsupported_reason(model.view(), torch.float32) is None, "the layers still run in a graph"
    batch = batch_of(model)
    model.set_criterion(splitting(model, batch))
    loop = loop_for(model, Bucket(8, 32), "torch", poison=True)
    assert type(loop.embed) is FamilyEmbedding
    assert_as_eager(model, loop, batch)


def test_a_dropout_that_drops_nothing_may_train():
    model = early_exit("bert", pooling="first", dropout=0.0)
    model.backbone.embeddings.dropout.train()
    assert embedding_unsupported_reason(model.adapter, model.backbone) is None


@pytest.mark.parametrize("family", BACKBONES)
def test_names_are_given_for_embeddings_of_this_form_alone(family):
    view = early_exit(family).view()
    known = {*RESIDENT, "roberta-prelayernorm"}
    assert isinstance(view.adapter.embed, EmbeddingSum) == (family in known)
    assert (embedding_unsupported_reason(view.adapter, view.backbone) is None) == (family in known)


def test_missing_part():
    view = early_exit("distilbert").view()
    adapter = dataclasses.replace(view.adapter, embed=EmbeddingSum())
    reason = embedding_unsupported_reason(adapter, view.backbone)
    assert reason == "Embeddings has no module token_type_embeddings, which the adapter names"


@pytest.mark.thorough
def test_norm_without_a_bias(backend):
    model = early_exit("modernbert", pooling="first", criterion=Patience(patience=1))
    assert model.backbone.embeddings.norm.bias is None
    loop = loop_for(model, Bucket(8, 32), backend, poison=True)
    assert type(loop.embed) is SummedEmbedding
    assert_as_eager(model, loop, batch_for(model))


def test_weights_are_read_in_place():
    model = early_exit("bert", pooling="first", criterion=Patience(patience=1))
    batch, loop = batch_of(model), loop_for(model, Bucket(8, 32), "torch")
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        before = model(**batch).logits
        with torch.no_grad():
            model.backbone.embeddings.get_submodule(name).weight.mul_(1.5)
        assert (model(**batch).logits - before).abs().max() > 1e-4
        assert_as_eager(model, loop, batch)


@pytest.mark.parametrize("name", ["subclass", "max_norm", "other norm", "further part", "replaced weight"])
def test_changed_embeddings_are_captured_again(captures, name):
    model, runner = early_exit("bert", pooling="first", criterion=Patience(patience=1)), Graphs()
    batch = batch_of(model)
    change = CHANGES[name][0] if name in CHANGES else changed(word_embeddings=torch.nn.Embedding(120, 64))
    for _ in range(2):
        out, expected = runner.run(model.view(), "torch", Inputs(**batch)), model(**batch)
        assert torch.equal(out.exit_layer, expected.exit_layer)
        torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-4)
        change(model.backbone)
    assert len(captures) == 2
