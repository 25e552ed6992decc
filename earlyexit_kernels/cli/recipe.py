"""Record which rows and which method a model was trained with, in a file beside the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from earlyexit_kernels.arguments import Check, choice, optional, whole
from earlyexit_kernels.objectives import from_dict
from earlyexit_kernels.tasks.load import TASK_NAMES, Task, holdout
from earlyexit_kernels.tasks.sources import Split

RECIPE_FILE = "earlyexit_task.json"


@dataclass(frozen=True)
class Recipe:
    """How a model was trained; sufficient to find its held-out rows again.

    Attributes:
        task: name for `load_task`.
        seed: seed of the holdout and of training.
        holdout: number of train rows held out for tuning.
        train_rows: number of rows trained on, the first ones that are not held out, in drawn order.
        max_length: maximum tokens per row, or None.
        evaluation_split: the split of `scores`.
        method: ``to_dict()`` of the training method.
        phases: name, epochs and learning rates of each phase.
        scores: metric values of each exit 1..L after training.
    """

    task: str
    seed: int
    holdout: int
    train_rows: int
    max_length: int | None
    evaluation_split: str
    method: dict[str, Any] = field(default_factory=dict)
    phases: tuple[dict[str, Any], ...] = ()
    scores: tuple[dict[str, float], ...] = ()

    def save(self, folder: Path) -> None:
        """Write the recipe beside the model."""
        (folder / RECIPE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Recipe:
        """Read the recipe of a model.

        Raises:
            FileNotFoundError: the folder has no recipe.
            ValueError: the file is not a recipe.
        """
        path = folder / RECIPE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {RECIPE_FILE} in {folder}; `earlyexit train` writes it, and a model trained in Python is "
                "evaluated there, with model.trace and replay"
            )
        try:
            recipe = Recipe(**json.loads(path.read_text(encoding="utf-8")))
            for name, check in RECIPE_CHECKS.items():
                check(name, getattr(recipe, name))
            from_dict(recipe.method)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a recipe of this version: {error}") from error
        return recipe

    def train_splits(self, task: Task) -> tuple[Split, Split]:
        """Return the rows to train on and the held-out rows.

        Raises:
            ValueError: the train split has fewer rows.
        """
        available = len(task.split("train"))
        if self.train_rows + self.holdout > available:
            raise ValueError(
                f"expected at most {available} rows to train on and to hold out, the size of the train split of task "
                f"{task.name!r} in {task.source}; got {self.train_rows} + {self.holdout}"
            )
        rest, held_out = holdout(task.split("train"), self.holdout, seed=self.seed)
        return rest.take(range(self.train_rows)), held_out

    def held_out(self, task: Task) -> Split:
        """Return the train rows to choose settings on: those held out, or as many of a task not trained on.

        Raises:
            ValueError: as for `train_splits`.
        """
        if task.name == self.task:
            return self.train_splits(task)[1]
        rows = task.split("train")
        return holdout(rows, min(self.holdout, len(rows) - 1), seed=self.seed)[1]


#: Check of each field of a saved recipe; the method is checked by building it.
RECIPE_CHECKS: dict[str, Check] = {
    "task": choice(*TASK_NAMES),
    "seed": whole(low=0),
    "holdout": whole(low=0),
    "train_rows": whole(low=1),
    "max_length": optional(whole(low=1)),
    "evaluation_split": choice("dev", "test"),
}
