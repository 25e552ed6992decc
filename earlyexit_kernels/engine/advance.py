"""One layer and its exits on rows at any depths, whose states are kept by row instead of by request.

    rows -> gather -> embed the new ones -> layer -> for each depth and criterion: exit head -> exit_step -> progress

Rows whose next layer is the same run together; those of one depth and criterion share an exit. Nothing is written to
the rows, so that a step that raises can be taken again with fewer of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.criteria import RULES, Criterion, check_known, resolve_backend
from earlyexit_kernels.engine.exits import ExitMemory, LinearSource, ModuleSource, RequestExits
from earlyexit_kernels.engine.full_depth import hidden_of
from earlyexit_kernels.engine.packing import AttentionPlan, PackedBatch, PackedStates, plan_attention, row_keys
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.heads.bank import LinearExits
from earlyexit_kernels.ops import bare_op


@dataclass(eq=False)
class Row:
    """A row on its way through the layers.

    Attributes:
        number: in order of arrival.
        rule: the exit rule, which decides where it leaves.
        inputs: ids, positions and types ``[3, t]`` int64 of its tokens.
        tokens: t.
        arrived: clock of the pool at its arrival.
        deadline: as in `ContinuousBatch.add`.
        depth: number of layers that it has run.
        hidden: ``[t, H]`` after that layer, or None at depth 0.
        state: ``[K]`` float32, of the rule, or None at depth 0 and for K = 0.
        memory: of the exit before, ``[F]`` by name.
    """

    number: int
    rule: Criterion
    inputs: Tensor
    tokens: int
    arrived: int
    deadline: int
    depth: int = 0
    hidden: Tensor | None = None
    state: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class Progress(NamedTuple):
    """What one layer did to a row.

    Attributes:
        hidden, state, memory: as in `Row`, after the layer.
        logits: ``[C]`` float32, the answer of a row that leaves, or None.
        invalid: whether the exit has invalid logits, where that was asked for.
    """

    hidden: Tensor
    state: Tensor | None
    memory: Mapping[str, Tensor]
    logits: Tensor | None = None
    invalid: bool = False


class Step(NamedTuple):
    """What one layer did to some rows.

    Attributes:
        rows: in the order in which they ran.
        progress: of each of them.
        invalid: for each layer 1..L the number of rows with invalid logits.
    """

    rows: Sequence[Row]
    progress: list[Progress]
    invalid: list[int]


@dataclass(frozen=True)
class Weights:
    """What steps read of a model.

    Attributes:
        view: of the model; its criterion is not used.
        layers: L encoder layers ``layer(hidden, None, plan=...)``.
        linear: the exits as linears, or None where they have other modules too.
        backend: of the ops, as requested.
        device: of the model.
    """

    view: ModelView
    layers: Sequence[Callable[..., Any]]
    linear: LinearExits | None
    backend: str
    device: torch.device

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)

    def source(self, rule: Criterion, memory: ExitMemory) -> LinearSource | ModuleSource:
        """Return the source of the exits of rows with this rule and memory."""
        if rule.needs is None and self.linear is not None:
            return LinearSource(self.linear)
        return ModuleSource(self.view.heads, rule.needs, memory)


class _Group(NamedTuple):
    """Rows of one depth and rule.

    Attributes:
        rows: they lie beside each other in the step.
        offsets: ``[n + 1]`` int32, from 0.
        plan: their attention, for exits with attention.
        tokens: theirs in the step.
        state: ``[K, n]`` float32 before the exit.
        memory: of the exit before, ``[n, F]`` by name.
    """

    rows: Sequence[Row]
    offsets: Tensor
    plan: AttentionPlan
    tokens: slice
    state: Tensor
    memory: Mapping[str, Tensor]

    @property
    def rule(self) -> Criterion:
        return self.rows[0].rule

    @property
    def layer(self) -> int:
        """1-based layer that the rows run."""
        return self.rows[0].depth + 1


def advance(weights: Weights, rows: Sequence[Row], *, find_invalid: bool) -> Step:
    """Run rows through their next layer, which must be the same for all of them, and through its exits.

    Args:
        weights: of the model.
        rows: at least one.
        find_invalid: say which rows have invalid logits. Where there are some, this takes an exit for each row.
    """
    # rows that share an exit lie beside each other
    rows = sorted(rows, key=lambda row: (row.depth, id(row.rule), row.number))
    hidden = _gathered(weights, rows)
    offsets, plan = _layout(tuple(row.tokens for row in rows), hidden.device)
    groups = _groups(weights.view, rows, offsets, plan, hidden)
    after = hidden_of(weights.layers[rows[0].depth](hidden[None], None, plan=plan))[0]
    progress: list[Progress] = []
    invalid = [0] * weights.depth
    for group in groups:
        states = PackedStates(after[group.tokens], group.offsets, group.plan)
        if group.rule.is_due(group.layer, weights.depth):
            found, wrong = _decide(weights, group, states, after.shape[0])
            if wrong and find_invalid:
                found = [p._replace(invalid=_is_invalid(weights, group, states, i)) for i, p in enumerate(found)]
            invalid[group.layer - 1] += wrong
            progress += found
        else:
            owned = states.hidden.split([row.tokens for row in group.rows])
            progress += [Progress(x.clone(), row.state, row.memory) for row, x in zip(group.rows, owned, strict=True)]
    return Step(rows, progress, invalid)


@functools.lru_cache(maxsize=64)
def _layout(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, AttentionPlan]:
    """Return offsets ``[n + 1]`` int32 and attention plan of rows of these lengths; rows often stay together."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    ids = offsets[:-1]  # a plan does not depend on them
    batch = PackedBatch(None, offsets, ids, None if device.type == "cuda" else lengths, max(lengths))
    return offsets, plan_attention(batch)


