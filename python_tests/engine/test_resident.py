"""The resident loop against the eager engine, in buffers of arbitrary contents."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params
from support.models import ATTENDED, FAMILIES, batch_for, early_exit

from earlyexit_kernels.criteria import Dact, Entropy, Expectation, FullDepth, HiddenCosine, Patience, QExit, Voting
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import ResidentLoop, resident_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import Bucket


@pytest.fixture(params=backend_params(("torch", "triton")))
def backend(request) -> str:
    return request.param


def loop_for(model, bucket, backend, *, poison=False) -> ResidentLoop:
    loop = ResidentLoop(model.view(), bucket, backend, backend)
    if poison:
        for buffer in (*loop.activations.buffers, loop.answers):
            buffer.fill_(torch.nan)
    return loop


def answers(loop, batch):
    loop.load(Inputs(**batch))
    loop.launch()
    n = batch["input_ids"].shape[0]
    return loop.answers[:n].clone(), loop.exit_layer[:n].clone()


def splitting(model, batch) -> Entropy:
    """An entropy threshold at which half of the rows leave at the first exit, away from all scores."""
    logits = model.trace(**batch).logits
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    first, scores = entropies[:, 0].sort().values, entropies.flatten().sort().values
    middle = first[len(first) // 2 - 1]
    above = scores[scores > middle][0]
    return Entropy(threshold=float((middle + above) / 2))


class HostNodes:
    """Conditional nodes that the host runs. Only the CUDA op sets handles, so this replaces the exit op of a loop.

    Attributes:
        added: kinds of the nodes, in order.
        ran: number of bodies that ran.
    """

    def __init__(self, loop) -> None:
        self.values: list[int] = []
        self.added: list[str] = []
        self.ran = 0
        leave = loop.exit

        def exit_and_set(*arguments):
            *others, handle = arguments
            leave(*others, None)
            if handle is not None:
                self.values[handle] = int(arguments[9][0] > 0)

        loop.exit = exit_and_set

    def handle(self) -> int:
        self.values.append(0)
        return len(self.values) - 1

    def when(self, handle, counts, body) -> None:
        self.added.append("when")
        if self.values[handle]:
            self.ran += 1
            body()


def assert_as_eager(model, loop, batch, atol=2e-5) -> None:
    logits, exit_layer = answers(loop, batch)
    out = model(**batch)
    assert torch.equal(exit_layer, out.exit_layer)
    torch.testing.assert_close(logits, out.logits, atol=atol, rtol=1e-4)


@pytest.mark.sample(7)
@pytest.mark.parametrize("kind", ATTENDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, kind, backend):
    if backend == "triton" and (family, kind) not in (("bert", "holes"), ("roberta", "right"), ("albert", "full")):
        pytest.skip("the interpreter is slow")
    model = early_exit(family, pooling="first")
    batch = batch_for(model, kind)
    model.set_criterion(splitting(model, batch))
    loop = loop_for(model, Bucket(8, 32), backend, poison=True)
    assert_as_eager(model, loop, batch)
    assert 1 < float(loop.exit_layer[:4].float().mean()) < model.depth, "rows leave at several layers"


RULES = {
    "full depth": (FullDepth(), {}),
    "patience": (Patience(patience=1), {}),
    "voting": (Voting(threshold=0.4), {}),
    "family heads": (None, {"pooling": None}),
    "mean": (None, {"pooling": "mean"}),
    "halting": (QExit(q=0.6), {"method": "palbert"}),
    "expectation": (Expectation(), {"method": "palbert"}),
    "dact": (Dact(), {"method": "dact"}),
    "hidden cosine": (HiddenCosine(threshold=0.97), {"pooling": "first"}),
}


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", RULES)
def test_rules_and_heads(name, backend):
    if backend == "triton" and name not in ("patience", "family heads", "mean", "halting"):
        pytest.skip("the interpreter is slow")
    criterion, built = RULES[name]
    model = early_exit("bert", criterion=criterion, **{"pooling": "first", **built})
    batch = batch_for(model)
    if criterion is None:
        model.set_criterion(splitting(model, batch))
    assert_as_eager(model, loop_for(model, Bucket(4, 32), backend, poison=True), batch)


@pytest.mark.thorough
def test_successive_batches(backend):
    model = early_exit("bert", pooling="first", criterion=Patience(patience=1))
    loop = loop_for(model, Bucket(4, 32), backend)
    for lengths in [(17, 3, 9, 12), (1, 2), (6,), (30, 4, 4, 29)][: 2 if backend == "triton" else 4]:
        assert_as_eager(model, loop, batch_for(model, lengths=lengths))


@pytest.mark.parametrize("built", [{"method": "palbert"}, {"pooling": "first"}], ids=["halting", "hidden cosine"])
def test_module_exits_use_chunks_of_one_size(built, monkeypatch):
    monkeypatch.setattr("earlyexit_kernels.engine.resident_exits.EXIT_ROWS", 3)
    rule = QExit(q=0.6) if "method" in built else HiddenCosine(threshold=0.97)
    model = early_exit("bert", criterion=rule, **built)
    seen, fused = [], model.heads.fused
    monkeypatch.setattr(model.heads, "fused", lambda *given: seen.append(given[1].rows) or fused(*given))
    for lengths, rows in [((17, 3, 9, 12), 4), ((5,), 1), ((4, 9, 2, 6, 6, 3, 8), 8)]:
        loop = loop_for(model, Bucket(rows, 32), "torch", poison=True)
        batch = batch_for(model, lengths=lengths)
        loop.load(Inputs(**batch))
        loop.launch()
        assert set(seen) == {3}
        seen.clear()
        assert_as_eager(model, loop, batch)
        seen.clear()


@pytest.mark.thorough
def test_rows_do_not_depend_on_the_batch(backend):
    # bits are equal on a GPU only: here both back-ends use the products of a library, which round by the number of rows
    model = early_exit("bert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model)
    logits, exit_layer = answers(loop_for(model, Bucket(8, 32), backend), batch)
    for row in (0, 1):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        own = answers(loop_for(model, Bucket(1, 32), backend), alone)
        torch.testing.assert_close(own[0][0], logits[row], atol=1e-5, rtol=1e-4)
        assert own[1][0] == exit_layer[row]


@pytest.mark.thorough
def test_rows_without_tokens_and_invalid_rows(backend):
    model = early_exit("bert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model)
    batch["attention_mask"][2] = 0
    assert_as_eager(model, loop_for(model, Bucket(4, 32), backend), batch)
    with torch.no_grad():
        model.heads.out[0].bias[1] = torch.nan
    loop = loop_for(model, Bucket(4, 32), backend)
    assert_as_eager(model, loop, batch)
    assert loop.counts[:, 2].tolist() == [0, 4, 0, 0, 0]


@pytest.mark.thorough
def test_types_and_positions(backend):
    model = early_exit("bert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model)
    batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    loop = loop_for(model, Bucket(4, 32), backend)
    assert_as_eager(model, loop, batch)
    del batch["token_type_ids"], batch["position_ids"]
    assert_as_eager(model, loop, batch)


def test_groups_of_layers_are_conditional():
    model = early_exit("bert", pooling="first", criterion=FullDepth())
    assert loop_for(model, Bucket(1, 16), "torch").groups == [range(1, 5)]
    model.set_criterion(Entropy(threshold=0.7))
    loop = loop_for(model, Bucket(4, 32), "torch")
    assert loop.groups == [range(k, k + 1) for k in (1, 2, 3, 4)]
    nodes = HostNodes(loop)
    loop.load(Inputs(**batch_for(model)))
    loop.launch(nodes)
    deepest = int(loop.exit_layer.max())
    assert nodes.added == ["when"] * 3 and nodes.ran == deepest - 1, "the first group always runs"


@pytest.mark.parametrize("threshold", [0.0, 0.7, 2.0])
def test_a_single_row_is_not_moved(threshold):
    """A launch of a kernel that copies nothing would be a seventh of a layer's time."""
    model = early_exit("bert", pooling="first", criterion=Entropy(threshold=threshold))
    batch = {name: values[:1] for name, values in batch_for(model).items()}
    loop = loop_for(model, Bucket(1, 32), "torch", poison=True)
    loop.move = None
    assert_as_eager(model, loop, batch)


