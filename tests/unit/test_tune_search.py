"""The search, on landscapes that are made up: it ends at what no neighbour beats, and has no memory but the log."""

import itertools
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kdagen.autotune import gpus
from kdagen.autotune.choose import key_of
from kdagen.autotune.folder import Folder
from kdagen.autotune.search import FEW, Field, chosen, todo, winners
from kdagen.autotune.select import Entry
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Candidate, Study, Sweep, Task, Workload

KDA = Task("kda", "inference", "sm90", "H100")
W = Workload.parse("1x8192x64")
STUDY = Study(KDA, (W,))
SEARCH = Sweep((STUDY,), exhaustive=0)
AXES = {"chunk_size": (16, 32, 64), "v_tile": (64, 128), "stages": (1, 2, 3, 4), "scan_threads": (128, 256),
        "output": ("fused", "split"), "prepare_threads": (64, 128)}  # fmt: skip


def none():
    return ()


def line(rung, candidate, verdict="kept", **fields):
    return {"task": KDA.name, "candidate": candidate.id, "rung": rung, "verdict": verdict, **fields}


@cache
def product():
    """A full product of axes, the default in it; which of it compiles is no matter here."""
    default = space_of(KDA).default
    return tuple(
        Candidate(KDA, default.replace(**dict(zip(AXES, values)))) for values in itertools.product(*AXES.values())
    )


def model_lines(candidates, predicted=lambda c: 1.0, audit=()):
    default = space_of(KDA).default
    return [
        line("model", c, schedule=c.schedule.fields(), predicted_ms={str(W): predicted(c)})
        | ({"default": True} if c.schedule == default else {})
        | ({"audit": True} if c in audit else {})
        for c in candidates
    ]


def run(lines, cost, sweep=SEARCH, study=STUDY, batch=7, dead=lambda c: False, tables=none):
    """What is found by trying a few at a time: the lines, and candidates in the order in which they were tried."""
    lines = list(lines)
    there = {item["candidate"] for item in lines if item["rung"] == "screen"}
    tried = [c for c in product() if c.id in there]
    while new := [c for c in chosen(sweep, study, lines, tables) if c not in tried][:batch]:
        for candidate in new:
            tried.append(candidate)
            if dead(candidate):
                lines.append(line("screen", candidate, "failed", reason="crash", workload=str(W)))
            else:
                lines += [
                    line("screen", candidate, ms=cost(candidate, str(w)), workload=str(w)) for w in study.workloads
                ]
    return lines, tried


def additive(seed):
    """A landscape in which each field has its say by itself."""
    rng = random.Random(seed)
    says = {(axis, value): rng.uniform(0.1, 1) for axis, values in AXES.items() for value in values}
    return lambda c, w: sum(says[axis, getattr(c.schedule, axis)] for axis in AXES)


def rugged(seed):
    """One in which every candidate is by itself."""
    return lambda c, w: random.Random(f"{seed} {c.id} {w}").uniform(1, 2)


# -- few candidates


def test_few_candidates_are_all_tried_the_default_first_then_as_the_model_has_them():
    candidates = product()[:30]
    default = Candidate(KDA, space_of(KDA).default)
    candidates = [*(c for c in candidates if c != default), default]
    rank = {c.id: i % 7 for i, c in enumerate(candidates)}
    found = chosen(Sweep((STUDY,)), STUDY, model_lines(candidates, lambda c: 1 + rank[c.id]), none)
    assert found[0] == default and {c.id for c in found} == set(rank)
    assert [rank[c.id] for c in found[1:]] == sorted(rank[c.id] for c in found[1:])


def test_audits_do_not_count_as_candidates_but_are_tried():
    candidates = product()[:12]
    lines = model_lines(candidates, audit=candidates[:2])
    assert len(chosen(Sweep((STUDY,), exhaustive=10), STUDY, lines, none)) == 12
    assert len(chosen(Sweep((STUDY,), exhaustive=9), STUDY, lines, lambda: ())) <= 12


def test_what_the_model_rejected_is_left_out():
    candidates = product()[:4]
    lines = model_lines(candidates) + [line("model", product()[5], "rejected", reason="slow")]
    assert {c.id for c in chosen(Sweep((STUDY,)), STUDY, lines, none)} == {c.id for c in candidates}


