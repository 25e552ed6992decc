"""The benchmarks of whole models, on tiny shapes: what they record and what they refuse to time."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

import earlyexit_kernels as ee
from benchmarks import compare
from benchmarks.end_to_end import (
    baselines,
    check,
    compaction_cost,
    contenders,
    engines,
    forced,
    goals,
    measure,
    models,
    offline,
    peers,
    profiles,
    server,
    single_stream,
)
from benchmarks.end_to_end.contenders import Case, Said
from benchmarks.end_to_end.workloads import Fixed, Ragged, Sst2
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.tasks import toy

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LOOPS = ("item loop", "mask loop", "truncation")
MIXES = ("full depth", "never exit", "never exit, family heads", "uniform, 50 %", "one row stays")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny models under the real names, no rests, and whatever the suites set put back."""
    subjects = {name: partial(models.random_subject, name, vocab_size=100, **SIZES) for name in models.SUBJECTS}
    monkeypatch.setattr(models, "SUBJECTS", subjects)
    monkeypatch.setattr(measure, "REST", 0)
    monkeypatch.setattr(server, "REST", 0)
    monkeypatch.setitem(check.PROBES, "cpu", Fixed(4, 8))
    for cache in (models.subject, engines.engine_model, check.rounding_of):
        cache.cache_clear()
    yield
    torch.set_flush_denormal(False)
    models.subject.cache_clear()


def run(case: Case) -> list[dict]:
    return list(measure.records("offline", [case], 1))


def one(records: list[dict], **fields) -> dict:
    (found,) = [r for r in records if fields.items() <= r.items()]
    return found


def test_efficiency_is_layers_saved_over_time_saved():
    # a plain model takes 100 ms at full depth; a quarter of its layer-rows should take 25 ms
    assert goals.efficiency(0.25, 25 / 100) == 1.0
    assert goals.efficiency(0.25, 50 / 100) == 0.5
    assert goals.efficiency(1.0, 125 / 100) == 0.8


def test_goals_are_of_cases_that_are_measured():
    measured = {
        (", ".join((case.subject, exits, case.work.name)), dtype)
        for case in (*single_stream.CASES, *offline.CASES)
        for exits in case.exits
        for dtype in case.dtypes
    }
    assert {key[:2] for key in goals.GOALS} <= measured
    reached = {"ratio": 0.5, "efficiency": 1.0}
    assert goals.Goal(0.5).met(reached) and not goals.Goal(0.4).met(reached)
    assert goals.Goal(1.0, "efficiency").met(reached) and not goals.Goal(1.1, "efficiency").met(reached)


@pytest.mark.parametrize(
    ("mix", "layers"),
    [
        ("never exit", [12] * 8),
        ("all at layer 1", [1] * 8),
        ("all at 25 %", [3] * 8),
        ("uniform, 50 %", [2, 3, 4, 5, 7, 8, 9, 10]),
        ("one row stays", [1] * 7 + [12]),
    ],
)
def test_schedules_are_those_of_the_mixes(mix, layers):
    assert forced.MIXES[mix](8, 12) == layers


def test_a_long_tail_runs_its_share():
    layers = forced.MIXES["long tail, 23 %"](32, 12)
    assert len(layers) == 32 and sum(layers) / 32 / 12 == pytest.approx(0.23, abs=0.02)
    leaving = [layers.count(layer) for layer in range(1, 13)]
    assert leaving[0] == max(leaving) and layers[-1] > 6


def random_trace(rows=16, depth=4) -> ee.ExitTrace:
    return ee.ExitTrace(2 * torch.randn(rows, depth, 3, generator=torch.Generator().manual_seed(3)))


def test_forced_rows_leave_as_the_schedule_says():
    schedule = forced.uniform(16, 4, 0.5)
    rule = forced.forced_rule(random_trace(), schedule)
    assert sorted(ee.replay(random_trace(), rule)[1].tolist()) == schedule


def test_a_trained_models_own_exits_run_as_many_layers_as_asked():
    rule = forced.own_rule(random_trace(64), 1.9)
    mean = float(ee.replay(random_trace(64), rule)[1].double().mean())
    assert mean == pytest.approx(4 / 1.9, abs=0.05)
    with pytest.raises(models.NotMeasuredError, match="--model"):
        forced.rule_for("own exits", random_trace(), trained=False)


