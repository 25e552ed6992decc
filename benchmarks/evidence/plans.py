"""List the trainings of each experiment, with the budget that those of a task share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.glue import TASKS
from earlyexit_kernels.cli.train import method_from

SEEDS = (0, 1, 2)
#: Train rows that settings are chosen on.
HOLDOUT = 500
#: Rows to train on: all that are not held out, of SST-2 a part.
ROWS = {"trec": 4952, "sst2": 20000, "mrpc": 3168, "cola": 8051, "stsb": 5249, "rte": 1990}
#: Epochs in which the encoder is trained; a phase that trains exits alone has as many.
EPOCHS = {"trec": 3.0, "sst2": 1.0, "mrpc": 5.0, "cola": 2.0, "stsb": 3.0, "rte": 3.0}
#: Peak learning rates of the encoder and of the exits; gates have the encoder's where `gate_lr` is not given.
LR, HEAD_LR = 5e-5, 1e-3
SIX, TWELVE, SHARED = "six", "twelve", "shared"


@dataclass(frozen=True)
class Training:
    """One model to train and to measure.

    Attributes:
        task, method, seed: of `earlyexit train`; the seed also draws the rows.
        settings: options of the method that are not its defaults.
        form: of the exits, ``"linear"`` or ``"attention"``.
        encoder: `SIX`, `TWELVE` or `SHARED` layers, as `encoders` makes them.
        epochs: of each phase (default: `EPOCHS` of the task).
        lr: of the encoder.
        start: the training that this one goes on from.
        noise: whether to measure it on changed words too.
        gate_lr: of the gates (default: the encoder's).
    """

    task: str
    method: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    form: str = "linear"
    encoder: str = SIX
    epochs: tuple[float, ...] | None = None
    lr: float = LR
    start: Training | None = None
    noise: bool = False
    gate_lr: float | None = None

    @property
    def name(self) -> str:
        """Name of the result, without the seed's rows or the budget."""
        words = [f"{key}={value}" for key, value in self.settings.items()]
        words += [f"gate_lr={self.gate_lr}"] if self.gate_lr else []
        words += [self.form] if self.form != "linear" else []
        words += [self.encoder] if self.encoder != SIX else []
        words += [f"after-{self.start.method}"] if self.start else []
        return "-".join([self.task, self.method, *words, f"seed{self.seed}"])

    @property
    def files(self) -> str:
        """Name of the folder with the rows."""
        return f"{self.task}-{ROWS[self.task]}-{HOLDOUT}-seed{self.seed}"

    def arguments(self, model: str, output: str, files: str | None = None) -> list[str]:
        """Return the arguments of the command `earlyexit` that trains it.

        Args:
            model: folder of the encoder, or of the trained model that it starts from.
            output: folder for the trained model.
            files: folder of the rows, which `glue.write_files` writes.
        """
        given = [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]
        phases = method_from(self.method, given).phases
        epochs = self.epochs or [EPOCHS[self.task] for _ in phases]
        files = files or self.files
        return [
            *("train", model, "--data", f"{files}/train.csv", "--dev", f"{files}/tuning.csv", "--output", output),
            *(("--pair-column", "pair") if TASKS[self.task].pairs else ()),
            *(("--problem", "regression") if TASKS[self.task].classes == 1 else ()),
            *("--method", self.method),
            *("--pooling", "mean", "--form", self.form),
            *("--seed", str(self.seed)),
            *("--lr", str(self.lr), "--head-lr", str(HEAD_LR), "--epochs", *map(str, epochs)),
            "--bf16",
            *(("--gate-lr", str(self.gate_lr)) if self.gate_lr else ()),
            *(word for text in given for word in ("--set", text)),
        ]


@dataclass(frozen=True)
class Experiment:
    """Trainings that are compared with each other.

    Attributes:
        claim: what the paper says.
        trainings: in the order in which they are run.
    """

    claim: str
    trainings: tuple[Training, ...]


#: Form of the exits in the comparison of methods: each with the other form too.
LINEAR, ATTENTION = "linear", "attention"
METHODS = {
    "joint": (LINEAR, ATTENTION),
    "palbert": (LINEAR,),
    "ensemble": (LINEAR,),
    "smartbert": (ATTENTION,),
    "dact": (LINEAR,),
    "deebert": (LINEAR, ATTENTION),
    "berxit": (LINEAR,),
    "fastbert": (LINEAR, ATTENTION),
}
#: Tasks on which all methods are compared, and those on which some are: regression, and RTE, which stays at chance.
COMPARED = ("trec", "sst2", "mrpc", "cola")
SOME = {"stsb": ("joint", "palbert", "deebert", "berxit"), "rte": ("joint",)}
#: DACT: weights of the ponder cost.
PONDER = 0.1
PONDERS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
#: PALBERT: inputs of the halting head and its layers, of which the first is the default.
LAMBDA_HEADS = tuple(itertools.product(("concat", "diff", "single"), (3, 1)))
#: Prior of the paper, on twelve layers, against one that leaves as much mass to the last layer at any depth.
PAPER_PRIOR = 0.1
DIVERSITIES, DIVERSITY = (0.0, 0.1, 0.3), 0.1
#: SmartBERT: rewards of skipping, of which the paper has .04.
GATE_WEIGHTS, GATE_WEIGHT = (0.01, 0.04, 0.1), 0.01


def of_method(task: str, method: str, seed: int, form: str) -> Training:
    """Return a method in the comparison."""
    if method == "dact":
        return dact(task, seed, PONDER)
    settings = gates(task, GATE_WEIGHT) if method == "smartbert" else {}
    return Training(task, method, seed, settings, form=form)


def gates(task: str, weight: float, soft: float = 0.6, **settings: Any) -> dict[str, Any]:
    """Return settings of SmartBERT: gates that are soft for a share of the first phase's epochs."""
    return {"soft_epochs": round(soft * EPOCHS[task], 3), "gate_weight": weight, **settings}


def dact(task: str, seed: int, ponder: float, start: str = "joint") -> Training:
    """Return DACT with a weight of the ponder cost, after exits (`"joint"`) or the encoder alone (`"last"`)."""
    settings = {"ponder": ponder} | ({} if start == "joint" else {"start": start})
    half = EPOCHS[task] / 2  # both phases train the encoder
    return Training(task, "dact", seed, settings, epochs=(half, half))


def smartbert(task: str, seed: int, weight: float, soft: float = 0.6, **settings: Any) -> Training:
    """Return SmartBERT with gates that learn as fast as exits, on an encoder that has learnt the task before."""
    start = Training(task, "deebert", seed, form=ATTENTION)
    made = gates(task, weight, soft, **settings)
    return Training(task, "smartbert", seed, made, form=ATTENTION, start=start, gate_lr=HEAD_LR)


#: SmartBERT's arms after the encoder has learnt the task -> arguments of `smartbert`.
SMARTBERT: dict[str, dict[str, Any]] = {
    **{f"weight {weight:g}": {"weight": weight} for weight in GATE_WEIGHTS},
    "hard from the start": {"weight": GATE_WEIGHTS[1], "soft": 0.0},
    "soft to the end": {"weight": GATE_WEIGHTS[1], "soft": 1.0},
    "no contrast": {"weight": GATE_WEIGHTS[1], "contrast_backbone": 0.0, "contrast_exits": 0.0},
}


def palbert(seed: int, given: str, layers: int) -> Training:
    """Return PALBERT on SST-2 with a form of the halting head."""
    settings = {"halting_input": given, "halting_layers": layers} if (given, layers) != LAMBDA_HEADS[0] else {}
    return Training("sst2", "palbert", seed, settings)


def palbert_twelve(seed: int, prior: float | None) -> Training:
    """Return PALBERT on twelve layers with a prior; None is the default."""
    return Training("sst2", "palbert", seed, {} if prior is None else {"prior": prior}, encoder=TWELVE)


def ensemble(task: str, seed: int, diversity: float) -> Training:
    """Return the ensemble with a weight of the diversity loss."""
    return Training(task, "ensemble", seed, {} if diversity == DIVERSITY else {"diversity": diversity})


def at_depth(task: str, seed: int, encoder: str) -> Training:
    """Return jointly trained exits on an encoder, as PABEE's."""
    return Training(task, "joint", seed, encoder=encoder, noise=task == "sst2" and encoder == TWELVE)


def _methods(task: str) -> Iterator[Training]:
    for seed, method in itertools.product(SEEDS, SOME.get(task, tuple(METHODS))):
        for form in METHODS[method] if task in COMPARED else (LINEAR,):
            yield of_method(task, method, seed, form)


def _dact() -> Iterator[Training]:
    for seed, ponder in itertools.product(SEEDS, PONDERS):
        yield dact("trec", seed, ponder)
    for seed in SEEDS:
        yield dact("trec", seed, PONDER, "last")


def _smartbert(task: str) -> Iterator[Training]:
    for seed, arguments in itertools.product(SEEDS, SMARTBERT.values()):
        yield smartbert(task, seed, **arguments)


def _palbert() -> Iterator[Training]:
    for seed in SEEDS:
        yield from (palbert(seed, *head) for head in LAMBDA_HEADS)
        yield from (palbert_twelve(seed, prior) for prior in (None, PAPER_PRIOR))


def _ensemble() -> Iterator[Training]:
    for task, seed, diversity in itertools.product(("trec", "sst2"), SEEDS, DIVERSITIES):
        yield ensemble(task, seed, diversity)


def _pabee() -> Iterator[Training]:
    for task, seed, encoder in itertools.product(("sst2", "trec"), SEEDS, (TWELVE, SHARED)):
        yield at_depth(task, seed, encoder)


#: In the order in which `make evidence` runs them.
EXPERIMENTS: dict[str, Experiment] = {
    "methods_trec": Experiment("the methods under one budget, trec", tuple(_methods("trec"))),
    "methods_sst2": Experiment("the methods under one budget, sst2", tuple(_methods("sst2"))),
    "dact": Experiment("DACT-BERT is best at small budgets", tuple(_dact())),
    "ensemble": Experiment("the diversity loss and voting each improve the trade-off", tuple(_ensemble())),
    "pabee": Experiment("patience is 1.57x faster, more accurate than full depth, and robust", tuple(_pabee())),
    "palbert": Experiment("Q-exit is far better than PonderNet's sampled exit", tuple(_palbert())),
    "smartbert_trec": Experiment("skips and exits together need 2 to 3 times fewer layers", tuple(_smartbert("trec"))),
    "smartbert_sst2": Experiment("as on TREC", tuple(_smartbert("sst2"))),
    "methods_mrpc": Experiment("the methods under one budget, mrpc", tuple(_methods("mrpc"))),
    "methods_stsb": Experiment("the methods for numbers, stsb", tuple(_methods("stsb"))),
    "methods_cola": Experiment("the methods under one budget, cola", tuple(_methods("cola"))),
    "methods_rte": Experiment("joint training on RTE", tuple(_methods("rte"))),
}


def all_trainings(names: tuple[str, ...] = ()) -> dict[str, Training]:
    """Return the trainings of some experiments (default: all) by name, in the order in which they are run."""
    chosen = names or tuple(EXPERIMENTS)
    return {training.name: training for name in chosen for training in EXPERIMENTS[name].trainings}
