"""The benchmarks of whole models on tiny shapes: their records, tables and plots, and what they refuse to time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support import fake_gpu
from torch import nn

import earlyexit_kernels as ee
from benchmarks import goals, harness, plots, tables
from benchmarks.end_to_end import answers, baselines, forced, job, measure, models, peers, server, suites
from benchmarks.end_to_end.suites import Case, beside, ours
from benchmarks.end_to_end.workloads import Fixed, Ragged, Workload
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.data import toy

LOOPS = ("item loop", "mask loop", "truncation")
MIXES = ("full depth", "never exit", "never exit, family heads", "uniform, 50 %", "one row stays")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Use tiny models under the names of the usual ones, without pauses between measurements."""
    fake_gpu.use_tiny_models(monkeypatch)
    monkeypatch.setattr(server, "REST", 0)
    yield
    fake_gpu.clear_caches()


def case_of(work, *exits, baselines=(), baseline_exits="uniform, 50 %", **how) -> Case:
    dtypes = how.get("dtypes", ("float32",))
    return Case(
        "MiniLM", work, (*ours(*exits, **how), *beside("transformers", *baselines, exits=baseline_exits, dtypes=dtypes))
    )


def run(case: Case) -> list[dict]:
    return list(measure.records("offline", [case], 1))


def one(records: list[dict], **fields) -> dict:
    (found,) = [r for r in records if fields.items() <= r.items()]
    return found


def test_goals_are_of_measured_cases():
    cases = [case for suite in suites.CASES.values() for case in suite]
    names = {f"{case.subject}, {variant.exits}, {case.work.name}" for case in cases for variant in case.variants}
    assert {case for case, _, _ in goals.END_TO_END} <= names


def random_trace(rows=16, depth=4) -> ee.ExitTrace:
    return ee.ExitTrace(2 * torch.randn(rows, depth, 3, generator=torch.Generator().manual_seed(3)))


def test_exit_layers_of_the_mixes():
    assert forced.MIXES["all at 25 %"](8, 12) == [3] * 8
    assert forced.MIXES["uniform, 50 %"](8, 12) == [2, 3, 4, 5, 7, 8, 9, 10]
    tail = forced.MIXES["long tail, 23 %"](32, 12)
    assert len(tail) == 32 and sum(tail) / 32 / 12 == pytest.approx(0.23, abs=0.02) and tail[-1] > 6
    schedule = forced.uniform(16, 4, 0.5)
    rule = forced.forced_rule(random_trace(), schedule)
    assert sorted(ee.replay(random_trace(), rule)[1].tolist()) == schedule


def test_own_exits_run_as_many_layers_as_asked():
    rule = forced.own_rule(random_trace(64), 1.9)
    mean = float(ee.replay(random_trace(64), rule)[1].double().mean())
    assert mean == pytest.approx(4 / 1.9, abs=0.05)
    with pytest.raises(NotMeasuredError, match="--model"):
        forced.rule_for("own exits", random_trace(), trained=False)


@pytest.mark.parametrize("work", [Fixed(4, 8), Ragged(8)], ids=lambda work: work.name)
def test_every_variant_is_right_and_recorded(work):
    records = run(case_of(work, *MIXES, baselines=LOOPS))
    assert not [r for r in records if "refused" in r or "not_measured" in r]
    own = one(records, exits="uniform, 50 %", engine="family layers", baseline="transformers")
    schema = "suite case shape dtype engine backend baseline median_ms p90_ms p99_ms ratio ratio_low ratio_high goal"
    assert set(schema.split()) < set(own) and own["case"] == f"MiniLM, uniform, 50 %, {work.name}"
    assert own["layer_rows"] == pytest.approx(0.5, abs=0.26) and own["rows"] == work.rows
    assert own["efficiency"] == pytest.approx(own["layer_rows"] / own["ratio"], rel=1e-2)
    for loop in ("item loop", "mask loop"):
        assert one(records, engine=loop, baseline="transformers")["layer_rows"] == own["layer_rows"]
    assert one(records, engine="truncation", baseline="transformers")["layer_rows"] in (0.5, 1.0)
    stays = one(records, engine="fused layers", exits="one row stays", baseline="our full depth")
    assert stays["against"] == "fused layers"
    plain = one(records, engine="transformers")
    assert plain["baseline"] == "" and "ratio" not in plain and plain["rows_per_second"] > 0
    json.dumps(records)