@pytest.mark.parametrize("work", [Fixed(4, 8), Ragged(8)], ids=lambda work: work.name)
def test_every_contender_answers_right_and_is_recorded(work):
    records = run(Case("MiniLM", work, MIXES, LOOPS, "uniform, 50 %"))
    assert not [r for r in records if "refused" in r or "not_measured" in r]
    own = one(records, exits="uniform, 50 %", engine="family layers", baseline="transformers")
    schema = "suite case shape dtype engine backend baseline median_ms p90_ms p99_ms ratio ratio_low ratio_high goal"
    assert set(schema.split()) < set(own) and own["case"] == f"MiniLM, uniform, 50 %, {work.name}"
    assert own["layer_rows"] == pytest.approx(0.5, abs=0.26) and own["rows"] == len(forced_rows(work))
    assert own["efficiency"] == pytest.approx(own["layer_rows"] / own["ratio"], rel=1e-2)
    for loop in ("item loop", "mask loop"):
        assert one(records, engine=loop, baseline="transformers")["layer_rows"] == own["layer_rows"]
    assert one(records, engine="truncation", baseline="transformers")["layer_rows"] in (0.5, 1.0)
    stays = one(records, engine="fused layers", exits="one row stays", baseline="our full depth")
    assert stays["against"] == "fused layers"
    plain = one(records, engine="transformers")
    assert plain["baseline"] == "" and "ratio" not in plain and plain["rows_per_second"] > 0
    json.dumps(records)


def forced_rows(work) -> torch.Tensor:
    return work.build(models.subject("MiniLM")).batches[0]["input_ids"]


def test_rows_one_by_one_take_turns():
    seen = []
    subject = models.subject("MiniLM")
    batches = tuple(Fixed(1, length).build(subject).batches[0] for length in (4, 6))
    contender = contenders.Contender(Said("x", "", "float32", ""), seen.append, lambda: None, ())
    case = Case("MiniLM", Fixed(1, 4), (), one_by_one=True)
    call = measure._call(contender, case, contenders.Workload("two", batches))
    for _ in range(3):
        call()
    assert [batch["input_ids"].shape[1] for batch in seen] == [4, 6, 4]


def test_long_rounds_are_repeated_less_often():
    assert [measure.rounds_of(20, ms) for ms in (1, 100, 500, 10_000)] == [200, 50, 10, 5]
    assert measure.rounds_of(1, 10_000) == 1


def test_bfloat16_only_where_the_processor_has_it(monkeypatch):
    case = Case("MiniLM", Fixed(2, 8), ("never exit",), dtypes=("float32", "bfloat16"))
    monkeypatch.setattr(models, "runs_natively", lambda dtype: dtype == "float32")
    assert "bfloat16" in one(run(case), dtype="bfloat16")["not_measured"]
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    wanted = ("fused layers", "bfloat16", "never exit")
    ours = [r for r in run(case) if (r["engine"], r["dtype"], r["exits"]) == wanted]
    assert [r["baseline"] for r in ours] == ["transformers", "transformers, bfloat16"]
    narrow = models.subject("MiniLM", "bfloat16")
    assert narrow.model.dtype == torch.bfloat16 and models.subject("MiniLM").model.dtype == torch.float32
    assert (
        narrow.encoder.encoder.layer[0].output.dense.weight
        is narrow.model.backbone.encoder.layer[0].output.dense.weight
    )


def off_by_a_bit(subject, rule, layer):
    return lambda batch: (subject.plain(**batch).logits + 1e-3, None)


def failing(subject, rule, layer):
    def answer(batch):
        raise ValueError("no such thing\nas this")

    return answer


def stays_too_long(subject, rule, layer):
    """The mask loop, but a row that should leave at the first layer runs on to the last."""
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
        ("torch.compile", failing, "ValueError: no such thing"),
        ("mask loop", stays_too_long, "rounding doesn't explain it"),
    ],
)
def test_wrong_answers_get_no_numbers(monkeypatch, name, broken, reason):
    monkeypatch.setitem(baselines.BASELINES, name, broken)
    records = run(Case("MiniLM", Fixed(4, 8), ("never exit",), (name,), "uniform, 50 %"))
    record = one(records, engine=name)
    assert reason in record["refused"] and "median_ms" not in record and "ratio" not in record
    assert one(records, engine="family layers", baseline="transformers")["ratio"] > 0


def test_an_engine_whose_trace_is_wrong_gets_no_numbers(monkeypatch):
    def spoil(model):
        model.backbone.encoder.layer[1] = nn.Identity()
        model.backbone.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden

    monkeypatch.setitem(engines.ENGINES, "broken", spoil)
    case = Case("MiniLM", Fixed(4, 8), ("full depth", "uniform, 50 %"), engines=("family layers", "broken"))
    records = run(case)
    broken = [r for r in records if r["engine"] == "broken"]
    assert len(broken) == 2 and all("plain model's logits" in r["refused"] for r in broken)
    assert one(records, engine="family layers", exits="uniform, 50 %", baseline="transformers")["ratio"] > 0


