"""Choose the setting of a criterion for a target, on one part of the rows, and report what it costs on the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from earlyexit_kernels.criteria import Criterion, FixedLayer, FullDepth
from earlyexit_kernels.hf.model import early_exit_model_in
from earlyexit_kernels.tuning.metrics import METRICS, predictions_of
from earlyexit_kernels.tuning.ranking import RANKING_METRICS, check_groups
from earlyexit_kernels.tuning.record import Calibration, CurvePoint, Guarantee
from earlyexit_kernels.tuning.rows import AGREEMENT, Rows, Setting, exit_shares
from earlyexit_kernels.tuning.settings import GRIDS, settings
from earlyexit_kernels.tuning.targets import Choice, Latency, MaxDrop, Risk, SpeedUp, Target, refine, risk_p_values
from earlyexit_kernels.tuning.temperature import fit_temperatures, scale_exits, scaled
from earlyexit_kernels.tuning.timing import BatchLatency
from earlyexit_kernels.tuning.traces import collect_trace
from earlyexit_kernels.types import ExitTrace, default_problem_type

#: Share of the rows that are check rows.
CHECK = 0.5
#: Minimum number of tuning rows and of check rows: on fewer, settings that ruin the answers look harmless.
MIN_ROWS = 25
DEFAULT_METRIC = {"regression": "pearson", "ranking": "ndcg"}


def calibrate(
    model_or_trace: Any,
    data: Any = None,
    *,
    target: Target,
    criterion: str | Sequence[Criterion] = "entropy",
    metric: str | None = None,
    check: float = CHECK,
    points: int = 48,
    per_layer: bool = False,
    temperature: bool = False,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    problem_type: str | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Calibration:
    """Choose the setting of a criterion for a target, and set it on the model.

    One full-depth pass over the data is replayed for every setting. The rows are split at random: the setting is chosen
    on the *tuning* rows, and what it costs is measured on the *check* rows. Use rows that the model was not trained on.

    Args:
        model_or_trace: an early-exit model, on which the chosen criterion and the calibration are set, and which is
            left in eval mode; or the trace of one.
        data: for a model the data set, whose items are mappings with ``input_ids`` and ``labels``; for a trace the
            labels ``[N]``. Without labels the answers of full depth are taken for labels, and the metric is
            ``"agreement"``.
        target: `MaxDrop`, `SpeedUp`, `Latency` (with a model) or `Risk` (requires the extra ``tuning``).
        criterion: name of a rule; ``"auto"``: every rule that the exits allow, fixed cuts too, with a warning where
            no rule beats a cut; or settings to choose from.
        metric: name in `tuning.metrics.METRICS`, or with `groups` in `tuning.ranking.RANKING_METRICS`; default:
            accuracy, Pearson correlation for regression, NDCG with `groups`.
        check: share of the rows that are check rows, in (0, 1).
        points: approximate number of thresholds to try per rule, at least 8.
        per_layer: after the choice, search for a threshold of each layer; with `MaxDrop` and `SpeedUp`.
        temperature: first divide the logits of each exit by a temperature, fitted on the tuning rows. The exits of the
            model are changed (the labels of each exit are not).
        batch_size: rows per batch of the full-depth pass.
        collate_fn: pads a list of items; default: pad on the right with the pad token of the backbone.
        problem_type: as in transformers; default: that of the model or trace.
        groups: for a model with one output, the query that each row is a document of, ``[N]``; labels are relevances of
            at least 0, queries are not divided by the split, and each part has `MIN_ROWS` queries to rank or more.
        seed: of the split.

    Returns:
        The calibration; `Calibration.of(model)` returns it too, also after `save_pretrained` and a load.

    Raises:
        ValueError: the target cannot be reached (the message names the nearest setting), a rule that the exits do not
            allow or that cannot be replayed, labels that do not fit the trace, or fewer than `MIN_ROWS` tuning rows or
            check rows.
        ImportError: `Risk` without MAPIE.

    Differs from CALM (Schuster et al., NeurIPS 2022) in `Risk`: the order of the tests is found on other rows than
    those tested on, so that it may be any order.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> labels = torch.arange(400) % 2
        >>> right = torch.nn.functional.one_hot(labels, 2).float()
        >>> easy = (torch.arange(400) % 3 > 0)[:, None]
        >>> trace = ee.ExitTrace(torch.stack([right * easy * 4, right * 6], dim=1))  # two exits
        >>> found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.0))
        >>> found.score, round(found.mean_exit_layer, 1)
        (1.0, 1.3)
    """
    model = _checked_model(model_or_trace, target, per_layer, temperature)
    if model is None:
        trace, labels = model_or_trace, None if data is None else np.asarray(data)
    else:
        trace, labels = collect_trace(model, data, collate_fn=collate_fn, batch_size=batch_size)
    rows = _rows(trace, labels, metric, problem_type, target, groups)
    tuning, checked = _split(rows, check, seed)
    if isinstance(target, Risk):
        target.check_rows(len(checked), len(rows))
    _check_enough(rows, tuning, checked, check)
    temperatures = None
    if temperature:
        temperatures = _temperatures(tuning, model)
        tuning, checked = (replace(part, trace=scaled(part.trace, temperatures)) for part in (tuning, checked))
    candidates = tuning.settings(_candidates(tuning, criterion, points))
    timed = None
    if isinstance(target, Latency):
        timed = BatchLatency(model, data, batch_size=target.batch_size, collate_fn=collate_fn)
    choose = partial(target.choose, tuning=tuning, checked=checked, timed=timed)
    choice = choose(candidates)
    if per_layer:
        choice = refine(choice, candidates, tuning, choose)
    found = _calibration(choice, target, candidates, tuning, checked, timed)
    if model is not None:
        if temperatures is not None:
            scale_exits(model, temperatures)
            found = replace(found, temperatures=temperatures)
        found.apply(model)
    for message in _warnings(found, criterion):
        warnings.warn(message, stacklevel=2)
    return found


def _warnings(found: Calibration, criterion: Any) -> Iterator[str]:
    """Yield what is doubtful about a calibration."""
    if found.depth in found.untrained:
        yield (
            f"calibrate: the last exit is no better than chance ({found.metric} {found.full_depth:.3f}); train the "
            "model first"
        )
    layer = found.one_layer
    if layer is not None and criterion == "auto" and isinstance(found.criterion, FixedLayer):
        yield (
            f"calibrate: no rule beats a fixed cut on the {found.rows['tuning']} tuning rows: every row leaves at "
            f"layer {layer}, and model.truncate({layer}) is the model without the layers above"
        )
    elif layer is not None and not isinstance(found.criterion, FixedLayer):
        yield (
            f"calibrate: every one of the {found.rows['check']} check rows leaves at layer {layer} under "
            f"{found.criterion.name}, set on {found.rows['tuning']} tuning rows, so that the layers above never run; "
            f"give more rows, or take FixedLayer(layer={layer}) if that is meant"
        )


def _checked_model(model_or_trace: Any, target: Any, per_layer: bool, temperature: bool) -> Any:
    """Return the early-exit model, or None for a trace, after a check of what the target and the options require.

    Raises:
        ValueError: neither a model nor a trace, not a target, or an option that does not fit them.
    """
    if not isinstance(target, Target):
        raise ValueError(f"calibrate: expected target=MaxDrop(0.005), SpeedUp, Latency or Risk, got {target!r}")
    model = early_exit_model_in(model_or_trace) if isinstance(model_or_trace, torch.nn.Module) else None
    if model is None and not isinstance(model_or_trace, ExitTrace):
        raise ValueError(
            f"calibrate: expected an early-exit model or a trace, as model.trace(**batch) returns, got "
            f"{type(model_or_trace).__name__}"
        )
    if per_layer and not isinstance(target, (MaxDrop, SpeedUp)):
        raise ValueError(f"calibrate: per_layer=True is for MaxDrop and SpeedUp, got {target}")
    if temperature and model is None:
        raise ValueError("calibrate: temperature=True changes the exits of a model, got a trace")
    if isinstance(target, Latency) and model is None:
        raise ValueError("calibrate: Latency is measured, which requires a model and its data set, got a trace")
    return model


def _rows(
    trace: ExitTrace,
    labels: NDArray | None,
    metric: str | None,
    problem_type: str | None,
    target: Target,
    groups: ArrayLike | None,
) -> Rows:
    """Check labels and metric against a trace.

    Raises:
        ValueError: names what does not fit.
    """
    task = problem_type or trace.problem_type or default_problem_type(trace.logits.shape[2])
    full = predictions_of(trace.logits[:, -1].numpy(), task)
    invalid = int((~np.isfinite(trace.logits.numpy())).any(axis=(1, 2)).sum())
    if invalid:
        raise ValueError(f"calibrate: expected finite logits, got NaN or infinity in {invalid} of {len(full)} rows")
    if labels is None or (isinstance(target, Risk) and target.against == "full_depth"):
        if task == "regression":
            raise ValueError("calibrate: expected labels; numbers have no agreement with full depth")
        return Rows(trace, full, AGREEMENT, task)
    if labels.shape != full.shape:
        raise ValueError(
            f"calibrate: expected a label for each row of the trace, {list(full.shape)}, got {list(labels.shape)}"
        )
    if isinstance(target, Risk) and task == "regression":
        raise ValueError("calibrate: Risk counts wrong answers, and is not defined for regression")
    classes = 2 if task == "multi_label_classification" else trace.logits.shape[2]
    if task != "regression" and not np.isin(labels, np.arange(classes)).all():
        wrong = labels[~np.isin(labels, np.arange(classes))][0]
        raise ValueError(f"calibrate: expected labels in [0, {classes - 1}], got {wrong}")
    if not np.isfinite(np.asarray(labels, dtype=np.float64)).all():
        raise ValueError("calibrate: expected finite labels, got NaN or infinity")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"calibrate: expected at least two different labels, all {len(labels)} are {labels.flat[0]}")
    of_groups = None if groups is None else _checked_groups(groups, labels, task)
    name = metric or DEFAULT_METRIC.get(task if of_groups is None else "ranking", "accuracy")
    known = sorted({**METRICS, **({} if of_groups is None else RANKING_METRICS)})
    if name not in known:
        hint = "; it ranks the rows of a query, which groups= names" if name in RANKING_METRICS else ""
        raise ValueError(f"calibrate: expected metric to be one of {known}, got {name!r}{hint}")
    return Rows(trace, labels, name, task, of_groups)


def _checked_groups(groups: ArrayLike, labels: NDArray, problem_type: str) -> NDArray:
    """Return the groups as an array.

    Raises:
        ValueError: groups without one output a row, in another number than the labels, or a negative label.
    """
    found = np.asarray(groups)
    if problem_type != "regression" or found.shape != labels.shape:
        raise ValueError(
            f"calibrate: expected groups= of shape [N] for a model with one output, got {list(found.shape)} for "
            f"labels {list(labels.shape)} of {problem_type}"
        )
    if (labels < 0).any():
        raise ValueError(f"calibrate: expected labels of at least 0, the relevance, with groups=, got {labels.min()}")
    return found


def _split(rows: Rows, check: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows at random into tuning and check rows.

    Raises:
        ValueError: `check` is out of range, or a part would be empty.
    """
    if not 0 < check < 1:
        raise ValueError(f"calibrate: expected check in (0, 1), the share of the rows to check on, got {check!r}")
    tuning, checked = split_indices(len(rows), check, seed, groups=rows.groups)
    return rows.take(tuning), rows.take(checked)