def test_single_rows_take_turns():
    seen = []
    subject = models.subject("MiniLM")
    batches = tuple(Fixed(1, length).build(subject).batches[0] for length in (4, 6))
    call = measure._next_batch(Workload("two", batches), seen.append)
    for _ in range(3):
        call()
    assert [batch["input_ids"].shape[1] for batch in seen] == [4, 6, 4]


def test_bfloat16_only_if_the_processor_has_it(monkeypatch):
    case = case_of(Fixed(2, 8), "never exit", dtypes=("float32", "bfloat16"))
    monkeypatch.setattr(models, "runs_natively", lambda dtype: dtype == "float32")
    assert "bfloat16" in one(run(case), dtype="bfloat16")["not_measured"]
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    wanted = ("fused layers", "bfloat16", "never exit")
    ours = [r for r in run(case) if (r["engine"], r["dtype"], r["exits"]) == wanted]
    assert [r["baseline"] for r in ours] == ["transformers", "transformers, bfloat16"]


def off_by_a_bit(subject, rule, layer):
    return lambda batch: (subject.plain(**batch).logits + 1e-3, None)


def stays_too_long(subject, rule, layer):
    """The mask loop, but a row that should leave at the first layer runs to the last."""
    right = baselines.mask_loop(subject, rule, layer)

    def answer(batch):
        _, exits = right(batch)
        exits[exits.argmin()] = 2
        return subject.model.trace(**batch).logits[torch.arange(len(exits)), exits - 1], exits

    return answer


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("torch.compile", off_by_a_bit, "off the expected"),
        ("mask loop", stays_too_long, "rounding does not explain it"),
    ],
)
def test_wrong_baseline_is_refused(monkeypatch, name, broken, reason):
    monkeypatch.setitem(baselines.BASELINES, name, broken)
    records = run(case_of(Fixed(4, 8), "never exit", baselines=(name,)))
    record = one(records, engine=name)
    assert reason in record["refused"] and "median_ms" not in record and "ratio" not in record
    assert one(records, engine="family layers", baseline="transformers")["ratio"] > 0


def test_engine_with_a_wrong_trace_is_refused(monkeypatch):
    def spoil(model, backend):
        model.backbone.encoder.layer[1] = nn.Identity()
        model.backbone.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden

    monkeypatch.setitem(models.ENGINES, "broken", spoil)
    case = case_of(Fixed(4, 8), "full depth", "uniform, 50 %", engines=("family layers", "broken"))
    records = run(case)
    broken = [r for r in records if r["engine"] == "broken"]
    assert len(broken) == 2 and all("plain model's logits" in r["refused"] for r in broken)
    assert one(records, engine="family layers", exits="uniform, 50 %", baseline="transformers")["ratio"] > 0


def checked(score_off: float) -> harness.Checked:
    """Three rows at three exits; the first leaves at layer 2, though its entropy at layer 1 is `score_off` below."""
    trace = random_trace(3, 3)
    truth = answers.Truth(trace, trace.logits[:, -1], 1e-5, 1e-5)
    entropy = forced.entropy_per_exit(trace.logits)
    rule = Entropy(threshold=[float(entropy[0, 0]) + score_off, 100.0])
    exits = ee.replay(trace, rule)[1]
    assert exits[0] == 1
    exits[0] = 2
    return answers.check_answers([truth], [(trace.logits[torch.arange(3), exits - 1], exits)], rule)


