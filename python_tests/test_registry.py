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
from earlyexit_kernels.backbones import BACKBONES, BackboneAdapter, adapter_of
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
def test_criterion_is_complete(name):
    """Its class, its file and its source; a rule also has parameters, shapes and a step in Triton."""
    cls, rule = CRITERIA[name], example(name)
    assert cls.name == name and issubclass(cls, Criterion) and type(rule) is cls
    assert cls.__name__ in ee.criteria.__all__ and getattr(ee.criteria, cls.__name__) is cls
    assert inspect.getmodule(cls).__file__.endswith(f"{name}.py"), "one file per rule, named as in the table"
    if name != "full_depth":
        assert SOURCE.search(inspect.getmodule(cls).__doc__)
    if name not in RULES:
        return
    assert rule.exit_rule is rule and rule.skip_from is None and cls.tasks
    assert len(rule.params(1)) <= criteria.base.MAX_PARAMS
    assert cls.rule is not Criterion.rule, "no torch rule"
    assert cls.needs is None or cls.needs in AUX_ACTIVATIONS
    if not backends._TRITON_MISSING:
        assert tuple(inspect.signature(cls.triton_step.fn).parameters) == STEP_ARGUMENTS
    rows, classes = 5, 3
    state = rule.new_state(rows, torch.device("cpu"), classes, torch.arange(rows))
    aux = None if rule.needs is None else torch.rand(rows)
    answer, leave, new_state = rule.rule(torch.randn(rows, classes), aux, state, 1, 4, rule.params(1))
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
    (most,) = re.findall(r"constexpr int kMaxParams = (\d+);", (CSRC / "call.h").read_text())
    assert int(most) == criteria.base.MAX_PARAMS
    if not ee.available_backends("cpu")["cpp"]:
        from earlyexit_kernels import _C

        assert set(_C.criteria) == set(RULES)


def test_backbones_are_complete():
    """Their fields are checked where they are registered."""
    for name, adapter in BACKBONES.items():
        assert isinstance(adapter, BackboneAdapter) and adapter is adapter_of(name) and adapter.model_type == name


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
    assert method.rule in CRITERIA
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    for shares_layers in (True, False):
        changes = method.head_changes(shares_layers)
        assert set(changes) <= known
        HeadConfig(**changes)


PUBLIC = [(ee, name) for name in ee.__all__] + [(ops, name) for name in ops.__all__]
PUBLIC += [(ee.criteria, name) for name in ee.criteria.__all__]
PUBLIC += [(ee.methods, name) for name in ee.methods.__all__]


def without_docstring(module, name) -> list[str]:
    thing = getattr(module, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)):
        return []
    text = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
    bare = [] if len(text) > 20 and not text.startswith(f"{name}(") else [name]
    if inspect.isclass(thing):
        methods = {k: v for k, v in vars(thing).items() if not k.startswith("_") and inspect.isfunction(v)}
        inherited = {k for base in thing.__mro__[1:] for k in vars(base)}
        bare += [f"{name}.{k}" for k, v in methods.items() if not v.__doc__ and k not in inherited]
    return bare


def test_public_names_have_docstrings_of_their_own():
    assert [bare for module, name in PUBLIC for bare in without_docstring(module, name)] == []


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