def _check_enough(rows: Rows, tuning: Rows, checked: Rows, check: float) -> None:
    """Raise ValueError if a part has fewer than `MIN_ROWS` rows, or of a ranking queries that count."""
    if rows.metric in RANKING_METRICS:
        for name, part in {"tuning": tuning, "check": checked}.items():
            assert part.groups is not None
            check_groups(f"calibrate: {name} rows", part.labels, part.groups, least=MIN_ROWS)
    needed = math.ceil(MIN_ROWS / min(check, 1 - check))
    if len(rows) < needed:
        raise ValueError(
            f"calibrate: expected at least {needed} rows, of which {MIN_ROWS} or more are tuning rows and as many are "
            f"check rows, got {len(rows)}; on so few, a setting that ruins the answers may look harmless"
        )


def split_indices(
    rows: int, check: float = CHECK, seed: int = 0, *, groups: ArrayLike | None = None
) -> tuple[NDArray, NDArray]:
    """Return the indices of the tuning and of the check rows, each ascending; rows of one group stay together.

    Raises:
        ValueError: one of the parts would be empty.
    """
    if groups is not None:
        number = np.unique(np.asarray(groups), return_inverse=True)[1]
        parts = split_indices(number.max() + 1, check, seed)
        tuning, checked = (np.flatnonzero(np.isin(number, part)) for part in parts)
        return tuning, checked
    count = round(rows * check)
    if not 1 <= count < rows:
        raise ValueError(f"calibrate: expected rows to choose on and rows to check on, got {rows} rows in total")
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])


