"""What we set out to reach, by case, dtype and baseline; and efficiency, which some goals are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.end_to_end.baselines import PLAIN

#: Baselines that depend on the case: the faster of the other runtimes, and our own model at full depth.
PEER, OWN_FULL = "faster peer", "our full depth"


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        value: the number.
        of: ``"efficiency"``, to reach it; or another number of a record, such as ``"ratio"``, to stay at or below it.
    """

    value: float
    of: str = "ratio"

    def met(self, record: Mapping[str, Any]) -> bool:
        """Whether a record with numbers reaches it."""
        number = record[self.of]
        return number >= self.value if self.of == "efficiency" else number <= self.value


def efficiency(layer_rows: float, ratio: float) -> float:
    """How much of the layers that weren't run is time that wasn't spent: ``layer_rows / ratio``.

    That is, time of the plain model at full depth on the same batch, times the share of layer-rows run, over our time.
    1 where time falls exactly with the work; below it exits cost more than they should, and above it something else
    is saved too, such as padding. Beside another baseline that runs all layers it means the same with that one's time.

    Args:
        layer_rows: share of the layer-rows (layers times rows) that run, in (0, 1].
        ratio: our time over that of full depth.
    """
    return layer_rows / ratio


def _base(exits: str, shape: str) -> str:
    return f"BERT-base, {exits}, {shape}"


_RAGGED = "B 32, SST-2 lengths"
_NEVER = {"B 1, S 32": (0.72, 0.29), "B 1, S 128": (0.84, 0.25), "B 32, S 32": (0.91, 0.24), _RAGGED: (0.46, 0.15)}
_HALF = {"all at 50 %, B 1, S 32": (0.60, 0.65), "uniform, 50 %, B 32, S 32": (0.60, 0.65)}
_MIXED = [f"{mix}, {share} %" for mix in ("uniform", "long tail") for share in (39, 23, 18)]

#: (case, dtype, baseline) -> goal.
GOALS: dict[tuple[str, str, str], Goal] = {
    **{(_base("never exit", shape), "float32", PLAIN): Goal(goals[0]) for shape, goals in _NEVER.items()},
    **{(_base("never exit", shape), "bfloat16", PLAIN): Goal(goals[1]) for shape, goals in _NEVER.items()},
    **{(f"BERT-base, {case}", "float32", PEER): Goal(goals[0]) for case, goals in _HALF.items()},
    **{(f"BERT-base, {case}", "bfloat16", PEER): Goal(goals[1]) for case, goals in _HALF.items()},
    (_base("uniform, 50 %", _RAGGED), "float32", PEER): Goal(0.30),
    **{(_base(exits, "B 32, S 32"), "float32", OWN_FULL): Goal(0.99, "efficiency") for exits in _MIXED},
    **{(_base(exits, "B 32, S 32"), "float32", PLAIN): Goal(1.05, "efficiency") for exits in _MIXED},
    ("MiniLM, own exits, B 32, SST-2 lengths", "float32", PLAIN): Goal(0.25),
    ("MiniLM, own exits, B 1, SST-2 lengths", "float32", PLAIN): Goal(0.50),
}
