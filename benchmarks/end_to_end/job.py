"""Whole jobs: texts in, labels out, tokenisation included, in seconds and accuracy.

    python -m benchmarks.run --suite job --model FOLDER

The folder is one that ``earlyexit train`` wrote for a built-in task, whose data EARLYEXIT_DATA names; the texts are the
rows that the training reported on. The other runtimes run all layers of the same encoder with its last exit, on batches
of `BATCH` texts in the order of the file and sorted by length; a pipeline by default takes one text at a time. A
`Scorer` sorts by itself. Its exits have the entropy threshold that loses at most half a point on held-out train rows.
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
from benchmarks.end_to_end.engines import FUSED_LAYERS, engine_model
from benchmarks.end_to_end.forced import FULL, OWN
from benchmarks.harness import Checked, Implementation, Record, Variant
from benchmarks.machine import NotMeasuredError, trained_folder
from earlyexit_kernels.cli.evaluate import encoded
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.tuning.traces import collect_trace

SUITE = "job"
BATCH, DROP = 32, 0.005
PIPELINE = "transformers pipeline"
#: Type of the arithmetic (``""``: the runtime chooses) or of stored weights -> least share of labels that have to be
#: the plain model's.
AGREES = {"float32": 0.995, "": 0.97, "bfloat16": 0.97, "int8": 0.95}
STORED = ("float32", "bfloat16", "int8")
#: Labels of some texts, and their exit layers if rows leave early.
Answer: TypeAlias = tuple[Tensor, Tensor | None]
Job: TypeAlias = Callable[[Sequence[str]], Answer]


def records(repeats: int) -> Iterator[Record]:
    """Yield the seconds and the accuracy of each way to do the job."""
    folder = trained_folder()
    recipe, subject = Recipe.load(folder), models.subject("MiniLM")
    task = recipe.load_data(task=None, dev=None)
    (tuning, _), (reporting, _) = recipe.both_rows(task)
    data, collate = encoded(folder, subject.model, {"tuning": tuning}, max_length=recipe.max_length)
    trace, labels = collect_trace(subject.model, data["tuning"], collate_fn=collate)
    rule = ee.calibrate(trace, labels, target=ee.MaxDrop(DROP), criterion="entropy").criterion
    texts, truth = list(reporting.sentences), torch.as_tensor(reporting.labels)
    with torch.inference_mode():
        plain = in_batches(subject, lambda batch: (subject.plain(**batch).logits, None))(texts)[0]
        found = harness.prepare(_builders(subject, rule, texts, plain, truth))

        def header(variant: Variant) -> Record:
            return harness.record_header(SUITE, task.name, variant, shape=f"{len(texts)} texts")

        yield from found.skipped_records(header)
        times = found.times(rounds=repeats, prepare=measure.rest, progress=SUITE)
    baseline = next((times[variant] for variant in times if variant.engine == PIPELINE), None)
    for variant, own in times.items():
        record = header(variant) | dict(found.facts[variant]) | harness.time_fields(own)
        record |= {"rows": len(texts), "seconds": round(record["median_ms"] / 1000, 3)}
        if baseline is not None:
            record |= {"baseline": PIPELINE} | harness.ratio_fields(own, baseline)
        yield record


def _builders(
    subject: models.Subject, rule: Criterion, texts: Sequence[str], plain: Tensor, truth: Tensor
) -> Iterator[tuple[Variant, Callable[[], Implementation]]]:
    """Yield each way to do the job with a function that builds it."""

    def built(variant: Variant, make: Callable[[], tuple[Job, Callable[..., Any]]]) -> Implementation:
        job, prepare = make()
        check = partial(_checked, job, prepare, texts, plain, truth, AGREES[variant.dtype])
        return Implementation(variant, partial(job, texts), check, prepare, ours=variant.engine == "Scorer")

    ways: list[tuple[Variant, Callable[[], tuple[Job, Callable[..., Any]]]]] = [
        (Variant(PIPELINE, "", "float32", FULL), lambda: (as_pipeline(subject, 1), harness.do_nothing)),
    ]
    for name, kind, make in (
        (f"{PIPELINE}, batches of {BATCH}", "float32", None),
        ("ONNX Runtime", "float32", partial(peers.onnx_runtime, subject)),
        ("ONNX Runtime", "int8", partial(peers.onnx_runtime, subject, quantized=True)),
        ("OpenVINO", "float32", partial(peers.openvino, subject)),
        ("OpenVINO by default", "", partial(peers.openvino, subject, precision=peers.BY_DEFAULT)),
        ("OpenVINO", "int8", partial(peers.openvino, subject, precision=peers.BY_DEFAULT, quantized=True)),
    ):
        job = cache(partial(_other, subject, make))
        ways.append((Variant(name, "", kind, FULL), lambda job=job: (job(), harness.do_nothing)))
        by_size = Variant(f"{name}, sorted", "", kind, FULL)
        ways.append((by_size, lambda job=job: (by_length(job()), harness.do_nothing)))
    for stored in STORED:
        for exits, criterion in ((FULL, None), (OWN, rule)):
            ways.append((Variant("Scorer", "", stored, exits), partial(_scorer, subject, stored, criterion)))
    for variant, make_job in ways:
        yield variant, partial(built, variant, make_job)


def _other(subject: models.Subject, make: Callable[[], Any] | None) -> Job:
    return as_pipeline(subject, BATCH) if make is None else in_batches(subject, make())


def _scorer(subject: models.Subject, stored: str, rule: Criterion | None) -> tuple[Job, Callable[..., Any]]:
    model = engine_model(subject, FUSED_LAYERS, stored=stored)
    try:
        model.configure(path="fused", weights=stored)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    scorer = ee.Scorer(model, subject.tokenizer, drift_window=None)
    numbers = {label: number for number, label in model.config.id2label.items()}

    def job(texts: Sequence[str]) -> Answer:
        out = scorer(list(texts))
        return torch.tensor([int(numbers[label]) for label in out["label"]]), torch.tensor(out["exit_layer"])

    return job, partial(model.set_criterion, rule)


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
        found, _ = job([texts[number] for number in order])
        labels = torch.empty_like(found)
        labels[torch.tensor(order)] = found
        return labels, None

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
    job: Job,
    prepare: Callable[..., Any],
    texts: Sequence[str],
    plain: Tensor,
    truth: Tensor,
    least: float,
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