def verdict_of(score_off: float) -> check.Verdict:
    """Three rows at three exits; the first leaves at layer 2, though its entropy at layer 1 is `score_off` below."""
    trace = random_trace(3, 3)
    truth = check.Truth(trace, trace.logits[:, -1], 1e-5, 1e-5)
    entropy = forced.per_exit_entropy(trace.logits)
    threshold = float(entropy[0, 0]) + score_off
    rule = Entropy(threshold=[threshold, 100.0])
    exits = ee.replay(trace, rule)[1]
    assert exits[0] == 1
    exits[0] = 2
    return check.verdict([truth], [(trace.logits[torch.arange(3), exits - 1], exits)], rule)


def test_flips_within_rounding_are_counted_and_others_refused():
    near = verdict_of(1e-6)
    assert (near.refused, near.flips) == ("", 1)
    assert "row 0 left at layer 2, in the replay at 1" in verdict_of(1e-2).refused


@pytest.mark.parametrize("exits", [[1, 2], [0, 1, 2], [1, 4, 2]])
def test_impossible_exit_layers_are_refused(exits):
    trace = random_trace(3, 3)
    truth = check.Truth(trace, trace.logits[:, -1], 1e-5, 1e-5)
    answer = (trace.logits[: len(exits), 0], torch.tensor(exits))
    assert "exit layers in 1..3" in check.verdict([truth], [answer], None).refused


def test_runtimes_that_are_not_installed_say_so(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    records = run(Case("MiniLM", Fixed(2, 8), ("never exit",), tuple(baselines.PEERS)))
    for name in baselines.PEERS:
        assert "[peers]" in one(records, engine=name)["not_measured"]


def test_the_faster_runtime_is_the_one_compared_with(monkeypatch):
    for name in baselines.PEERS:
        monkeypatch.setitem(baselines.BASELINES, name, baselines.plain)
    records = run(Case("MiniLM", Fixed(2, 8), ("uniform, 50 %",), tuple(baselines.PEERS)))
    middle = {name: one(records, engine=name, baseline="transformers")["median_ms"] for name in baselines.PEERS}
    ours = one(records, engine="fused layers", baseline="faster peer")
    assert ours["against"] == min(middle, key=middle.get)


def test_more_baselines_in_any_dtype_and_so_many_rounds(monkeypatch):
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    loops = (baselines.COMPILED_WHOLE, "item loop")
    half = "all at 50 %"
    case = Case(
        "MiniLM", Fixed(1, 8), ("never exit", half), loops, half, ("float16",), engines=("family layers",),
        narrow_baselines=("transformers", *loops), compared=loops,
    )  # fmt: skip
    with torch.inference_mode():
        records = list(measure.case_records("offline", case, 1, rounds=3, warmup=1))
    assert all(r["rounds"] == 3 and r["dtype"] == "float16" for r in records)
    ours = [r for r in records if r["engine"] == "family layers"]
    assert {(r["exits"], r["baseline"]) for r in ours if r["baseline"] in loops} == {
        ("never exit", baselines.COMPILED_WHOLE),
        (half, baselines.COMPILED_WHOLE),
        (half, "item loop"),
    }
    loop = one(records, engine="family layers", baseline="item loop")
    assert loop["ratio"] > 0 and "efficiency" not in loop


@pytest.mark.slow
def test_the_other_runtimes_answer_as_the_plain_model():
    for package in ("onnxruntime", "openvino", "onnxscript"):
        pytest.importorskip(package)
    records = run(Case("MiniLM", Ragged(5), ("never exit",), tuple(baselines.PEERS)))
    assert {r["engine"] for r in records if r["baseline"] == "transformers"} == {
        "family layers",
        "fused layers",
        *baselines.PEERS,
    }


def test_text_is_asked_for(monkeypatch):
    monkeypatch.delenv("EARLYEXIT_DATA", raising=False)
    (record,) = run(Case("MiniLM", Sst2(2, 1), ("never exit",)))
    assert record["case"] == "MiniLM, B 2, SST-2 lengths" and "EARLYEXIT_DATA" in record["not_measured"]


def test_a_trained_folder_stands_beside_its_plain_encoder(tmp_path, monkeypatch):
    ee.to_early_exit(toy.toy_model(0, layers=2, hidden=16), pooling="mean").save_pretrained(tmp_path)
    toy.toy_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(models.SUBJECTS, "MiniLM", models.minilm)
    monkeypatch.setenv(models.MODEL_VARIABLE, str(tmp_path))
    records = run(Case("MiniLM", Ragged(8), ("never exit", "own exits"), LOOPS, "own exits"))
    assert not [r for r in records if "refused" in r or "not_measured" in r]
    assert {r["weights"] for r in records} == {"trained"}


def test_the_server_takes_what_has_arrived():
    batches, waiting = [], [0.0, 0.5, 0.6, 0.7, 5.0]

    def stopwatch(call):
        call()
        return 1.0

    answer = batches.append
    latencies = server.serve(answer, [torch.ones(n + 2, dtype=torch.long) for n in range(5)], waiting, 2, stopwatch)
    # 0 to 1: the first row; 1 to 2: the next two; 2 to 3: the fourth; idle until 5
    assert latencies == pytest.approx([1.0, 1.5, 1.4, 2.3, 1.0])
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 2), (2, 4), (1, 5), (1, 6)]
    assert batches[1]["attention_mask"].sum(dim=1).tolist() == [3, 4]


