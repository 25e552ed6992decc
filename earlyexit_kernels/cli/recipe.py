"""Record which rows and which method a model was trained with, in a file beside the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from earlyexit_kernels.arguments import Check, choice, flag, optional, whole
from earlyexit_kernels.methods import from_dict
from earlyexit_kernels.tasks.load import TASK_NAMES, Task, holdout, load_task
from earlyexit_kernels.tasks.own import OwnData, load_own
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.calibrate import split_indices

RECIPE_FILE = "earlyexit_task.json"
#: Evaluation split of own files without a dev file.
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Recipe:
    """How a model was trained; sufficient to find its held-out rows again.

    Attributes:
        task: name for `load_task`, or None for own files.
        seed: seed of the holdout and of training.
        holdout: number of train rows held out for tuning.
        train_rows: number of rows trained on, the first ones that are not held out, in drawn order.
        max_length: maximum tokens per row, or None.
        evaluation_split: the split of `scores`.
        method: ``to_dict()`` of the training method.
        phases: name, epochs, learning rates and number of rows of each phase.
        scores: metric values of each exit 1..L after training.
        data: own files, or None for a task.
        bf16: whether it was trained in bfloat16 mixed precision.
    """

    task: str | None
    seed: int
    holdout: int
    train_rows: int
    max_length: int | None
    evaluation_split: str
    method: dict[str, Any] = field(default_factory=dict)
    phases: tuple[dict[str, Any], ...] = ()
    scores: tuple[dict[str, float], ...] = ()
    data: OwnData | None = None
    bf16: bool = False

    @property
    def name(self) -> str:
        """Name of the task, or of the train file without its folder."""
        return str(self.task) if self.data is None else self.data.name

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
            if (recipe.task is None) == (recipe.data is None):
                raise ValueError("expected either a task or data")
            if recipe.data is not None:
                recipe = replace(recipe, data=OwnData.from_dict(recipe.data))
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is not a recipe of this version: {error}") from error
        return recipe

    def load_data(self, *, task: str | None = None, dev: Path | None = None) -> Task:
        """Load the rows that the model was trained with, or others.

        Args:
            task: name of another task.
            dev: file with other rows, in the columns of the model's own files; the task then has no train split.

        Raises:
            ValueError: `dev` for a model that was trained on a task, or as for `load_task` and `load_own`.
            OSError: as for `load_task` and `load_own`.
        """
        if dev is not None and (task is not None or self.data is None):
            raise ValueError(
                f"--dev: expected a model trained with --train, whose columns the file has; this one is for task "
                f"{task or self.task!r}"
            )
        if task is None and self.data is not None:
            return load_own(self.data, dev=dev)
        return load_task(str(task or self.task), seed=self.seed)

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

    def evaluation_rows(self, task: Task) -> Split:
        """Return the rows of `scores`.

        Raises:
            ValueError: as for `train_splits` and `Task.split`.
        """
        return self.held_out(task) if self.evaluation_split == HELD_OUT else task.split(self.evaluation_split)

    def held_out(self, task: Task) -> Split:
        """Return the train rows that the model was not trained on, or as many of a task not trained on.

        Raises:
            ValueError: as for `train_splits`.
        """
        if task.name == self.name:
            return self.train_splits(task)[1]
        rows = task.split("train")
        return holdout(rows, min(self.holdout, len(rows) - 1), seed=self.seed)[1]

    def unseen_rows(self, task: Task) -> tuple[Split, str]:
        """Return all rows to calibrate on, and what they are: rows held out, or the dev split if none were.

        Args:
            task: of `load_data`.

        Raises:
            ValueError: as for `train_splits` and `Task.split`.
        """
        if self.holdout and "train" in task.splits:
            return self.held_out(task), "held-out train rows"
        kind = f"{task.evaluation} rows" if "train" in task.splits else f"rows of {Path(task.source).name}"
        return task.split(task.evaluation), kind

    def both_rows(self, task: Task) -> tuple[tuple[Split, str], tuple[Split, str]]:
        """Return the rows to choose settings on, other rows to report on, and what each of them are.

        Unseen rows of own files are divided where there are none beside them.

        Args:
            task: of `load_data`.

        Raises:
            ValueError: there are none of a task, only one of own files, or as for `unseen_rows`.
        """
        if self.holdout and "train" in task.splits and task.evaluation in task.splits:
            reporting = task.split(task.evaluation), f"the {task.evaluation} split of {task.name}"
            return (self.held_out(task), "held-out train rows"), reporting
        if self.data is None or task.name != self.name:
            raise ValueError("the model was trained with --holdout 0; expected held-out rows to choose thresholds on")
        rows, kind = self.unseen_rows(task)
        if len(rows) < 2:
            raise ValueError(f"expected rows to choose on and rows to report on, got one of {kind}")
        # the rows that `earlyexit calibrate` chooses on, so that a report of what it chose is of other rows
        parts = split_indices(len(rows), groups=rows.groups or None)
        chosen_on, others = (rows.take(part.tolist()) for part in parts)
        return (chosen_on, kind), (others, f"other {kind}")


#: Check of each field of a saved recipe; the method is checked by building it.
RECIPE_CHECKS: dict[str, Check] = {
    "task": choice(None, *TASK_NAMES),
    "seed": whole(low=0),
    "holdout": whole(low=0),
    "train_rows": whole(low=1),
    "max_length": optional(whole(low=1)),
    "evaluation_split": choice("dev", "test", HELD_OUT),
    "bf16": flag,
}


def recipe_of(argument: str, folder: Path) -> Recipe | None:
    """Return the recipe of a saved model, or None for one that was trained in Python.

    Args:
        argument: name of the argument, for the message.
        folder: of the model.

    Raises:
        FileNotFoundError: it is not a folder.
        ValueError: as for `Recipe.load`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}: expected a folder with a saved model, {folder} is not one")
    return Recipe.load(folder) if (folder / RECIPE_FILE).is_file() else None