def _temperatures(tuning: Rows, model: Any) -> tuple[float, ...]:
    """Return the temperature of each exit on the tuning rows."""
    if tuning.problem_type != "single_label_classification":
        raise ValueError(f"calibrate: temperature=True is for one class a row, got {tuning.problem_type}")
    if len(model.heads.out) != tuning.trace.depth:
        raise ValueError(
            "calibrate: temperature=True requires an exit of its own for each layer, this model shares one"
        )
    return fit_temperatures(tuning.trace, tuning.labels)


def _candidates(tuning: Rows, criterion: Any, points: int) -> list[Criterion]:
    """Return the settings to choose from.

    Raises:
        ValueError: the rule is unknown, or cannot be replayed on this trace.
    """
    if not isinstance(criterion, str):
        given = list(criterion) if isinstance(criterion, (list, tuple)) else [criterion]
        if not given or not all(isinstance(rule, Criterion) for rule in given):
            raise ValueError(
                f"calibrate: expected criterion to be a name, 'auto', or a list of criteria, got {criterion!r}"
            )
        return given
    found = settings(tuning.trace, points=points, problem_type=tuning.problem_type)
    if criterion == "auto":  # fixed cuts first: of settings that do the same they are the simplest
        cuts = found.pop(FixedLayer.name)
        return [*cuts, *(rule for group in found.values() for rule in group)]
    if criterion not in found:
        hint = ""
        if criterion == "skip_gate":
            hint = "; a rule that skips layers cannot be replayed: calibrate its exit rule, e.g. 'entropy'"
        elif criterion in GRIDS:
            hint = f"; the exits or the problem type {tuning.problem_type} do not allow it"
        raise ValueError(f"calibrate: expected criterion to be 'auto' or one of {list(found)}, got {criterion!r}{hint}")
    return list(found[criterion])