def test_flips_within_rounding_are_counted_and_others_refused():
    near = checked(1e-6)
    assert (near.wrong, near.facts["flips"]) == ("", 1)
    assert "row 0 left at layer 2, in the replay at 1" in checked(1e-2).wrong


def test_impossible_exit_layers_are_refused():
    trace = random_trace(3, 3)
    truth = answers.Truth(trace, trace.logits[:, -1], 1e-5, 1e-5)
    for exits in ([1, 2], [0, 1, 2], [1, 4, 2]):
        answer = (trace.logits[: len(exits), 0], torch.tensor(exits))
        assert "exit layers in 1..3" in answers.check_answers([truth], [answer], None).wrong


def test_stored_weights_are_beside_runtimes_of_their_arithmetic(monkeypatch):
    for name in peers.RUNTIMES:
        monkeypatch.setitem(baselines.BASELINES, name, baselines.plain)
    case = suites.CASES[suites.STORED][0]
    records = list(measure.records(suites.STORED, [case], 1))
    assert not [r for r in records if "refused" in r or "not_measured" in r]
    against = {r["dtype"]: r["against"] for r in records if r["baseline"] == goals.PEER}
    assert set(against) == set(suites.TYPES) and against["bfloat16"] == "OpenVINO in bfloat16"
    middle = {r["engine"]: r["median_ms"] for r in records if r["engine"] in peers.RUNTIMES}
    fastest = min(baselines.PEERS, key=middle.get)
    assert against["int8"].endswith("int8") and against["float32"] == against["float16"] == fastest
    errors = {r["dtype"]: r["error"] for r in records if r["engine"] == "fused layers"}
    assert errors["float32"] < errors["float16"] < errors["bfloat16"]
    monkeypatch.setitem(suites.WITHIN, "int8", errors["int8"] / 2)
    again = measure.records(suites.STORED, [dataclasses.replace(case, variants=case.variants[:8])], 1)
    refused = {(r["dtype"], r["exits"]) for r in again if "plain model's logits" in r.get("refused", "")}
    assert refused == {("int8", exits) for exits in ("never exit", "all at 50 %")}


@pytest.mark.thorough
def test_runtimes_answer_as_the_plain_model():
    for package in ("onnxruntime", "openvino", "onnxscript"):
        pytest.importorskip(package)
    records = run(case_of(Ragged(5), "never exit", baselines=baselines.PEERS))
    assert {r["engine"] for r in records if r["baseline"] == "transformers"} == {
        "family layers",
        "fused layers",
        *baselines.PEERS,
    }


def test_trained_folder_beside_its_plain_encoder(tmp_path, monkeypatch):
    ee.to_early_exit(toy.toy_model(0, layers=2, hidden=16), pooling="mean").save_pretrained(tmp_path)
    toy.toy_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(models.SUBJECTS, "MiniLM", models.minilm)
    monkeypatch.setenv(models.MODEL_VARIABLE, str(tmp_path))
    records = run(case_of(Ragged(8), "never exit", "own exits", baselines=LOOPS, baseline_exits="own exits"))
    assert not [r for r in records if "refused" in r or "not_measured" in r]
    assert {r["weights"] for r in records} == {"trained"}


