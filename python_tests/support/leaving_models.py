"""Models, batches, and settings of each rule with which the rows of the batch leave at many exits."""

from __future__ import annotations

import functools

from support.criterion_cases import CASES
from support.models import DEPTH, balance_classes, batch_for, early_exit

import earlyexit_kernels as ee

LENGTHS = [3, 20, 5, 8, 11, 19, 10, 17, 12, 14, 18, 9, 4, 16, 7, 15]
#: One rule of each kind: no state, a state, a scalar of the heads.
OF_EACH_KIND = ("entropy", "patience", "q_exit")
#: Heads of each kind: with pooling, attention and memory.
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
    """Return the number of exits that rows leave at."""
    return len(ee.replay(trace, rule)[1].unique())


def most_spread(name, trace):
    """Return the setting of a rule with which the rows of a trace leave at the most exits."""
    return max(CASES[name].spreading(trace), key=lambda rule: spread(trace, rule))


@functools.cache
def prepared(family, pooling, rows):
    """Return a model whose exits have all scalars, a batch, and its trace; cached for all tests."""
    model = early_exit(family, method="berxit", halting=True, pooling=pooling)
    batch = batch_for(model, lengths=LENGTHS[:rows])
    balance_classes(model, batch)
    return model, batch, model.trace(**batch)


@functools.cache
def tuned(family, pooling, rows, name):
    """Return the setting of a rule with which the rows of the batch leave at the most exits."""
    trace = prepared(family, pooling, rows)[2]
    return most_spread(name, trace)


def setting(family, backend, criterion="entropy", pooling=None):
    """Return a model, a batch whose rows leave at several exits, and its trace."""
    rows = 6 if backend == "triton" else len(LENGTHS)
    model, batch, trace = prepared(family, pooling, rows)
    model.configure(backend=backend)
    model.configure(compaction="always")
    model.set_criterion(tuned(family, pooling, rows, criterion))
    exits = model(**batch).exit_layer
    assert len(exits.unique()) >= min(CASES[criterion].exits, 2 if backend == "triton" else DEPTH)
    return model, batch, trace