def test_without_predictions_the_order_is_the_plans():
    lines = [line("model", c, schedule=c.schedule.fields(), predicted_ms={}) for c in product()[:9]]
    assert chosen(Sweep((STUDY,)), STUDY, lines, none) == list(product()[:9])


def test_nothing_planned_is_nothing_to_do(tmp_path):
    folder = Folder.create(tmp_path / "sweep", SEARCH)
    assert todo(folder, STUDY, []) == []


# -- the search


@pytest.mark.parametrize("seed", range(6))
def test_the_best_is_found_where_each_field_has_its_say_by_itself(seed):
    cost = additive(seed)
    _, tried = run(model_lines(product()), cost)
    best = min(product(), key=lambda c: cost(c, str(W)))
    assert best in tried and len(tried) < len(product()) / 2


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 60))
@settings(max_examples=8, deadline=None)
def test_it_ends_where_no_neighbour_is_better(seed, batch):
    cost = rugged(seed)
    lines, tried = run(model_lines(product()), cost, batch=batch)
    field = Field.of(STUDY, lines)
    best = field.best(str(W))
    assert best == min(tried, key=lambda c: cost(c, str(W))).id
    assert set(field.neighbours(best, 0)) <= {c.id for c in tried}


@pytest.mark.parametrize("seed", range(3))
def test_of_legal_candidates_too_though_fields_depend_on_each_other(seed):
    """A tile of 64 has 128 threads and one of 128 has 256: no single field leads from one to the other."""
    candidates = [Candidate(KDA, s) for s in space_of(KDA).survey().legal]
    cost = rugged(seed)
    lines, tried = run(model_lines(candidates), cost)
    assert {c.schedule.v_tile for c in tried} == {64, 128}
    field = Field.of(STUDY, lines)
    assert set(field.neighbours(field.best(str(W)), 0)) <= {c.id for c in tried}
    assert len(tried) < len(candidates)


def test_neighbours_take_every_value_of_every_axis():
    field = Field.of(STUDY, model_lines(product()))
    centre = field.default[0]
    fields = [field.fields(i) for i in field.neighbours(centre, 0)]
    for axis, values in AXES.items():
        assert {f[axis] for f in fields} == set(values)
    own = field.fields(centre)
    assert all(sum(f[k] != own[k] for k in f) == 1 for f in fields)


def test_axes_come_in_an_order_of_chance_that_the_seed_decides():
    field = Field.of(STUDY, model_lines(product()))
    orders = {seed: tuple(field.neighbours(field.default[0], seed)) for seed in range(8)}
    assert len(set(orders.values())) > 1 and len({frozenset(o) for o in orders.values()}) == 1
    assert orders[3] == tuple(field.neighbours(field.default[0], 3))


def test_each_workload_has_its_own_best():
    study = Study(KDA, (W, Workload.parse("1x8192x8")))
    landscapes = {str(w): additive(i) for i, w in enumerate(study.workloads)}
    cost = lambda c, w: landscapes[w](c, w)  # noqa: E731
    _, tried = run(model_lines(product()), cost, Sweep((study,), exhaustive=0), study)
    for w in landscapes:
        assert min(product(), key=lambda c: cost(c, w)) in tried


def test_seeds_come_first_the_default_then_the_models_best():
    ids = sorted(c.id for c in product())
    found = chosen(SEARCH, STUDY, model_lines(product(), lambda c: 1 + ids.index(c.id)), none)
    assert found[0].schedule == space_of(KDA).default
    assert {c.id for c in found[: FEW + 1]} >= set(ids[:FEW])


def test_what_died_or_was_stopped_is_no_place_to_go_on_from():
    cost = additive(1)
    dead = lambda c: c.schedule.stages == 4 or c.schedule.chunk_size == 64  # noqa: E731
    lines, tried = run(model_lines(product()), cost, dead=dead)
    alive = [c for c in product() if not dead(c)]
    assert min(alive, key=lambda c: cost(c, str(W))) in tried
    assert Field.of(STUDY, lines).best(str(W)) == min(alive, key=lambda c: cost(c, str(W))).id


