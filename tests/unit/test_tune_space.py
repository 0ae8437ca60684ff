"""Spaces: every candidate is legal or refused for a reason that is counted once; the compiler agrees."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kdagen.autotune.defaults import default_schedule
from kdagen.autotune.space import Axis, Constraint, Space, describe, space_of
from kdagen.autotune.space.legal import most_registers
from kdagen.autotune.sweep import SCHEDULES, Task
from kdagen.autotune.tiles import lowering

from kdagen.errors import ScheduleError
from kdagen.pipeline import compile_decode_stages, compile_stages, compile_training_stages
from kdagen.recurrence import load
from kdagen.schedule import Schedule
from kdagen.target import target

COMPILE = {"inference": compile_stages, "training": compile_training_stages, "decode": compile_decode_stages}
KDA = Task("kda", "inference", "sm90", "H100")
TASKS = [
    KDA,
    Task("kda_bounded", "inference", "sm120", "RTX 5090"),
    Task("dplr", "inference", "sm80", "A100"),
    Task("gla", "inference", "sm90", "H100", head_dim=(64, 256)),
    Task("linear_attention", "inference", "sm90", "H100", dtype="float16"),
    Task("gated_deltanet", "training", "sm90", "H100"),
    Task("kda", "training", "sm80", "A100"),
    Task("kda", "decode", "sm90", "H100"),
]


def compiled(task, schedule):
    return COMPILE[task.purpose](load(task.op), task.head_dim, task.dtype, task.target, schedule, task.gate_dtype)


# -- any space

FIELDS = ("chunk_size", "v_tile", "stages")
VALUES = {f: tuple(range(4)) for f in FIELDS}


@st.composite
def predicates(draw):
    """Constraints over some fields, each of which refuses some of the values."""
    found = []
    for i in range(draw(st.integers(0, 4))):
        fields = tuple(draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True)))
        refused = draw(st.sets(st.tuples(*[st.integers(0, 3)] * len(fields)), max_size=20))
        found.append((f"c{i}", fields, refused))
    return found


@given(predicates())
@settings(max_examples=60, deadline=None)
def test_each_candidate_is_counted_under_the_first_constraint_that_refuses_it(drawn):
    def constraint(name, fields, refused):
        def refusal(schedule, task, canonical):
            return name if tuple(getattr(schedule, f) for f in fields) in refused else None

        return Constraint(name, fields, refusal)

    constraints = tuple(constraint(*d) for d in drawn)
    space = Space(KDA, tuple(Axis(f, v) for f, v in VALUES.items()), constraints, Schedule().replace)
    removed, legal = dict.fromkeys((name for name, _, _ in drawn), 0), []
    for values in itertools.product(*VALUES.values()):
        candidate = dict(zip(FIELDS, values))
        first = next((n for n, fields, no in drawn if tuple(candidate[f] for f in fields) in no), None)
        if first is None:
            legal.append(Schedule(**candidate))
        else:
            removed[first] += 1
    survey = space.survey()
    assert (survey.size, survey.removed, list(survey.legal)) == (64, removed, legal)
    assert sum(r.candidates for r in survey.rejected) == sum(removed.values())
    assert space.alone() == {name: len(no) * 4 ** (3 - len(fields)) for name, fields, no in drawn}


def test_axes_may_be_narrowed():
    survey = space_of(KDA).survey({"chunk_size": 16, "stages": [2, 3]})
    assert {(s.chunk_size, s.stages) for s in survey.legal} == {(16, 2), (16, 3)}
    assert survey.size == space_of(KDA).survey().size // 3 // 2


# -- kdagen's


@pytest.mark.parametrize("purpose", SCHEDULES)
def test_no_field_of_a_schedule_is_forgotten(purpose):
    fields = {f.name for f in dataclasses.fields(SCHEDULES[purpose]) if not f.name.endswith("skeleton")}
    fixed = {"output"} if purpose == "training" else set()  # its scan writes the output
    named = {a.field for a in space_of(Task("kda", purpose, "sm90", "H100")).axes}
    assert named - {"scan_skeleton"} == fields - fixed - ({"split"} if purpose == "training" else set())


def test_hundreds_of_schedules_of_kda_are_legal_on_hopper():
    survey = space_of(KDA).survey()
    assert 200 <= len(survey.legal) < survey.size / 5
    assert {s.chunk_size for s in survey.legal} == {16, 32, 64}
    assert {s.output for s in survey.legal} == {"fused", "split"}


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_default_is_legal(task):
    space = space_of(task)
    assert space.default in space.survey().legal


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_what_is_legal_compiles_and_what_is_refused_says_why(task):
    survey = space_of(task).survey()
    for schedule in random.Random(1).sample(survey.legal, min(4, len(survey.legal))):
        assert compiled(task, schedule).kernels
    for refused in survey.rejected:
        assert refused.reason and refused.candidates > 0
        assert set(refused.fields) <= {a.field for a in survey.axes}


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_compilers_own_refusals_are_its_own_words(task):
    """Those that no constraint of the tuner's explains."""
    own = ("rows of warps", "warp groups", "registers", "shared memory", "reverse tile")
    space = space_of(task)
    for refused in space.survey().rejected:
        if not refused.constraint.startswith(own):
            with pytest.raises(ScheduleError) as said:
                compiled(task, space.complete(**refused.fields))
            assert str(said.value) == refused.reason


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_kernels_that_candidates_share_are_those_that_the_compiler_makes(task):
    low, legal = lowering(task), space_of(task).survey().legal
    for schedule in random.Random(2).sample(legal, min(5, len(legal))):
        whole = low._lower(schedule)
        for name, tiles in low.passes(schedule).items():
            bare = [dataclasses.replace(t.kernel, doc=()) for t in tiles]
            assert bare == [dataclasses.replace(k, doc=()) for k in whole[name]]


