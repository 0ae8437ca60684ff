"""The model: facts of GPUs, how times grow with what they depend on, published figures, the pick that nobody tuned."""

import dataclasses
import math

import pytest
from kdagen.autotune import gpus, model
from kdagen.autotune.cycles import LEAST, USUAL, cycles
from kdagen.autotune.model import GAIN, LAUNCH, differences, pick, predict, predicted, threads_of
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Task, Workload
from kdagen.autotune.tiles import lowering

from kdagen.pipeline import compile_stages, compile_training_stages
from kdagen.recurrence import load
from kdagen.target import TARGETS

KDA = Task("kda", "inference", "sm90", "H100")
H100 = gpus.GPUS["H100"]
NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "AMD Instinct MI300X": "MI300X",
}


def shape(text):
    return Workload.parse(text)


def default_tiles(task=KDA, **choices):
    low = lowering(task)
    return {t.kernel.family: t for tiles in low.passes(low.complete(**choices)).values() for t in tiles}


def part(prediction, family):
    return next(p for p in prediction.parts if p.kernel.endswith(family))


# -- facts


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda g: g.name)
def test_facts_are_of_a_target_that_kdagen_has(gpu):
    target = TARGETS[gpu.target]
    assert target.shared_bytes == gpu.shared_block <= gpu.shared
    assert gpu.name.split()[-1] in target.example or gpu.name == "H200"
    assert gpu.source and gpu.threads % 32 == 0 and gpu.registers % 65536 == 0


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda g: g.name)
def test_what_was_measured_is_no_more_than_the_data_sheet_says(gpu):
    assert 0.7 * gpu.memory < gpu.copy < gpu.memory and 0.7 * gpu.flops < gpu.products < gpu.flops
    a_cycle = gpu.flops / gpu.processors / gpu.clock  # tensor cores do a power of two
    assert a_cycle == pytest.approx(2 ** round(math.log2(a_cycle)), rel=0.03)


def test_a_gpu_is_found_by_its_name_or_by_what_it_calls_itself():
    assert {own: gpus.find(own).name for own in NAMES} == NAMES
    assert gpus.find("h100") is H100
    for other in (
        "NVIDIA H100 PCIe",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "Tesla T4",
        "",
    ):
        assert gpus.find(other) is None


def test_the_nearest_gpu_is_of_the_same_target_if_any_is():
    others = [g for g in gpus.GPUS.values() if g.name != "H100"]
    assert gpus.nearest(H100, others).name == "H200"
    assert gpus.nearest(gpus.GPUS["RTX 4090"], (gpus.GPUS["RTX 5090"], gpus.GPUS["B200"])).name == "RTX 5090"
    assert gpus.nearest(H100, []) is None


# -- how times grow


def test_bytes_grow_with_tokens_and_the_bandwidth_term_with_bytes():
    once, twice = (predicted(KDA, space_of(KDA).default, shape(s)) for s in ("64x1024x64", "128x1024x64"))
    for a, b in zip(once.parts, twice.parts):
        assert b.bytes == pytest.approx(2 * a.bytes)
    a, b = part(once, "scan"), part(twice, "scan")
    assert a.limiter == b.limiter == "bandwidth"
    assert b.ms - 1e3 * LAUNCH == pytest.approx(2 * (a.ms - 1e3 * LAUNCH))


def test_half_the_bandwidth_takes_twice_as_long():
    slow = dataclasses.replace(H100, memory=H100.memory / 2, measured_copy=H100.copy / 2)
    tiles = [default_tiles()["scan"]]
    fast, slow = (predict(tiles, gpu, shape("64x1024x64")) for gpu in (H100, slow))
    assert slow.ms - 1e3 * LAUNCH == pytest.approx(2 * (fast.ms - 1e3 * LAUNCH))
    assert slow.limiter == "bandwidth"


def test_the_chain_is_linear_in_tokens():
    times = [part(predicted(KDA, space_of(KDA).default, shape(f"1x{t}x4")), "scan").ms for t in (65536, 131072)]
    assert times[1] / times[0] == pytest.approx(2, rel=1e-2)