def test_times_over_the_defaults_count_where_devices_differ():
    a, b = product()[:2]
    lines = model_lines([a, b]) + [
        line("screen", a, ms=1.0, relative=0.9, workload=str(W)),
        line("screen", b, ms=2.0, relative=0.8, workload=str(W)),
    ]
    assert Field.of(STUDY, lines).best(str(W)) == b.id


def test_audits_come_last():
    audit = product()[100:104]
    slow = {c.id for c in audit}
    found = chosen(SEARCH, STUDY, model_lines(product(), lambda c: 9 if c.id in slow else 1, audit), none)
    assert {c.id for c in audit} <= {c.id for c in found} and {c.id for c in found[-2:]} <= {c.id for c in audit}


# -- no memory


@given(cut=st.floats(0, 1), seed=st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_a_search_that_was_cut_off_goes_on(cut, seed):
    cost = rugged(seed)
    whole, _ = run(model_lines(product()), cost)
    planned = len(product())
    there = whole[: planned + int(cut * (len(whole) - planned))]
    again, tried = run(there, cost)
    field, before = Field.of(STUDY, again), Field.of(STUDY, there).measured.get(str(W), {})
    assert field.measured[str(W)].items() >= before.items() and len(again) == planned + len(tried)
    best = field.best(str(W))
    assert set(field.neighbours(best, 0)) <= {c.id for c in tried}
    assert field.measured[str(W)][best] == min(field.measured[str(W)].values())


def test_the_same_lines_say_the_same_whatever_their_order():
    lines, _ = run(model_lines(product()), additive(2))
    found = chosen(SEARCH, STUDY, lines, none)
    shuffled = random.Random(0).sample(lines, len(lines))
    assert chosen(SEARCH, STUDY, lines, none) == found
    assert {c.id for c in chosen(SEARCH, STUDY, shuffled, none)} == {c.id for c in found}


def test_other_studies_lines_are_no_matter():
    lines = model_lines(product())
    foreign = [{**item, "task": "another", "candidate": "x"} for item in lines]
    assert chosen(SEARCH, STUDY, lines + foreign, none) == chosen(SEARCH, STUDY, lines, none)


# -- tables


def entry(device, processors=132, bucket=W.bucket, task=KDA, **schedule):
    from dataclasses import replace

    gpu = gpus.find(device)
    key = replace(key_of(task, W, device, processors), bucket=bucket, target=gpu.target if gpu else task.target)
    return Entry(key, {**space_of(KDA).default.fields(), **schedule}, "device cold")


H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"


def test_winners_are_of_this_gpu_and_of_the_nearest():
    entries = [
        entry(A100, 108, stages=1),
        entry(H200, stages=3),
        entry(H100, bucket=3, stages=4),
        entry(H100, stages=2),
    ]
    found = winners(KDA, W, entries)
    assert [(e.key.device, e.schedule["stages"]) for e in found] == [(H100, 2), (H200, 3)]
    assert winners(KDA, W, entries[:1])[0].key.device == A100
    assert winners(KDA, W, [entry("Tesla T4")]) == [] == winners(KDA, W, [])


def test_what_a_model_chose_or_other_head_dims_won_is_no_seed():
    modelled = entry(H100)
    modelled.facts["how"] = "model"
    assert winners(KDA, W, [modelled]) == []
    assert winners(KDA, W, [entry(H100, task=Task("kda", "inference", "sm90", "H100", head_dim=(64, 64)))]) == []


def test_winners_of_tables_are_tried_at_once():
    far = {"chunk_size": 64, "stages": 4, "output": "split", "prepare_threads": 128}
    found = chosen(SEARCH, STUDY, model_lines(product()), lambda: (entry(H100, **far),))
    assert {k: getattr(found[1].schedule, k) for k in far} == far


def test_a_table_of_another_version_is_passed_over():
    odd = entry(H100, of_another_day=1)
    assert chosen(SEARCH, STUDY, model_lines(product()), lambda: (odd,)) == chosen(
        SEARCH, STUDY, model_lines(product()), none
    )