def test_ways_to_do_a_job_give_the_labels_of_the_plain_model(tmp_path):
    ee.to_early_exit(toy.toy_model(0, layers=3, hidden=16), pooling="mean").save_pretrained(tmp_path)
    toy.toy_tokenizer().save_pretrained(tmp_path)
    subject = models.trained_subject("MiniLM", str(tmp_path))
    texts = toy.write_splits(dev_rows=70, train_rows=1)["dev"]
    texts = [row.text for row in texts]
    plain = job.in_batches(subject, lambda batch: (subject.plain(**batch).logits, None))
    scorer = job.by_scorer(subject, "float32")
    with torch.inference_mode():
        wanted = plain(texts)[0].tolist()
        assert len(set(wanted)) > 1
        for way in (job.as_pipeline(subject, 1), job.as_pipeline(subject, job.BATCH), job.by_length(plain), scorer):
            assert way(texts)[0].tolist() == wanted
        job._set_criterion(subject, "float32", Entropy(threshold=0.69))
        assert 1 <= scorer(texts)[1].min() < 3, "with a criterion rows leave early"
        truth = torch.tensor(wanted)
        checked = job._checked(plain, harness.do_nothing, texts, truth, truth, 0.995)
        assert checked == harness.Checked("", {"accuracy": 1.0, "same": 1.0})
        wrong = job._checked(lambda texts: (1 - truth, None), harness.do_nothing, texts, truth, truth, 0.995)
        assert "0.00% of its labels" in wrong.wrong


def test_server_takes_the_rows_that_have_arrived():
    batches, waiting = [], [0.0, 0.5, 0.6, 0.7, 5.0]

    def stopwatch(call):
        call()
        return 1.0

    queries = [torch.ones(n + 2, dtype=torch.long) for n in range(5)]
    latencies = server.session(server.whole(batches.append), queries, waiting, 2, stopwatch)
    # 0 to 1: the first row; 1 to 2: the next two; 2 to 3: the fourth; idle until 5
    assert latencies == pytest.approx([1.0, 1.5, 1.4, 2.3, 1.0])
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 2), (2, 4), (1, 5), (1, 6)]
    assert batches[1]["attention_mask"].sum(dim=1).tolist() == [3, 4]


def test_server_rates_are_relative_to_the_plain_model():
    def stopwatch(call):
        call()
        return 0.1

    case = case_of(Fixed(4, 8), "never exit")
    with torch.inference_mode():
        records = list(server.records(2, case, stopwatch))
    assert [r["rows_per_second"] for r in records if r["engine"] == "transformers"] == [16.0, 32.0, 48.0, 80.0]
    ours = one(records, engine="family layers", rate=0.4)
    # both take 0.1 s a batch and have the same arrivals
    assert (ours["ratio"], ours["baseline"], ours["sessions"]) == (1.0, "transformers", 2)
    assert 100.0 <= ours["median_ms"] <= ours["p90_ms"] <= ours["p99_ms"]
    assert 0 < ours["goodput"] <= 40.0, "rows a second of a server that takes 0.1 s for at most 4 rows"


def test_every_way_of_serving_runs_the_exits_of_its_variant(monkeypatch):
    monkeypatch.setattr(server, "OWN", "uniform, 50 %")
    case = case_of(Fixed(4, 8), "uniform, 50 %", engines=("fused layers",))
    with torch.inference_mode():
        _, found, _ = measure.prepared("server", case, lambda work, answer: answer)
        (one,) = [one for one in found.ready.values() if one.ours]
        servers = server._servers(found.ready)
        ours = {name.engine: way for name, way in servers.items() if way.variant == one.variant}
        assert set(ours) == {"fused layers", "fused layers, streaming"}
        for name, way in ours.items():
            one.model.set_criterion(None)
            way.prepare()
            queries = [torch.ones(n + 2, dtype=torch.long) for n in range(4)]
            assert len(server.session(way.answered, queries, [0.0] * 4, 4, server.seconds)) == 4, name
            assert one.model.criterion is not None, name