def test_the_chain_is_the_longest_sequences():
    long, ragged = (part(predicted(KDA, space_of(KDA).default, shape(s)), "scan") for s in ("1x4096x4", "4096+64+64:4"))
    assert ragged.ms == pytest.approx(long.ms)


def test_waves_step_where_the_processors_are_full():
    endless = dataclasses.replace(H100, memory=1e20, measured_copy=0)

    def scan(heads):
        return predict([default_tiles()["scan"]], endless, shape(f"1x2048x{heads}")).parts[0]

    full = H100.processors
    assert [scan(n).waves for n in (1, full, full + 1, 2 * full, 2 * full + 1)] == [1, 1, 2, 2, 3]
    assert scan(1).ms == scan(full).ms < scan(full + 1).ms == scan(2 * full).ms


def test_tiles_of_v_share_what_they_fetch_alike():
    wide, narrow = (default_tiles(v_tile=v)["scan"] for v in (128, 64))
    assert narrow.bytes_a_token == wide.bytes_a_token
    assert narrow.block_bytes < wide.block_bytes
    assert (narrow.tiles, wide.tiles) == (2, 1)


def test_more_stages_never_take_longer_and_one_waits_for_memory():
    by_stages = [predicted(KDA, lowering(KDA).complete(stages=n), shape("1x8192x8")).ms for n in (1, 2, 3, 4)]
    assert by_stages == sorted(by_stages, reverse=True) and by_stages[0] > by_stages[1]


def test_scans_have_threads_that_fetch_where_there_is_tma():
    scan, prepare = default_tiles()["scan"], default_tiles()["prepare"]
    assert [threads_of(t, H100) for t in (scan, prepare)] == [256 + 128, 64]
    assert threads_of(scan, gpus.GPUS["A100"]) == 256


def test_workspaces_that_stay_in_the_cache_are_not_memorys():
    small, large = (predicted(KDA, space_of(KDA).default, shape(s)) for s in ("1x1024x8", "1x65536x64"))
    tokens = {small: 1024 * 8, large: 65536 * 64}
    assert part(small, "scan").bytes / tokens[small] < part(large, "scan").bytes / tokens[large]


def test_asynchronous_products_wait_less():
    waiting, not_waiting = (
        cycles(default_tiles(scan_skeleton=f"scan_{name}")["scan"], H100, USUAL).latency
        for name in ("pipelined", "specialised")
    )
    assert not_waiting < waiting


@pytest.mark.parametrize("latencies", [LEAST, USUAL], ids=["least", "usual"])
def test_a_longer_chunk_costs_more_cycles_but_fewer_a_token(latencies):
    low, task = lowering(KDA), KDA
    a_chunk = [cycles(default_tiles(task, chunk_size=c)["scan"], H100, latencies).latency for c in (16, 32, 64)]
    assert a_chunk == sorted(a_chunk) and [n / c for n, c in zip(a_chunk, (16, 32, 64))] == sorted(
        (n / c for n, c in zip(a_chunk, (16, 32, 64))), reverse=True
    )
    assert low.complete().chunk_size == 16


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda g: g.name)
@pytest.mark.parametrize("purpose, text", [("inference", "1x4096x32"), ("decode", "64x1x32")])
def test_the_bound_is_below_the_estimate(gpu, purpose, text):
    task = Task("gated_deltanet", purpose, gpu.target, gpu.name)
    for schedule in space_of(task).survey().legal[::7]:
        for p in predicted(task, schedule, shape(text)).parts:
            assert 0 < p.bound_ms < p.ms and p.limiter in ("bandwidth", "arithmetic", "latency", "launch")


def test_a_compilation_is_predicted_as_its_candidate_is():
    w = shape("1x4096x32")
    assert predict(compile_stages(load("kda")), H100, w) == predicted(KDA, space_of(KDA).default, w)
    task = dataclasses.replace(KDA, purpose="training")
    whole = predict(compile_training_stages(load("kda")), H100, w)
    assert whole == predicted(task, space_of(task).default, w)
    assert [p.kernel for p in whole.parts].count("kda_prepare") == 2  # in the backward again


