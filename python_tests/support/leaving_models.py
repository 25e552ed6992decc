"""Models, batches and a setting of each rule by which the rows of the batch leave at many exits."""

from __future__ import annotations

import functools

from support.models import DEPTH, balance_classes, batch_for, early_exit, varied_entropy

import earlyexit_kernels as ee
from earlyexit_kernels import criteria

LENGTHS = [3, 20, 5, 8, 11, 19, 10, 17, 12, 14, 18, 9, 4, 16, 7, 15]
GRID = [k / 20 for k in range(1, 20)]
#: Settings of each rule to choose from: the one that spreads the rows over most exits is taken.
SETTINGS = {
    "full_depth": [criteria.FullDepth()],
    "entropy": [],
    "max_probability": [criteria.MaxProbability(threshold=t) for t in GRID],
    "margin": [criteria.Margin(threshold=t) for t in GRID],
    "patience": [criteria.Patience(patience=1)],
    "q_exit": [criteria.QExit(q=t) for t in GRID],
    "sampled_exit": [criteria.SampledExit(seed=k) for k in range(9)],
    "expectation": [criteria.Expectation()],
    "voting": [criteria.Voting(threshold=2)],
    "dact": [criteria.Dact(bound="tight", epsilon=t) for t in GRID],
    "learned": [criteria.Learned(threshold=t) for t in GRID],
    "patient_confidence": [criteria.PatientConfidence(threshold=t, patience=2) for t in GRID],
    "divergence_patience": [criteria.DivergencePatience(threshold=t / 9, patience=1) for t in GRID],
    "hidden_cosine": [criteria.HiddenCosine(threshold=t) for t in GRID],
    "energy": [criteria.Energy(threshold=t) for t in GRID],
}
#: Exits that the rows leave at, at least.
SPREAD = {"full_depth": 1, "expectation": 1, "entropy": 3}
#: One rule of each kind: no state, a state, a scalar of the heads.
OF_EACH_KIND = ("entropy", "patience", "q_exit")
#: Heads of each kind: what pools, attends or remembers reads rows without tokens too.
HEADS = {
    "dense": {},
    "first": {"pooling": "first"},
    "mean": {"pooling": "mean"},
    "attention": {"method": "fastbert"},
    "attention, mean": {"method": "fastbert", "pooling": "mean"},
    "halting": {"method": "palbert"},
    "dact": {"method": "dact"},
}


def spread(trace, rule):
    return len(ee.replay(trace, rule)[1].unique())


@functools.cache
def prepared(family, pooling, rows):
    """A model whose exits have all scalars there are, a batch, and its trace; once for all tests."""
    model = early_exit(family, method="berxit", halting=True, pooling=pooling)
    batch = batch_for(model, lengths=LENGTHS[:rows])
    balance_classes(model, batch)
    return model, batch, model.trace(**batch)


@functools.cache
def tuned(family, pooling, rows, name):
    """The setting of a rule by which the rows of the batch leave at most exits."""
    trace = prepared(family, pooling, rows)[2]
    settings = SETTINGS[name] or [varied_entropy(trace)]
    return max(settings, key=lambda rule: spread(trace, rule))


def setting(family, backend, criterion="entropy", pooling=None):
    """A model, a batch whose rows leave at several exits, and the trace that decides it."""
    rows = 6 if backend == "triton" else len(LENGTHS)
    model, batch, trace = prepared(family, pooling, rows)
    model.set_backend(backend)
    model.compaction = "always"
    model.set_criterion(tuned(family, pooling, rows, criterion))
    exits = model(**batch).exit_layer
    assert len(exits.unique()) >= min(SPREAD.get(criterion, 2), 2 if backend == "triton" else DEPTH)
    return model, batch, trace