def _calibration(
    choice: Choice,
    target: Target,
    candidates: Sequence[Setting],
    tuning: Rows,
    checked: Rows,
    timed: Callable[[Criterion], float] | None,
) -> Calibration:
    """Measure the chosen setting on the check rows."""
    (answers,) = checked.replay([choice.setting.criterion])
    rule, predictions, layers = answers.criterion, checked.predictions(answers), answers.exit_layer
    depth, full = checked.trace.depth, checked.full_depth
    full_score, early_score = checked.score(full), checked.score(predictions)
    lost = checked.lost(predictions)
    curve = [CurvePoint(s.criterion.to_dict(), s.mean_exit_layer, s.score) for s in candidates]
    guarantee = None
    if isinstance(target, Risk):
        p_value = float(risk_p_values([lost], target.delta)[0])
        guarantee = Guarantee(target.delta, target.epsilon, target.against, float(lost.mean()), p_value)
    return Calibration(
        criterion=rule,
        target=target.to_dict(),
        metric=checked.metric,
        rows={"tuning": len(tuning), "check": len(checked)},
        full_depth=full_score,
        score=early_score,
        drop=full_score - early_score,
        drop_interval=checked.drop_interval(predictions),
        mean_exit_layer=float(layers.mean()),
        layer_speed_up=depth / float(layers.mean()),
        exit_shares=exit_shares(layers, depth),
        layer_scores=tuple(checked.score(checked.at_layer(layer)) for layer in range(1, depth + 1)),
        passed_over=choice.passed_over,
        untrained=tuple(layer for layer in range(1, depth + 1) if checked.is_chance(layer)),
        curve=tuple(p for p in reversed(curve) if p.criterion["name"] == rule.name),
        guarantee=guarantee,
        latency=None if timed is None else timed(rule),
        full_depth_latency=None if timed is None else timed(FullDepth()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in ("earlyexit_kernels", "torch", "transformers")},
    )