# -- published figures of the nearest design: prepare and scan, chunks of 16, one block a head (FlashKDA on H100)

PUBLISHED = {"1x8192x64": 1.293, "1300+547+2048+963+271+3063:64": 1.110, "8x1024x64": 0.933, "1x8192x96": 1.514,
             "8x1024x96": 1.383, "1x8192x16": 0.938, "1x8192x24": 1.003, "1x2048x12": 0.279}  # fmt: skip


@pytest.mark.parametrize("text", PUBLISHED)
def test_estimates_are_within_a_factor_of_two_of_published_figures(text):
    p = predicted(KDA, space_of(KDA).default, shape(text))
    assert 0.5 < p.ms / PUBLISHED[text] < 2 and p.bound_ms < PUBLISHED[text]


def test_the_chain_of_a_16_token_chunk_is_near_the_published_1200_ns():
    ns = 1e9 * cycles(default_tiles()["scan"], H100, USUAL).latency / H100.clock
    assert 600 < ns < 1800


def test_traffic_is_that_of_the_published_two_kernel_design():
    scan, prepare = default_tiles()["scan"], default_tiles()["prepare"]
    assert scan.bytes_a_token + prepare.bytes_a_token == pytest.approx(3014, rel=0.01)


# -- the pick


def test_the_pick_is_legal_and_the_same_each_time():
    for text in PUBLISHED:
        chosen = pick(KDA, shape(text))
        model._pick.cache_clear()
        assert chosen == pick(KDA, shape(text)) and chosen in space_of(KDA).survey().legal


def test_the_pick_promises_much_more_than_the_default_or_is_it():
    default = space_of(KDA).default
    for text in PUBLISHED:
        chosen, w = pick(KDA, shape(text)), shape(text)
        gain = predicted(KDA, default, w).ms / predicted(KDA, chosen, w).ms
        assert chosen == default or gain > GAIN


def made_up(monkeypatch, ms):
    """Predictions that are what `ms` says of a schedule."""
    model._pick.cache_clear()
    monkeypatch.setattr(model, "predicted", lambda task, s, w: model.Prediction(ms(s), 0, "latency", ()))


def test_ties_go_to_the_simplest(monkeypatch):
    default = space_of(KDA).default
    made_up(monkeypatch, lambda s: 1.0 + 0.01 * (s.stages == 4) if s.stages > 2 else 2.0)
    chosen = pick(KDA, shape("1x8192x64"))
    assert differences(chosen, default) == 1 and chosen.stages in (3, 4)
    model._pick.cache_clear()


@pytest.mark.parametrize("gain, taken", [(1.10, False), (1.20, True)])
def test_a_small_gain_is_none(monkeypatch, gain, taken):
    made_up(monkeypatch, lambda s: 1 / gain if s.stages == 3 else 1.0)
    assert (pick(KDA, shape("1x8192x64")).stages == 3) is taken
    model._pick.cache_clear()


@pytest.mark.parametrize("text", ["1x8192x8", "1x8192x64"])
def test_where_there_are_too_many_to_look_at_a_descent_comes_near_to_the_best(monkeypatch, text):
    fixed = {"scan_skeleton": "scan_specialised", "output": "fused"}
    best = min(predicted(KDA, s, shape(text)).ms for s in space_of(KDA).survey(fixed).legal)
    monkeypatch.setattr(model, "ALL", 0)
    model._pick.cache_clear()
    assert predicted(KDA, pick(KDA, shape(text), **fixed), shape(text)).ms <= GAIN * best
    model._pick.cache_clear()


def test_fields_may_be_given():
    task = dataclasses.replace(KDA, purpose="training")
    assert pick(task, shape("1x8192x64"), keep="all").keep == "all"


def test_where_there_are_no_facts_the_pick_is_the_default():
    for task in (dataclasses.replace(KDA, device="Tesla T4"), Task("kda", "inference", "cpu", "cpu", dtype="float32")):
        assert pick(task, shape("1x8192x64")) == space_of(task).default
