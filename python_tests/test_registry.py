"""Contract of the tables of criteria, backbones and methods; maximum sizes of files, functions and kernels."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from support.criterion_cases import example

import earlyexit_kernels as ee
from earlyexit_kernels import backends, criteria, ops
from earlyexit_kernels.backbones import BACKBONES, BackboneAdapter, StockHead, adapter_of
from earlyexit_kernels.criteria import CRITERIA, RULES, Criterion
from earlyexit_kernels.criteria.registration import STEP_ARGUMENTS
from earlyexit_kernels.heads import HeadConfig
from earlyexit_kernels.methods import METHODS, PARTS, Method, method_of
from earlyexit_kernels.methods.base import TASK_LOSSES
from earlyexit_kernels.types import AUX_ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
#: A paper by its number, or the words for what has no paper.
SOURCE = re.compile(
    r"arXiv\s+(//\s*)?\d{4}\.\d{4,5}|ACL\s+(//\s*)?Anthology\s+(//\s*)?\d{4}\.[a-z.-]+\d+|Source: this package\."
)


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion_name_class_and_file_agree(name):
    cls = CRITERIA[name]
    assert cls.name == name and issubclass(cls, Criterion) and type(example(name)) is cls
    assert cls.__name__ in ee.criteria.__all__ and getattr(ee.criteria, cls.__name__) is cls
    assert inspect.getmodule(cls).__file__.endswith(f"{name}.py"), "one file per rule, named as in the table"


@pytest.mark.parametrize("name", RULES)
def test_rule_is_complete(name):
    cls, rule = RULES[name], example(name)
    assert rule.exit_rule is rule and rule.skip_from is None
    assert len(rule.params(1)) <= criteria.base.MAX_PARAMS
    assert cls.rule is not Criterion.rule, "no torch rule"
    assert cls.needs is None or cls.needs in AUX_ACTIVATIONS
    assert cls.tasks
    if not backends._TRITON_MISSING:
        assert tuple(inspect.signature(cls.triton_step.fn).parameters) == STEP_ARGUMENTS


@pytest.mark.parametrize("name", RULES)
def test_torch_rule_returns_the_documented_shapes(name):
    rule = example(name)
    rows, classes = 5, 3
    state = rule.new_state(rows, torch.device("cpu"), classes, torch.arange(rows))
    aux = None if rule.needs is None else torch.rand(rows)
    z = torch.randn(rows, classes)
    answer, leave, new_state = rule.rule(z, aux, state, 1, 4, rule.params(1))
    assert answer.shape == (rows, classes) and answer.dtype == torch.float32
    assert leave.shape == (rows,) and leave.dtype == torch.bool
    assert new_state.shape == state.shape == (len(rule.initial_state(classes)), rows)


@pytest.mark.parametrize("name", RULES)
def test_cpp_functor_agrees_with_the_rule(name):
    header = (CSRC / "criteria.h").read_text()
    (functor,) = re.findall(rf"X\({name}, (\w+)\)", header)
    (said,) = re.findall(rf"struct {functor} : Uses<(\w+), (\d+), (\d+), (\d+)>", header)
    rule = example(name)
    per_class = len(rule.initial_state(8)) - len(rule.initial_state(7))
    width = len(rule.initial_state(7)) - 7 * per_class
    assert said == ("false" if rule.needs is None else "true", str(len(rule.params(1))), str(width), str(per_class))


def test_python_and_cpp_list_the_same_rules_in_one_order():
    header = (CSRC / "criteria.h").read_text()
    listed = re.findall(r"X\((\w+), (\w+)\)", header)
    assert [name for name, _ in listed] == list(RULES)
    assert re.findall(r"struct (\w+) : Uses<", header) == [functor for _, functor in listed]
    if not ee.available_backends("cpu")["cpp"]:
        from earlyexit_kernels import _C

        assert set(_C.criteria) == set(RULES)


def test_max_params_are_equal_in_python_and_cpp():
    (most,) = re.findall(r"constexpr int kMaxParams = (\d+);", (CSRC / "call.h").read_text())
    assert int(most) == criteria.base.MAX_PARAMS


@pytest.mark.parametrize(
    ("text", "names_one"),
    [
        ("PABEE. NeurIPS 2020, arXiv\n// 2006.04152.", True),
        ("BERxiT. EACL 2021, ACL Anthology 2021.eacl-main.8: a head", True),
        ("// Source: this package.", True),
        ("A rule of this package.", False),
        ("arXiv, NeurIPS 2020", False),
    ],
)
def test_what_names_a_source(text, names_one):
    assert bool(SOURCE.search(text)) == names_one


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "full_depth"])
def test_criterion_names_its_source(name):
    assert SOURCE.search(inspect.getmodule(CRITERIA[name]).__doc__)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_is_complete(name):
    adapter = BACKBONES[name]
    assert isinstance(adapter, BackboneAdapter) and adapter is adapter_of(name)
    assert adapter.model_type == name
    assert isinstance(adapter.head, StockHead)
    assert all(callable(part) for part in (adapter.embed, adapter.layers, adapter.positions, adapter.longest))


def test_unknown_backbone_lists_the_supported_ones():
    with pytest.raises(ValueError, match=r"'t5'.*'albert', 'bert'"):
        adapter_of("t5")


@pytest.mark.parametrize("name", METHODS)
def test_method_is_complete(name):
    cls = METHODS[name]
    assert issubclass(cls, Method) and METHODS[cls.name] is cls
    assert cls.__name__ in ee.methods.__all__ and getattr(ee.methods, cls.__name__) is cls
    module = inspect.getmodule(cls)
    assert module.__file__.endswith(f"{cls.name}.py"), "one file per paper, named as in the table"
    assert SOURCE.search(module.__doc__)
    assert cls.__dataclass_params__.frozen and all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.loss is not Method.loss and cls.tasks <= set(TASK_LOSSES)
    method = method_of(name)
    assert method == cls() == method_of(json.loads(json.dumps(method.to_dict())))
    trained = [phase.trains for phase in method.phases]
    assert all(trained) and {"backbone", "early_exits", "last_exit"} <= frozenset.union(*trained) <= set(PARTS)
    assert len({phase.name for phase in method.phases}) == len(trained)
    assert all(phase.epochs > 0 and phase.lr > 0 for phase in method.phases)


@pytest.mark.parametrize("name", METHODS)
def test_method_agrees_with_the_other_tables(name):
    """Its exit rule is a criterion, and its head changes are fields of `HeadConfig`."""
    method = method_of(name)
    assert method.rule in CRITERIA
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    for shares_layers in (True, False):
        changes = method.head_changes(shares_layers)
        assert set(changes) <= known
        HeadConfig(**changes)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"method: expected one of .*'joint'.* got 'magic'"):
        method_of("magic")


PUBLIC = [(ee, name) for name in ee.__all__] + [(ops, name) for name in ops.__all__]
PUBLIC += [(ee.criteria, name) for name in ee.criteria.__all__]
PUBLIC += [(ee.methods, name) for name in ee.methods.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda v: getattr(v, "__name__", v))
def test_public_names_have_docstrings(module, name):
    thing = getattr(module, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)):
        return
    text = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), f"{name} has no docstring of its own"
    if inspect.isclass(thing):
        methods = {k: v for k, v in vars(thing).items() if not k.startswith("_") and inspect.isfunction(v)}
        inherited = {k for base in thing.__mro__[1:] for k in vars(base)}
        bare = [k for k, v in methods.items() if not v.__doc__ and k not in inherited]
        assert not bare, f"{name}: methods without a docstring: {bare}"


def functions() -> list[tuple[Path, ast.FunctionDef]]:
    found = []
    for path in (ROOT / "earlyexit_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text())
        found += [(path, n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return found


def is_kernel(function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "jit" for d in function.decorator_list)


def code_lines(function) -> int:
    """Return the number of lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_no_function_is_longer_than_60_lines_nor_a_kernel_than_90():
    lengths = {
        (str(path.relative_to(ROOT)), f.name, 90 if is_kernel(f) else 60): code_lines(f) for path, f in functions()
    }
    assert len(lengths) > 100
    assert {where: lines for where, lines in lengths.items() if lines > where[2]} == {}


def test_a_kernel_has_at_most_18_arguments_at_run_time():
    kernels = {f.name: f for _, f in functions() if is_kernel(f)}
    assert {"exit_step_kernel", "compact_kernel", "gather_rows_kernel"} <= set(kernels)
    counted = {
        name: sum("constexpr" not in ast.unparse(a.annotation) if a.annotation else True for a in f.args.args)
        for name, f in kernels.items()
    }
    assert {name: count for name, count in counted.items() if count > 18} == {}
