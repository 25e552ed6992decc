"""The record of a calibration, as `calibrate` makes it and the config of a model keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from earlyexit_kernels.criteria import Criterion, from_dict


@dataclass(frozen=True)
class CurvePoint:
    """One setting of a criterion (data of `Criterion.to_dict`) on the tuning rows; layers count from 1."""

    criterion: Mapping[str, Any]
    mean_exit_layer: float
    score: float


@dataclass(frozen=True)
class Guarantee:
    """A bound on the risk that holds with a chosen probability, whatever the distribution of the rows.

    Attributes:
        delta, epsilon: the risk exceeds `delta` with a probability of at most `epsilon` over the draw of check rows.
        against: ``"labels"``: the risk is the share of rows that full depth answers correctly and the criterion does
            not; ``"full_depth"``: the share of rows with another answer than full depth.
        risk: measured on the check rows.
        p_value: of the chosen setting, at most `epsilon`.
    """

    delta: float
    epsilon: float
    against: str
    risk: float
    p_value: float


@dataclass(frozen=True)
class Calibration:
    """A criterion chosen for a target, and its results on rows that it was not chosen on, the *check* rows.

    Scores, shares and layers (from 1) are those of the check rows.

    Attributes:
        criterion: the chosen setting.
        target: name and values of the target.
        metric: name of the score; ``"agreement"`` is the share of rows with the answer of full depth.
        rows: number of rows in each split, by name: ``"tuning"`` and ``"check"``.
        full_depth, score, drop: score of full depth, of the criterion, and their difference.
        drop_interval: 95 % bootstrap interval of `drop`.
        mean_exit_layer, layer_speed_up: the latter is L / `mean_exit_layer`.
        exit_shares, layer_scores: of each layer, the share of rows that leave there, and the score of its exit alone.
        untrained: layers whose exits are no better than chance.
        curve: settings of the same rule on the tuning rows, fastest first.
        passed_over: number of faster settings that reach a `MaxDrop` target on the tuning rows, but on the check rows
            exceed it by more than a standard error.
        temperatures: by which the logits of each exit were divided before the choice, or None.
        guarantee: for a `Risk` target.
        latency, full_depth_latency: measured milliseconds of a batch, for a `Latency` target.
        date: in UTC.
        versions: of the packages, by name.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> logits = torch.tensor([[[0.0, 0.1], [3.0, 0.0]], [[0.0, 4.0], [0.0, 5.0]]]).repeat(50, 1, 1)
        >>> found = ee.calibrate(ee.ExitTrace(logits), torch.tensor([0, 1] * 50), target=ee.SpeedUp(1.2))
        >>> found.score, found.rows
        (1.0, {'tuning': 50, 'check': 50})
        >>> ee.Calibration.from_dict(found.to_dict()) == found
        True
    """

    criterion: Criterion
    target: Mapping[str, Any]
    metric: str
    rows: Mapping[str, int]
    full_depth: float
    score: float
    drop: float
    drop_interval: tuple[float, float]
    mean_exit_layer: float
    layer_speed_up: float
    exit_shares: tuple[float, ...]
    layer_scores: tuple[float, ...]
    untrained: tuple[int, ...]
    curve: tuple[CurvePoint, ...] = field(repr=False)
    passed_over: int = 0
    temperatures: tuple[float, ...] | None = None
    guarantee: Guarantee | None = None
    latency: float | None = None
    full_depth_latency: float | None = None
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.exit_shares)

    @property
    def one_layer(self) -> int | None:
        """The layer at which every check row leaves; None for the last one, and where they leave at several."""
        return next((k for k, share in enumerate(self.exit_shares[:-1], start=1) if share == 1), None)

    @property
    def target_miss(self) -> str | None:
        """By how much the check rows miss a target that is not a guarantee, in words; None where they meet it."""
        if self.target["name"] == "max_drop" and self.drop > self.target["drop"] + 1e-9:
            return f"the drop is {self.drop:.4f}"
        if self.target["name"] == "speed_up" and self.layer_speed_up < self.target["speed_up"] - 1e-9:
            return f"the layer speed-up is {self.layer_speed_up:.2f}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**_as_lists(asdict(self)), "criterion": self.criterion.to_dict()}

    @staticmethod
    def from_dict(data: Any) -> Calibration:
        """Rebuild a calibration from the data of `to_dict`.

        Raises:
            ValueError: the data is not that of a calibration.
        """
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
            }
            values["criterion"] = from_dict(values["criterion"])
            values["curve"] = tuple(CurvePoint(**point) for point in values["curve"])
            if values.get("guarantee") is not None:
                values["guarantee"] = Guarantee(**values["guarantee"])
            return Calibration(**values)
        except (AttributeError, KeyError, TypeError) as error:
            names = sorted(f.name for f in fields(Calibration))
            got = sorted(data) if isinstance(data, Mapping) else repr(data)
            raise ValueError(
                f"calibration: expected the data of Calibration.to_dict, with {names}, got {got} ({error})"
            ) from error

    @staticmethod
    def of(model: Any) -> Calibration | None:
        """Return how the criterion of a model was chosen; None if another one is set, or after training.

        Raises:
            ValueError: the config has something else than a calibration.
        """
        data = model.config.calibration
        found = None if data is None else Calibration.from_dict(data)
        return found if found is not None and found.criterion == model.criterion else None

    def apply(self, model: Any) -> None:
        """Set the criterion on the model whose exits were calibrated, and store the calibration in its config."""
        model.set_criterion(self.criterion)
        model.config.calibration = self.to_dict()

    def __str__(self) -> str:
        target = ", ".join(f"{name} {value}" for name, value in self.target.items() if name != "name")
        low, high = self.drop_interval
        lines = [f"{self.criterion}"]
        if self.passed_over:
            were = "setting was" if self.passed_over == 1 else "settings were"
            lines.append(
                f"  note         {self.passed_over} faster {were} passed over: within the target on the tuning rows, "
                "beyond it by more than a standard error on the check rows"
            )
        lines += [
            f"  target       {self.target['name']}: {target}",
            f"  chosen on    {self.rows['tuning']} rows; checked on {self.rows['check']} other rows:",
            f"  {self.metric:12} {self.score:.4f}, full depth {self.full_depth:.4f}, drop {self.drop:.4f} "
            f"(95 %: {low:.4f} to {high:.4f})",
            f"  mean layer   {self.mean_exit_layer:.2f} of {self.depth} ({self.layer_speed_up:.2f}x fewer layers)",
            "  exit shares  " + " ".join(f"{share:.0%}" for share in self.exit_shares),
        ]
        if self.guarantee is not None:
            g = self.guarantee
            lines.append(
                f"  guarantee    risk against {g.against} at most {g.delta:g} with probability {1 - g.epsilon:g} "
                f"(measured {g.risk:.4f}, p = {g.p_value:.3g})"
            )
        if self.latency is not None:
            full = "" if self.full_depth_latency is None else f", full depth {self.full_depth_latency:.2f} ms"
            lines.append(f"  latency      {self.latency:.2f} ms a batch{full}")
        if (miss := self.target_miss) is not None:
            lines.append(f"  note         on the check rows {miss}; the target is met on the tuning rows")
        if self.one_layer is not None:
            lines.append(f"  note         every check row leaves at layer {self.one_layer}: the layers above never run")
        if self.untrained:
            lines.append(f"  warning      no better than chance: exits {', '.join(map(str, self.untrained))}")
        return "\n".join(lines)


def _as_lists(value: Any) -> Any:
    """Return the value with tuples as lists, as JSON stores them."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return {k: _as_lists(v) for k, v in value.items()} if isinstance(value, Mapping) else value