@pytest.mark.parametrize("threshold", [0.0, None, 2.0])
def test_layers_of_shared_weights_are_behind_nodes_too(threshold):
    model = early_exit("albert", pooling="first", num_hidden_groups=1)
    batch = batch_for(model)
    model.set_criterion(splitting(model, batch) if threshold is None else Entropy(threshold=threshold))
    loop = loop_for(model, Bucket(4, 32), "torch")
    nodes = HostNodes(loop)
    for _ in range(2):
        loop.load(Inputs(**batch))
        loop.launch(nodes)
        out = model(**batch)
        assert torch.equal(loop.exit_layer, out.exit_layer)
        torch.testing.assert_close(loop.answers, out.logits, atol=2e-5, rtol=1e-4)
    assert nodes.added == ["when"] * 6 and nodes.ran == 2 * (int(out.exit_layer.max()) - 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "smartbert"}, "skips layers"),
        ({"method": "fastbert"}, "attend to all tokens"),
        ({"method": "palbert", "pooling": "mean", "criterion": QExit(q=0.5)}, "exits on the mean of the tokens"),
    ],
)
def test_unsupported_model(arguments, reason):
    assert reason in resident_unsupported_reason(early_exit("bert", **arguments).view(), torch.float32)


def test_unsupported_modules():
    model = early_exit("bert", pooling="first")
    assert resident_unsupported_reason(model.view(), torch.float32) is None
    assert "float64" in resident_unsupported_reason(model.view(), torch.float64)
    for module in (model.backbone.encoder.layer[1], model.backbone.embeddings.LayerNorm, model.heads.out[0]):
        hook = module.register_forward_hook(lambda *_: None)
        assert "forward hook" in resident_unsupported_reason(model.view(), torch.float32)
        hook.remove()
    model.heads.half()
    assert "torch.float32, some are ['torch.float16']" in resident_unsupported_reason(model.view(), torch.float32)


def test_weights_of_launches_are_kept():
    """Another thread may replace weights between the check of a graph and its replay."""
    model = early_exit("bert", pooling="first")
    loop = loop_for(model, Bucket(1, 16), "torch")
    parts = [x for part in (model.backbone, model.heads) for x in (*part.parameters(), *part.buffers())]
    before = [x.data_ptr() for x in parts]
    model.double()
    assert [x.data_ptr() for x in loop.held] == before


@pytest.mark.thorough
def test_answers_ignore_the_default_dtype(backend):
    model = early_exit("bert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model)
    expected = model(**batch)
    try:
        torch.set_default_dtype(torch.float64)
        logits, exit_layer = answers(loop_for(model, Bucket(4, 32), backend), batch)
        fixed, _ = model.fixed_depth()(**batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert logits.dtype == fixed.dtype == torch.float32 and torch.equal(exit_layer, expected.exit_layer)
    torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=1e-4)


def test_buckets():
    assert [bucket_of(*shape) for shape in [(1, 1), (3, 17), (32, 128), (33, 129)]] == [
        Bucket(1, 16),
        Bucket(4, 32),
        Bucket(32, 128),
        Bucket(64, 256),
    ]