def _gathered(weights: Weights, rows: Sequence[Row]) -> Tensor:
    """Return the input of the layer ``[T, H]``: embeddings of rows at depth 0, which come first, and hidden states."""
    new = [row.inputs for row in rows if row.depth == 0]
    parts = [row.hidden for row in rows if row.hidden is not None]
    if new:
        view, inputs = weights.view, new[0] if len(new) == 1 else torch.cat(new, dim=1)
        ids, positions, types = inputs.to(weights.device).unsqueeze(1).unbind()
        parts.insert(0, view.adapter.first_states(view.backbone, ids, positions, types)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _groups(view: ModelView, rows: Sequence[Row], offsets: Tensor, plan: AttentionPlan, hidden: Tensor) -> list[_Group]:
    """Return the groups of a step, with states and memory before the layer."""
    groups, first, start = [], 0, 0
    for _, members in itertools.groupby(rows, key=lambda row: (row.depth, id(row.rule))):
        own = list(members)
        end = start + sum(row.tokens for row in own)
        own_offsets, own_plan = offsets, plan
        if len(own) < len(rows):
            own_offsets = offsets[first : first + len(own) + 1] - start
            if view.heads.config.form == "attention":  # other exits do not read the plan
                own_plan = _layout(tuple(row.tokens for row in own), hidden.device)[1]
        states = PackedStates(hidden[start:end], own_offsets, own_plan)
        groups.append(_Group(own, own_offsets, own_plan, slice(start, end), *_before(view, own, states)))
        first, start = first + len(own), end
    return groups


def _before(view: ModelView, rows: Sequence[Row], states: PackedStates) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the state ``[K, n]`` and memory of rows of one depth and rule, whose input of the layer is `states`."""
    rule, device, n = rows[0].rule, states.hidden.device, len(rows)
    if rows[0].depth == 0:
        keys = None
        if rule.uses_keys:
            keys = row_keys(torch.cat([row.inputs[:1] for row in rows], dim=1).to(device), states.offsets)
        memory = {} if rule.needs is None else view.heads.first_memory(states, rule.needs)
        return rule.new_state(n, device, view.classes, keys), memory
    kept = [row.state for row in rows if row.state is not None]
    state = torch.stack(kept, dim=1) if kept else torch.empty(0, n, dtype=torch.float32, device=device)
    return state, {name: torch.stack([row.memory[name] for row in rows]) for name in rows[0].memory}


def _decide(weights: Weights, group: _Group, states: PackedStates, step_tokens: int) -> tuple[list[Progress], int]:
    """Return what the exit after a layer does to the rows of a group, and how many have invalid logits.

    Args:
        weights: of the model.
        group: its state is **changed**.
        states: tokens after the layer.
        step_tokens: tokens of all groups of the step.
    """
    rule, layer, n, device = group.rule, group.layer, len(group.rows), states.hidden.device
    if rule.name not in RULES:
        check_known(rule)
    memory = ExitMemory(group.memory)
    answers = torch.zeros(n, weights.view.classes, dtype=torch.float32, device=device)
    exits = RequestExits(rule, weights.depth, group.state, answers, torch.zeros(n, dtype=torch.int64, device=device))
    ids = torch.arange(n, dtype=torch.int32, device=device)
    inputs = weights.source(rule, memory)(layer, states, ids)
    decide = bare_op("exit_step", resolve_backend(rule.name, weights.backend, device.type), device.type)
    invalid = decide(*exits.call(layer, inputs, ids, group.offsets))[2]
    left = exits.exit_layer.tolist()
    new_memory = memory.read(torch.arange(n, device=device)) if group.memory else {}
    by_row = group.state.T.contiguous().unbind() if group.state.shape[0] else [None] * n
    found = []
    for i, own in enumerate(states.hidden.split([row.tokens for row in group.rows])):
        logits = answers[i] if left[i] else None
        # a row that stays keeps no more of the step than its own part
        hidden = own if left[i] or own.shape[0] == step_tokens else own.clone()
        found.append(Progress(hidden, by_row[i], {name: x[i].clone() for name, x in new_memory.items()}, logits))
    return found, int(invalid)


def _is_invalid(weights: Weights, group: _Group, states: PackedStates, i: int) -> bool:
    """Return whether one row of a group has invalid logits at its exit."""
    row = group.rows[i]
    start = sum(other.tokens for other in group.rows[:i])
    own = PackedStates(states.hidden[start : start + row.tokens], *_layout((row.tokens,), states.hidden.device))
    memory = {name: x[i : i + 1] for name, x in group.memory.items()}
    one = _Group([row], own.offsets, own.plan, slice(0, row.tokens), group.state[:, i : i + 1].clone(), memory)
    return bool(_decide(weights, one, own, row.tokens)[1])