def test_arrivals_are_seeded_and_come_at_their_rate():
    times = server.arrivals(50.0, 4000, 1)
    assert times == server.arrivals(50.0, 4000, 1) != server.arrivals(50.0, 4000, 2)
    assert times == sorted(times) and times[-1] == pytest.approx(80, rel=0.1)


def test_rates_are_relative_to_the_plain_model():
    def stopwatch(call):
        call()
        return 0.1

    case = Case("MiniLM", Fixed(4, 8), ("never exit",))
    with torch.inference_mode():
        records = list(server.case_records(case, 2, stopwatch))
    assert [r["rows_per_second"] for r in records if r["engine"] == "transformers"] == [16.0, 32.0, 48.0]
    ours = one(records, engine="family layers", rate=0.4)
    # both take 0.1 s a batch, and meet the same arrivals
    assert (ours["ratio"], ours["baseline"], ours["sessions"]) == (1.0, "transformers", 2)
    assert 100.0 <= ours["median_ms"] <= ours["p90_ms"] <= ours["p99_ms"]


def test_a_compaction_is_timed_beside_a_layer():
    record = compaction_cost.measure(64, rows=2, length=8, repeats=1)
    assert record["moved_values"] == 64 * 6 and record["compaction_macs"] > 0


def test_a_profile_accounts_for_the_whole_time(monkeypatch):
    monkeypatch.setattr(profiles, "CASES", (Case("MiniLM", Fixed(4, 8), ("never exit", "uniform, 50 %")),))
    monkeypatch.setattr(profiles, "MANY_TOKENS", 16)
    monkeypatch.setattr(profiles, "RUNS", 2)
    records = list(profiles.records())
    never, half = (one(records, exits=exits) for exits in ("never exit", "uniform, 50 %"))
    assert never["token_layers"] == 4 * 8 * 2 and half["token_layers"] == 4 * 8
    for record in (never, half):
        shares = [record[f"{kind}_share"] for kind in (*profiles.KINDS, "rest")]
        assert all(0 <= share < 1 for share in shares) and sum(shares) == pytest.approx(1, abs=1e-3)
        assert record["engine"] == "fused layers" and min(record["products_share"], record["exits_share"]) > 0
        assert record["products_gflops"] > 0 and record["best_gflops"] > 0
    assert never["moves_share"] == 0


def test_the_layers_of_the_family_may_run_fewer_mixes():
    case = Case("MiniLM", Fixed(4, 8), ("never exit", "uniform, 50 %"), family_exits=("never exit",))
    ran = {(r["engine"], r["exits"]) for r in run(case) if r["engine"] in engines.ENGINES}
    assert ran == {("family layers", "never exit"), ("fused layers", "never exit"), ("fused layers", "uniform, 50 %")}


def test_versions_run_a_few_cases():
    assert set(compare.SUBJECTS) <= set(models.SUBJECTS)
    with torch.inference_mode():
        cases = compare.worker_cases("MiniLM")
        outputs = {name: call() for name, call in cases.items()}
    assert len(cases) == 7
    assert {len(out.exit_layer) for out in outputs.values()} == {1, 32}
    mixed = outputs["MiniLM, uniform, 50 %, B 32, S 4 to 35"].exit_layer
    assert outputs["MiniLM, never exit, B 32, S 32"].exit_layer.tolist() == [2] * 32 and mixed.min() == 1
