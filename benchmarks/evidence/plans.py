"""List the trainings of each experiment, with the budget that all of them share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.glue import TASKS
from earlyexit_kernels.cli.train import method_from

SEEDS = (0, 1, 2)
#: Rows to train on; of RTE all that are not held out.
ROWS = {"trec": 4000, "sst2": 4000, "cola": 8000, "mrpc": 2000, "stsb": 2000, "rte": 1990}
#: Train rows that settings are chosen on.
HOLDOUT = 500
#: Epochs in which the encoder is trained, and epochs of a phase that trains exits alone.
EPOCHS, EXIT_EPOCHS = 2.0, 2.0
#: Peak learning rates of the encoder and of the exits; gates have the encoder's where `gate_lr` is not given.
LR, HEAD_LR = 5e-5, 1e-3
SIX, TWELVE, SHARED = "six", "twelve", "shared"


@dataclass(frozen=True)
class Training:
    """One model to train and to measure.

    Attributes:
        task, method, seed: of `earlyexit train`; the seed also draws the rows.
        settings: options of the method that are not its defaults.
        own_form: whether the exits have the form of the method's paper; if not, they are linear.
        encoder: `SIX`, `TWELVE` or `SHARED` layers, as `encoders` makes them.
        epochs: of each phase (default: `EPOCHS`, or `EXIT_EPOCHS` where the encoder is frozen).
        lr: of the encoder.
        start: the training that this one goes on from.
        noise: whether to measure it on text with typing errors too.
        bf16: whether to train in bfloat16 mixed precision.
        gate_lr: of the gates (default: the encoder's).
    """

    task: str
    method: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    own_form: bool = False
    encoder: str = SIX
    epochs: tuple[float, ...] | None = None
    lr: float = LR
    start: Training | None = None
    noise: bool = False
    bf16: bool = False
    gate_lr: float | None = None

    @property
    def name(self) -> str:
        """Name of the result, without the seed's rows or the budget."""
        words = [f"{key}={value}" for key, value in self.settings.items()]
        words += [f"gate_lr={self.gate_lr}"] if self.gate_lr else []
        words += ["own"] if self.own_form else []
        words += ["bf16"] if self.bf16 else []
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
        epochs = self.epochs or [EPOCHS if "backbone" in phase.trains else EXIT_EPOCHS for phase in phases]
        files = files or self.files
        return [
            *("train", model, "--data", f"{files}/train.csv", "--dev", f"{files}/tuning.csv", "--output", output),
            *(("--pair-column", "pair") if TASKS[self.task].pairs else ()),
            *(("--problem", "regression") if TASKS[self.task].classes == 1 else ()),
            *("--method", self.method),
            *("--pooling", "mean", *(() if self.own_form else ("--form", "linear"))),
            *("--seed", str(self.seed)),
            *("--lr", str(self.lr), "--head-lr", str(HEAD_LR), "--epochs", *map(str, epochs)),
            *(("--bf16",) if self.bf16 else ()),
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


#: Settings that the budget requires: DACT's two phases share the epochs of one, SmartBERT's gates are soft for 3 of 5.
BUDGETED: dict[str, dict[str, Any]] = {
    "dact": {"epochs": (EPOCHS / 2, EPOCHS / 2), "settings": {"ponder": 0.1}},
    "smartbert": {"settings": {"soft_epochs": 0.6 * EPOCHS, "gate_weight": 0.01}},
}
#: Method -> whether its paper's exits are of another form than the linear one of the comparison.
METHODS = {
    "joint": False,
    "palbert": False,
    "ensemble": False,
    "smartbert": True,
    "dact": False,
    "deebert": False,
    "berxit": False,
    "fastbert": True,
}
REGRESSION = ("joint", "palbert", "deebert", "berxit")
#: Settings that the experiments of single methods compare.
PONDERS = (0.03, 0.1, 0.3, 1.0)
#: Initial bias of SmartBERT's gates, weight of the reward for skipping, and peak learning rate of the gates (None: the
#: encoder's): the paper's start on the threshold, our default, and gates that learn as fast as exits.
GATES = ((0.0, 0.01, None), (-1.5, 0.01, None), (-1.5, 0.01, HEAD_LR), (-1.5, 0.03, HEAD_LR))
#: Task -> the gates that are tried on it. On CoLA those whose gates opened on MRPC, at the smaller weight: the others
#: never skip there, or lose more.
GATES_OF = {"mrpc": GATES, "cola": (GATES[0], GATES[2])}
BETAS, PRIORS = (0.5, 0.05), (0.1, 0.3)
DIVERSITIES, DEFAULT_DIVERSITY = (0.0, 0.05, 0.1, 0.3), 0.1
#: SmartBERT's own experiment trains the encoder for one epoch more: skips begin when the task is learnt.
SMARTBERT_EPOCHS = (3.0, 2.0)


def of_method(task: str, method: str, seed: int, *, own_form: bool = False) -> Training:
    """Return a method under the common budget."""
    given = dict(BUDGETED.get(method, {}))
    if method == "smartbert" and not own_form:  # only attention exits have the token features that are contrasted
        given["settings"] = given["settings"] | {"contrast_backbone": 0.0, "contrast_exits": 0.0}
    return Training(task, method, seed, own_form=own_form, bf16=True, **given)


def dact_start(seed: int) -> Training:
    """Return the jointly trained exits that DACT's own phase goes on from."""
    return Training("trec", "joint", seed)


def dact_after_joint(seed: int, ponder: float) -> Training:
    """Return DACT's own phase on TREC."""
    return Training("trec", "dact", seed, {"start": None, "ponder": ponder}, lr=1e-5, start=dact_start(seed))


def without_gates(task: str, seed: int) -> Training:
    """Return SmartBERT's exits, trained in as many epochs, without gates."""
    return Training(task, "deebert", seed, own_form=True, epochs=SMARTBERT_EPOCHS, bf16=True)


def with_gates(task: str, seed: int, *, bias: float, weight: float, rate: float | None) -> Training:
    """Return SmartBERT with gates of one of `GATES`."""
    soft = round(0.6 * SMARTBERT_EPOCHS[0], 3)
    settings = {"soft_epochs": soft, "gate_bias": bias, "gate_weight": weight}
    budget = {"own_form": True, "epochs": SMARTBERT_EPOCHS, "bf16": True}
    return Training(task, "smartbert", seed, settings, gate_lr=rate, **budget)


def palbert(seed: int, beta: float, prior: float, *, other_rows: bool = False) -> Training:
    """Return PALBERT on SST-2; with `other_rows` its halting head learns again, on rows new to the encoder."""
    settings = {"beta": beta, "prior": prior} | ({"halting_phase": True} if other_rows else {})
    return Training("sst2", "palbert", seed, settings)


def ensemble(task: str, seed: int, diversity: float) -> Training:
    """Return the ensemble with a weight of the diversity loss."""
    return Training(task, "ensemble", seed, {} if diversity == DEFAULT_DIVERSITY else {"diversity": diversity})


def at_depth(task: str, seed: int, encoder: str) -> Training:
    """Return jointly trained exits on an encoder, as PABEE's."""
    return Training(task, "joint", seed, encoder=encoder, noise=task == "sst2" and encoder == TWELVE, bf16=True)


def _methods(task: str) -> Iterator[Training]:
    for seed in SEEDS:
        for method, other_form in METHODS.items():
            if task != "stsb" or method in REGRESSION:
                yield of_method(task, method, seed)
                if other_form:
                    yield of_method(task, method, seed, own_form=True)


def _dact() -> Iterator[Training]:
    for seed in SEEDS:
        yield dact_start(seed)
        yield from (dact_after_joint(seed, ponder) for ponder in PONDERS)


def _smartbert(task: str) -> Iterator[Training]:
    for seed in SEEDS:
        yield without_gates(task, seed)
        for bias, weight, rate in GATES_OF[task]:
            yield with_gates(task, seed, bias=bias, weight=weight, rate=rate)


def _palbert() -> Iterator[Training]:
    for seed in SEEDS:
        yield from (palbert(seed, beta, prior) for beta, prior in itertools.product(BETAS, PRIORS))
        yield palbert(seed, BETAS[-1], PRIORS[-1], other_rows=True)


def _ensemble() -> Iterator[Training]:
    for task, seed, diversity in itertools.product(("trec", "sst2"), SEEDS, DIVERSITIES):
        yield ensemble(task, seed, diversity)


def _pabee() -> Iterator[Training]:
    for task, seed, encoder in itertools.product(("sst2", "trec"), SEEDS, (TWELVE, SHARED)):
        yield at_depth(task, seed, encoder)


def _compared(task: str) -> Experiment:
    return Experiment(f"the methods under one budget, {task}", tuple(_methods(task)))


#: In the order in which `make evidence` runs them.
EXPERIMENTS: dict[str, Experiment] = {
    "dact": Experiment("DACT-BERT is best at small budgets", tuple(_dact())),
    "palbert": Experiment("Q-exit is far better than PonderNet's sampled exit", tuple(_palbert())),
    "ensemble": Experiment("the diversity loss and voting each improve the trade-off", tuple(_ensemble())),
    "smartbert_mrpc": Experiment("skips and exits together need fewer multiply-adds", tuple(_smartbert("mrpc"))),
    "pabee": Experiment("patience is 1.57x faster, more accurate than full depth, and robust", tuple(_pabee())),
    "methods_trec": _compared("trec"),
    "methods_sst2": _compared("sst2"),
    "smartbert_cola": Experiment("as on MRPC", tuple(_smartbert("cola"))),
    **{f"methods_{task}": _compared(task) for task in ("mrpc", "cola", "stsb")},
    # at chance in this budget, so that other methods are not trained on it
    "methods_rte": Experiment("joint training on RTE", tuple(of_method("rte", "joint", seed) for seed in SEEDS)),
}


def all_trainings(names: tuple[str, ...] = ()) -> dict[str, Training]:
    """Return the trainings of some experiments (default: all) by name, in the order in which they are run."""
    chosen = names or tuple(EXPERIMENTS)
    return {training.name: training for name in chosen for training in EXPERIMENTS[name].trainings}