def test_memory_and_registers_of_what_is_legal_fit():
    for task in TASKS[:4]:
        for schedule in random.Random(3).sample(space_of(task).survey().legal, 5):
            for tiles in lowering(task).passes(schedule).values():
                for tile in tiles:
                    assert tile.shared_bytes <= target(task.target).shared_bytes
                    assert tile.registers <= most_registers(tile)


def test_a_tile_of_128_rows_does_not_fit_into_128_threads():
    """They spill in all that was compiled so."""
    wide = space_of(KDA).survey({"v_tile": 128, "scan_threads": 128, "scan_skeleton": "scan_specialised"}).legal
    assert {s.chunk_size for s in wide} <= {16}


def test_shared_memory_is_at_most_what_the_tile_ir_counts():
    for tiles in lowering(KDA).passes(space_of(KDA).default).values():
        assert all(t.shared_bytes <= t.kernel.shared_bytes for t in tiles)


def test_a_scalar_gate_has_one_form_of_decay_and_a_bounded_one_two():
    forms = {op: {s.decay.value for s in space_of(Task(op, "inference", "sm90", "H100")).survey().legal}
             for op in ("kda", "kda_bounded", "gated_deltanet", "linear_attention")}  # fmt: skip
    assert forms == {
        "kda": {"tree"},
        "kda_bounded": {"tree", "factored"},
        "gated_deltanet": {"scalar"},
        "linear_attention": {"none"},
    }


def test_the_default_of_some_fields_is_that_of_the_compiler():
    low = lowering(KDA)
    args = low.canonical, low.dims, "bfloat16", low.target
    assert low.complete(chunk_size=32) == default_schedule(*args, chunk_size=32)
    assert isinstance(low.complete(), Schedule)


def test_describe_shows_axes_constraints_and_what_the_model_keeps():
    text = describe(Task("kda", "inference", "sm120", "RTX 5090"), {"stages": [1, 2], "chunk_size": [16, 32]})
    for part in ("[16]  32", "rows of warps", "scan_specialised' needs wgmma", "of them legal", "the model keeps"):
        assert part in text, text
    assert "scan_skeleton    scan_specialised  [scan_pipelined]" in text
