"""The fixed-depth mode compiled, exported and captured in a CUDA graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import batch_for, run_python
from support.rule_models import RULES, assert_same_answers, model_for_rule, part_of
from torch.export import Dim


@pytest.fixture
def no_old_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


#: A criterion of each kind: of keys, of logits, of labels, of hidden states, of a state, of gates.
COMPILED = ("sampled_exit", "entropy", "patience", "hidden_cosine", "voting", "dact", "skip_gate")


@pytest.mark.sample(99)
@pytest.mark.parametrize(
    ("name", "family"), list(zip(COMPILED, itertools.cycle(("bert", "roberta", "albert")), strict=False))
)
def test_compiles_without_graph_breaks(name, family, no_old_graphs):
    """One compilation serves all batch sizes and lengths."""
    model, batch = model_for_rule(name, family, num_hidden_layers=2)
    compiled = torch.compile(model.fixed_depth(), fullgraph=True, dynamic=True, backend="eager")
    assert_same_answers(compiled(**batch), model(**batch))
    part = part_of(batch, slice(4, 10), 11)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_answers(compiled(**part), model(**part))


@pytest.mark.thorough
def test_compiles_with_inductor(no_old_graphs):
    model, batch = model_for_rule("sampled_exit", num_hidden_layers=2, pooling="mean")
    compiled = torch.compile(model.fixed_depth(), fullgraph=True)
    assert_same_answers(compiled(**batch), model(**batch))


def exported(model, batch):
    """Export a model for all batch sizes and lengths."""
    rows, tokens = Dim("rows"), Dim("tokens", max=model.config.backbone_config.max_position_embeddings - 2)
    sizes = {name: {0: rows, 1: tokens} for name in batch}
    return torch.export.export(model.fixed_depth(), (), dict(batch), dynamic_shapes=sizes)


def ops_of(program):
    """Return the names of the ops of a program, including its subgraphs."""
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.sample(99)
@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "sampled_exit"), ("roberta", "entropy"), ("albert", "skip_gate"), ("distilbert", "dact")],
)
def test_exports_with_dynamic_shapes(family, name):
    """The program contains only torch ops and no constants, which would be copied to the GPU at every run."""
    model, batch = model_for_rule(name, family, num_hidden_layers=2)
    program = exported(model, batch)
    assert set(program.constants) <= {buffer for buffer, _ in model.named_buffers()}
    assert not any("earlyexit" in op for op in ops_of(program))
    run = program.module()
    for lengths in ([7, 30, 12], [9], [1, 1]):
        other = batch_for(model, lengths=lengths, seed=2)
        answers = run(**other)
        assert_same_answers(answers, model(**other))
        assert not answers[0].requires_grad


#: Runs a saved program where neither this package nor transformers can be imported.
PROGRAM = """
import sys
sys.modules["earlyexit_kernels"] = sys.modules["transformers"] = None
import torch
folder = sys.argv[1]
batch = torch.load(folder + "/batch.pt", weights_only=True)
answers = torch.export.load(folder + "/fixed.pt2").module()(**batch)
assert not answers[0].requires_grad
torch.save(answers, folder + "/answers.pt")
"""


@pytest.mark.thorough
def test_saved_program_needs_only_torch(tmp_path):
    model, batch = model_for_rule("sampled_exit", num_hidden_layers=2)
    with torch.no_grad():  # gradients are disabled already
        torch.export.save(exported(model, batch), tmp_path / "fixed.pt2")
    other = batch_for(model, lengths=[7, 30, 12])
    torch.save(other, tmp_path / "batch.pt")
    run_python(PROGRAM, str(tmp_path))
    assert_same_answers(torch.load(tmp_path / "answers.pt", weights_only=True), model(**other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_cuda_graph_capture(name, dtype):
    model, batch = model_for_rule(name)
    model.to("cuda", dtype)
    fixed = model.fixed_depth()
    first, second = ({k: v.cuda() for k, v in part_of(batch, rows).items()} for rows in (slice(0, 8), slice(8, 16)))
    static = {name: values.clone() for name, values in first.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fixed(**static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, exit_layer = fixed(**static)
    for given in (second, first):
        for name, values in given.items():
            static[name].copy_(values)
        graph.replay()
        expected_logits, expected_layer = fixed(**given)
        assert torch.equal(logits, expected_logits) and torch.equal(exit_layer, expected_layer)