def test_server_answers_rows_as_they_leave_a_batch():
    """Each call takes a second: the layers of a stream up to the next exit."""

    def stopwatch(call):
        call()
        return 1.0

    model = ee.to_early_exit(toy.toy_model(layers=3, hidden=16)).eval()
    queries = [torch.tensor([2, *range(5, 5 + n), 3]) for n in range(1, 7)]
    batch = server.padded(queries)
    trace = model.trace(**batch)
    first = torch.special.entr(trace.logits[:, 0].double().softmax(dim=1)).sum(dim=1).sort().values
    model.set_criterion(ee.criteria.Entropy(threshold=[float(first[2:4].mean()), 0.0]))
    exits = model(**batch).exit_layer
    early = exits == 1
    assert early.sum() == 3, "half of the rows leave at the first exit, the others at the last"
    with torch.inference_mode():
        streamed = server.session(server.streamed(model), queries, [0.0] * 6, 16, stopwatch)
        late = server.session(server.streamed(model), queries, [0.0] * 5 + [100.0], 16, stopwatch)
    assert streamed == [1.0 if one else 2.0 for one in early]
    assert late[5] == (1.0 if early[5] else 2.0), "the clock moves to the next arrival"
    assert server._by_depth([streamed], exits, 3) == {"early_ms": 1000.0, "late_ms": 2000.0}


MEASURED = {"suite": "offline", "subject": "BERT-base", "shape": "B 32, S 32", "backend": "cpp", "dtype": "float32"}
NUMBERS = {"layer_rows": 0.39, "tokens": 1.0, "flips": 1, "rows": 32, "median_ms": 80.0, "p90_ms": 81.0, "depth": 12}
NUMBERS |= {"p99_ms": 82.0, "rows_per_second": 400.0, "ratio": 0.4, "ratio_low": 0.39, "ratio_high": 0.42}
OURS = {"engine": "fused layers", "exits": "uniform, 39 %", "case": "BERT-base, uniform, 39 %, B 32, S 32"}
OTHER = {"engine": "OpenVINO", "backend": "", "exits": "full depth", "case": "BERT-base, full depth, B 32, S 32"}


def fake_records() -> list[dict]:
    goal = {"efficiency": 0.975, "goal": 1.05, "goal_of": "efficiency", "goal_met": False}
    plain = {"baseline": "transformers", "against": "transformers"}
    mine = {**MEASURED, **OURS, **NUMBERS, "mean_exit_layer": 4.7}
    return [
        {**mine, **plain, **goal},
        {**mine, **plain, **goal, "engine": "family layers"},
        {**mine, "exits": "never exit", **plain, "efficiency": 1.0, "goal": None},
        {**mine, "baseline": "our full depth", "against": "fused layers", "efficiency": 1.0, "goal": None},
        {**MEASURED, **OTHER, "baseline": "", "not_measured": "not installed"},
        {**MEASURED, **OURS, "engine": "mask loop", "baseline": "", "refused": "its logits are off"},
    ]


def test_tables_show_what_was_measured_and_what_was_not(tmp_path):
    harness.save("offline", fake_records(), results=tmp_path, commit="bbbb")
    harness.save("single_stream", [], results=tmp_path, commit="aaaa")
    first, *_, line, _, reached = tables.end_to_end(tmp_path).splitlines()
    assert first.endswith("commit aaaa, bbbb:"), "a table of two suites names both commits"
    assert reached == f"Reached: 0 of 1 goals; not measured: {len(goals.END_TO_END) - 1}."
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["fused layers, cpp", "transformers", "0.400 (0.390 to 0.420)", "0.97", "efficiency 1.05", "no"]
    text = tables.TABLES["offline"](tmp_path)
    assert "| 0.39 |" in text.replace("       ", " ") and "400.0" in text
    assert "- Not measured: OpenVINO: not installed." in text
    assert f"- Refused: mask loop, cpp ({OURS['case']}): its logits are off." in text
    assert {tables.TABLES[suite](tmp_path) for suite in ("server", "newer_families")} == {"Not measured yet."}


def test_plots_are_drawn_from_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    harness.save("offline", fake_records(), results=tmp_path)
    drawn = plots.write(tmp_path)
    assert [path.name.removeprefix(harness.machine_name()) for path in drawn] == ["-exits.png", "-never_exit.png"]
    assert tables.end_to_end(tmp_path).count("![") == 2
