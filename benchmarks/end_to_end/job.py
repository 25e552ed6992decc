"""Whole jobs: texts in, labels out, tokenisation included, in seconds and accuracy.

    python -m benchmarks.run --suite job --model FOLDER
    python -m benchmarks.run --suite job_trec --model FOLDER

The folder is one that ``earlyexit train`` wrote for SST-2 or TREC, whose rows to report on, in EARLYEXIT_DATA, are the
texts. Exits have the entropy threshold that loses at most half a point on the rows that training kept, chosen in
float32. The other runtimes run all layers of the same encoder with its last exit, on batches of `BATCH` texts in the
order of the file and sorted by length; a pipeline by default takes one text at a time. A `Scorer` sorts by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

import earlyexit_kernels as ee
from benchmarks import harness
from benchmarks.end_to_end import measure, models, peers
from benchmarks.end_to_end.forced import FULL, OWN
from benchmarks.end_to_end.models import FUSED_LAYERS, Model, engine_model
from benchmarks.end_to_end.peers import RUNTIMES
from benchmarks.glue import rows_of_model
from benchmarks.harness import Checked, Implementation, Record, Variant
from benchmarks.machine import trained_folder
from earlyexit_kernels.cli.saved import load_saved
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.data.rows import Split
from earlyexit_kernels.tuning.traces import collect_trace

#: Suite -> its task.
TASKS = {"job": "sst2", "job_trec": "trec"}
BATCH, DROP = 32, 0.005
PIPELINE = "transformers pipeline"
#: Type of the arithmetic or of stored weights -> least share of labels that have to be the plain model's.
AGREES = {"float32": 0.995, "float16": 0.995, "bfloat16": 0.97, "int8": 0.95, peers.BY_DEFAULT: 0.97}
STORED = ("float32", "float16", "bfloat16", "int8")
#: Labels of some texts, and their exit layers if rows leave early.
Answer: TypeAlias = tuple[Tensor, Tensor | None]
Job: TypeAlias = Callable[[Sequence[str]], Answer]


def prepared(model: Model, task: str) -> tuple[Criterion, Split]:
    """Return entropy with the threshold chosen on the rows that training kept, and the rows to report on."""
    saved = load_saved(trained_folder())
    rows = rows_of_model(saved, task)
    trace, labels = collect_trace(model, saved.encoded(rows["tuning"]), collate_fn=saved.collate)
    return ee.calibrate(trace, labels, target=ee.MaxDrop(DROP), criterion="entropy").criterion, rows["reporting"]


def records(suite: str, repeats: int) -> Iterator[Record]:
    """Yield the seconds and the accuracy of each way to do the job of a suite."""
    trained_folder()  # a model with random weights has no task
    subject = models.subject("MiniLM")
    rule, reporting = prepared(subject.model, TASKS[suite])
    texts, truth = list(reporting.texts), torch.as_tensor(reporting.labels)

    def header(variant: Variant) -> Record:
        return harness.record_header(suite, TASKS[suite], variant, shape=f"{len(texts)} texts")

    with torch.inference_mode():
        plain = in_batches(subject, lambda batch: (subject.plain(**batch).logits, None))(texts)[0]

        def built(variant: Variant, make: Callable[[], Job], prepare: harness.Call) -> Implementation:
            job = make()
            check = partial(_checked, job, prepare, texts, plain, truth, AGREES[variant.dtype])
            return Implementation(variant, partial(job, texts), check, prepare)

        found = harness.prepare((way[0], partial(built, *way)) for way in _ways(subject, rule))
        yield from found.skipped_records(header)
        times = found.times(rounds=repeats, prepare=measure.rest, progress=suite)
    baseline = times.get(Variant(PIPELINE, "", "float32", FULL))
    for variant, own_times in times.items():
        record = header(variant) | dict(found.facts[variant]) | harness.time_fields(own_times)
        record |= {"rows": len(texts), "seconds": round(record["median_ms"] / 1000, 3)}
        if baseline is not None:
            record |= {"baseline": PIPELINE} | harness.ratio_fields(own_times, baseline)
        yield record


def _ways(subject: models.Subject, rule: Criterion) -> Iterator[tuple[Variant, Callable[[], Job], harness.Call]]:
    """Yield each way to do the job, a function that makes it, and what prepares a call."""
    yield Variant(PIPELINE, "", "float32", FULL), partial(as_pipeline, subject, 1), harness.do_nothing
    others: dict[str, Callable[[], Job]] = {f"{PIPELINE}, batches of {BATCH}": partial(as_pipeline, subject, BATCH)}
    others |= {name: partial(_by_runtime, subject, name) for name in RUNTIMES}
    for name, make in others.items():
        job, kind = cache(make), peers.ARITHMETIC.get(name, "float32")
        yield Variant(name, "", kind, FULL), job, harness.do_nothing
        yield Variant(f"{name}, sorted", "", kind, FULL), lambda job=job: by_length(job()), harness.do_nothing
    for stored in STORED:
        for exits, criterion in ((FULL, None), (OWN, rule)):
            # the model is one for both, and may be refused when the job is made
            prepare = partial(_set_criterion, subject, stored, criterion)
            yield Variant("Scorer", "", stored, exits), partial(by_scorer, subject, stored), prepare


def _set_criterion(subject: models.Subject, stored: str, criterion: Criterion | None) -> None:
    engine_model(subject, FUSED_LAYERS, stored=stored).set_criterion(criterion)


def by_scorer(subject: models.Subject, stored: str) -> Job:
    """Return the job by a `Scorer`, whose model has the criterion that it is given."""
    model = engine_model(subject, FUSED_LAYERS, stored=stored)
    scorer = ee.Scorer(model, subject.tokenizer, drift_window=None)
    numbers = {label: number for number, label in model.config.id2label.items()}

    def job(texts: Sequence[str]) -> Answer:
        out = scorer(list(texts))
        return torch.tensor([int(numbers[label]) for label in out["label"]]), torch.tensor(out["exit_layer"])

    return job


def _by_runtime(subject: models.Subject, name: str) -> Job:
    return in_batches(subject, RUNTIMES[name](subject))


def in_batches(subject: models.Subject, answer: Callable[[dict[str, Tensor]], tuple[Tensor, None]]) -> Job:
    """Return a job that tokenises and answers `BATCH` texts at a time."""

    def job(texts: Sequence[str]) -> Answer:
        parts = []
        for first in range(0, len(texts), BATCH):
            batch = subject.tokenizer(texts[first : first + BATCH], padding=True, return_tensors="pt")
            inputs = {name: batch[name] for name in peers.NAMES}
            parts.append(answer(inputs)[0].argmax(dim=1))
        return torch.cat(parts), None

    return job


def by_length(job: Job) -> Job:
    """Return a job that answers texts in the order of their length, and returns the labels in that of the texts."""

    def sorted_job(texts: Sequence[str]) -> Answer:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        labels, _ = job([texts[number] for number in order])
        return labels[torch.tensor(order).argsort()], None

    return sorted_job


class _PipelineModel(PreTrainedModel):
    """The plain encoder with its last exit, as a pipeline takes it."""

    _supports_sdpa = True  # the encoder inside has it

    def __init__(self, config: Any, plain: torch.nn.Module) -> None:
        super().__init__(config)
        self.plain = plain

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        return self.plain(input_ids=input_ids, attention_mask=attention_mask)


def as_pipeline(subject: models.Subject, batch: int) -> Job:
    """Return the text classification of transformers."""
    config = copy.deepcopy(subject.encoder.config)
    config.id2label = {number: str(number) for number in subject.model.config.id2label}
    model = _PipelineModel(config, subject.plain).eval()
    run = pipeline("text-classification", model=model, tokenizer=subject.tokenizer, batch_size=batch, device="cpu")

    def job(texts: Sequence[str]) -> Answer:
        return torch.tensor([int(found["label"]) for found in run(list(texts))]), None

    return job


def _checked(
    job: Job, prepare: harness.Call, texts: Sequence[str], plain: Tensor, truth: Tensor, least: float
) -> Checked:
    """Compare the labels of rows that run all layers with the plain model's, and all with the truth."""
    prepare()
    labels, exit_layer = job(texts)
    same = float((labels == plain).double().mean())
    ran_all = exit_layer is None or bool((exit_layer == exit_layer.max()).all())
    if ran_all and same < least:
        return Checked(f"{same:.2%} of its labels are the plain model's ({least:.1%} expected)")
    facts: dict[str, Any] = {"accuracy": float((labels == truth).double().mean()), "same": same}
    if exit_layer is not None:
        facts["mean_exit_layer"] = float(exit_layer.double().mean())
    return Checked(facts=facts)
