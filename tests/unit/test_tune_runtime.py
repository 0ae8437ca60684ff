"""Ops run by the schedules of tables: kernels that are built just in time, those of a package, and the CPU backend.

The GPU is none: tensors are fake, kernels note what they are given, as in test_op_cuda.py.
"""

import dataclasses
import logging
import uuid

import packages
import pytest
import torch
import tuned_tables
from kdagen.autotune import choose, variants
from kdagen.autotune import select as selection
from kdagen.autotune.select import Key
from kdagen.autotune.sweep import Task, Workload, bucket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from tuned_tables import H100, H200

import kdagen as kg
from kdagen.build import builder
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.runtime import jit, loader, torch_op, tuned
from kdagen.runtime import op as ops
from kdagen.runtime.package import BuiltOp
from kdagen.runtime.signature import recurrence_hash
from kdagen.schedule import CpuSchedule

DIMS, SHAPE = (64, 64), (2, 37, 3)  # bucket 7
MAKE = {"inference": compile_op, "training": compile_training, "decode": compile_decode}
MODELLED = choose.modelled
RECURRENCE = choose.recurrence_of("gla")
KEY = Key(RECURRENCE, "inference", "sm90", DIMS, 1, "bfloat16", "bfloat16", "KV float32", *H100, 7)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H100, an empty cache, no model and a working directory of its own."""
    monkeypatch.setattr(ops, "_capability", lambda device: "9.0")
    monkeypatch.setattr(tuned, "gpu", lambda device: H100)
    monkeypatch.setattr(torch_op, "identity", lambda *_: uuid.uuid4().hex)
    monkeypatch.setattr(choose, "modelled", lambda *_: None)
    monkeypatch.setattr(jit, "_has_nvcc", lambda: True)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDAGEN_BUILD_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    selection.tables.cache_clear()
    yield tmp_path
    selection.tables.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The plans of the kernels that were launched, one a call."""
    plans = []
    monkeypatch.setattr(loader.LoadedOp, "functions", lambda self: {k["name"]: None for k in self.plan["kernels"]})
    monkeypatch.setattr(loader.LoadedOp, "_run", lambda self, function, arguments: plans.append(self.plan))
    return plans


@pytest.fixture
def built(monkeypatch, machine):
    """The schedules that were compiled just in time."""
    found = []

    def build_cached(source):
        found.append(source.schedule)
        return packages.write(machine / f"made{len(found)}", source, machine)

    monkeypatch.setattr(builder, "build_cached", build_cached)
    return found


def tables(*entries) -> None:
    tuned_tables.write(selection.user_tables(), entries)


def entry(schedule: dict, purpose="inference", **changed):
    """A whole schedule for gla that differs from the default in these fields."""
    return tuned_tables.entry(source(purpose, schedule).schedule, KEY, purpose=purpose, **changed)


def source(purpose="inference", schedule=None, **more):
    return MAKE[purpose](kg.load("gla"), DIMS, arch="sm90", schedule=schedule, **more)


def fresh(**more):
    return kg.compile("gla", head_dim=DIMS, **more)


def fake(shape=SHAPE) -> list:
    drawn = kg.zoo.sample(canonical(kg.load("gla")), (*shape, *DIMS))
    return [torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for x in drawn.values()]


def call(op, shape=SHAPE, **options) -> None:
    with FakeTensorMode():
        op._cuda(*fake(shape), **options)


def said(caplog) -> list[str]:
    return [text for text in caplog.messages if " on NVIDIA" in text]


# -- just in time


def test_a_call_runs_by_the_schedule_of_its_bucket(launched, built, caplog):
    tables(entry({"chunk_size": 32}), entry({"stages": 1}, bucket=12))
    op = fresh()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        for shape in (SHAPE, SHAPE, (1, 2000, 3), (1, 64, 3)):
            call(op, shape)
    assert [(p["chunk_size"], p["schedule"]["stages"]) for p in launched[::3]] == [(32, 2), (32, 2), (16, 1), (32, 2)]
    assert len(built) == 2
    assert said(caplog) == [
        "gla inference on NVIDIA H100 80GB HBM3: exact: as tuned for NVIDIA H100 80GB HBM3, bucket 7",
        "gla inference on NVIDIA H100 80GB HBM3: exact: as tuned for NVIDIA H100 80GB HBM3, bucket 12",
    ]
    text = " ".join(op.explain().split())
    assert "schedules inference, NVIDIA H100 80GB HBM3, bucket 7: exact: as tuned for NVIDIA H100" in text


def test_the_nearest_gpu_is_better_than_none(launched, built, caplog):
    tables(entry({"chunk_size": 32}, device=H200, bucket=9))
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(fresh())
    assert launched[0]["chunk_size"] == 32
    (line,) = said(caplog)
    assert line == "gla inference on NVIDIA H100 80GB HBM3: nearest GPU: as tuned for NVIDIA H200, bucket 9"


def test_without_tables_and_model_the_default_runs(launched, built, caplog):
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(fresh())
    assert built == [source().schedule] and launched[0]["schedule"] == source().schedule
    (line,) = said(caplog)
    assert line.endswith(": default: no table for NVIDIA H100 80GB HBM3 with 132 processors")


@pytest.mark.parametrize("given", [{}, {"stages": 3}])
def test_a_schedule_that_is_given_is_used_for_all_shapes(launched, built, given, caplog):
    tables(entry({"chunk_size": 32}), entry({"chunk_size": 32}, bucket=12))
    op = fresh(schedule=given)
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(op)
        call(op, (1, 2000, 3))
    assert built == [source(schedule=given).schedule] and said(caplog) == []
    assert (
        "schedules as given in inference" in " ".join(op.explain().split())[-200:]
        or "as given in inference" in op.explain()
    )


def test_kernels_of_ones_own_skeletons_are_not_tuned(machine):
    assert fresh(templates=[machine]).tuned.off == {"inference", "training", "decode"}


def test_another_purpose_stays_tuned(built):
    tables(entry({"chunk_size": 32}), entry({"threads": 64}, "decode"))
    op = fresh(schedule={})
    with FakeTensorMode():
        found = op.call(tuple(fake()), {})
        assert op.fitting(found, "decode").plan["schedule"]["threads"] == 64
        assert op.fitting(found).plan["schedule"] == source().schedule


def test_training_keeps_what_the_user_chose(launched, built):
    tables(entry({"keep": "all", "chunk_size": 16}, "training"), entry({"keep": "inputs"}, "training", bucket=9))
    for keep in ("all", "inputs", "states"):
        with FakeTensorMode():
            fresh(keep=keep).training._cuda(*fake())
    assert [s["keep"] for s in built] == ["all", "inputs", "states"]
    assert built[0]["chunk_size"] == 16 and built[2] == source("training").schedule


def test_forward_backward_and_compiler_agree(launched, built, monkeypatch):
    """The tensors that a forward keeps have the shapes that torch's compiler is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tables(entry({"chunk_size": 16}, "training"), entry({"chunk_size": 32}, "training", bucket=12))
    op = fresh()
    for shape in (SHAPE, (1, 2000, 3)):
        with FakeTensorMode():
            given = fake(shape)
            *_, kept = op.training._cuda(*given)
            *_, planned = op.training._fake(*given)
            assert [tuple(x.shape) for x in kept] == [tuple(x.shape) for x in planned] and kept
            o = torch.empty(given[2].shape, dtype=torch.bfloat16, device="cuda")
            op.training._cuda_backward(*given, None, None, kept, o, None)
    assert [s["chunk_size"] for s in built] == [16, 32]


def test_torchs_compiler_may_ask_for_any_number_of_tokens(launched, built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tables(entry({"chunk_size": 16}, "training"), entry({"chunk_size": 32}, "training", bucket=12))
    op, sizes = fresh(), []
    for tokens in (2000, 37):
        real, dynamic = torch.empty(tokens), StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            t = mode.from_tensor(real, symbolic_context=dynamic).shape[0]
            assert type(t) is torch.SymInt
            *_, kept = op.training._fake(
                *(torch.empty(1, t, *x.shape[2:], dtype=x.dtype, device="cuda") for x in fake())
            )
            sizes.append(int(kept[0].shape[1]))
    assert sizes == [2000 // 32 + 1, 37 // 16 + 1]


def test_states_are_returned_after_whole_chunks_whatever_was_tuned(launched, built):
    tables(entry({"chunk_size": 32}))
    op = fresh()
    call(op, states_every=16)
    call(op, states_every=32)
    assert [s["chunk_size"] for s in built] == [16, 32]


def test_an_entry_that_does_not_compile_any_more_is_passed_over(launched, built, caplog):
    selection.warn.cache_clear()
    old = {**source().schedule, "warps": 4}
    wrong = {**source().schedule, "v_tile": 48}
    good = entry({"chunk_size": 32}, bucket=20)
    tables(tuned_tables.entry(old, KEY), tuned_tables.entry(wrong, KEY, bucket=8), good)
    call(fresh())
    call(fresh())
    assert built[0] == good.schedule and launched[0]["chunk_size"] == 32
    warned = [text for text in caplog.messages if "passed over" in text]
    assert len(warned) == 2 and all("tune again with `kdagen tune`" in text for text in warned)
    assert "unknown schedule field warps" in warned[0] and "48" in warned[1]


def test_without_nvcc_kernels_that_are_built_are_used(machine, launched, built, monkeypatch, caplog):
    monkeypatch.setattr(jit, "_has_nvcc", lambda: False)
    tables(entry({"chunk_size": 32}))
    packages.write(machine / "kdagen_ops", source(), machine)
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(fresh())
    assert built == [] and launched[0]["schedule"] == source().schedule
    assert said(caplog)[0].endswith(f"default: built already, unlike those as tuned for {H100[0]}, bucket 7")


def test_kernels_of_a_tuned_schedule_are_found_in_the_build_folder(machine, launched, built):
    tuned_source = source(schedule={"chunk_size": 32})
    tables(entry({"chunk_size": 32}))
    packages.write(machine / "kdagen_ops", source(), machine)
    place = packages.write(machine / "kdagen_ops", dataclasses.replace(tuned_source, beside=True), machine)
    assert loader.load_op(place).tuned
    call(fresh())
    assert built == [] and launched[0]["chunk_size"] == 32


@pytest.mark.parametrize("default_is_built", [False, True])
def test_the_model_is_asked_where_no_table_speaks(machine, launched, built, monkeypatch, caplog, default_is_built):
    """What it chooses is not compiled where the default kernels are there already."""
    picked = source(schedule={"chunk_size": 32}).schedule
    asked = []

    def modelled(task, key, keep=""):
        asked.append((task.purpose, task.target, key.bucket, keep))
        return tuned_tables.entry(picked, key, device=("H100", 132), bucket=19, facts={"how": "model"})

    monkeypatch.setattr(choose, "modelled", modelled)
    if default_is_built:
        packages.write(machine / "kdagen_ops", source(), machine)
    op = fresh()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(op)
        call(op)
    assert asked == [("inference", "sm90", 7, "")]
    assert [s["chunk_size"] for s in built] == ([] if default_is_built else [32])
    (line,) = said(caplog)
    words = "as chosen for H100, bucket 19"
    assert line.endswith(f"default: built already, unlike those {words}" if default_is_built else f"model: {words}")


def test_a_recurrence_of_the_user_that_equals_one_of_the_zoo_has_its_schedules(launched, built, tmp_path):
    from kdagen.ir.canonical_json import to_json

    @kg.recurrence
    def my_own(S, q: kg.Key, k: kg.Key, v: kg.Value, g: kg.Channel):
        """Another name, other words."""
        S = kg.diag(kg.exp(g)) @ S + kg.outer(k, v)
        return S, S.T @ q

    assert recurrence_hash(to_json(canonical(my_own))) == RECURRENCE
    tables(entry({"chunk_size": 32}))
    call(kg.compile(my_own, head_dim=DIMS))
    assert launched[0]["chunk_size"] == 32


# -- packages


def package(machine, *entries, **more) -> BuiltOp:
    """The op as `kdagen build` leaves it where tables have these entries."""
    tables(*entries)
    default = source(**more)
    for one in variants.variants(default, kg.load("gla"), None, lambda s: source(schedule=s, **more)):
        packages.write(machine / "made", one, machine)
    return BuiltOp(machine / "made" / "gla")


def test_a_package_has_a_variant_for_each_schedule_and_runs_the_chosen_one(machine, launched, caplog):
    op = package(machine, entry({"chunk_size": 32}), entry({"chunk_size": 32}, bucket=9), entry({}, bucket=12))
    assert [(v.plan["chunk_size"], v.tuned, len(v.manifest["tuned"])) for v in op.variants] == [
        (16, False, 1), (32, True, 2),
    ]  # fmt: skip
    loaded = op.load()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        for shape in (SHAPE, (1, 2000, 3), SHAPE):
            call(loaded, shape)
    assert [p["chunk_size"] for p in launched[::3]] == [32, 16, 32]
    assert len(said(caplog)) == 2 and all(": exact: " in line for line in said(caplog))
    assert "tuned inference, sm90, chunk_size 32" in " ".join(op.explain().split())
    assert "bucket 12: exact: as tuned" in " ".join(loaded.explain().split())


def test_it_chooses_alike_where_there_are_no_tables(machine, launched):
    op = package(machine, entry({"chunk_size": 32}), entry({}, bucket=12))
    tables()
    for shape in (SHAPE, (1, 2000, 3)):
        call(op.load(), shape)
    assert [p["chunk_size"] for p in launched[::3]] == [32, 16]


def test_the_op_of_a_package_without_its_tuned_schedules(machine, launched, caplog):
    op = package(machine, entry({"chunk_size": 32})).untuned()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(op.load())
        call(op.with_state().load())
    assert {p["chunk_size"] for p in launched} == {16} and said(caplog) == []


def test_a_schedule_that_was_not_built_means_the_default(machine, launched, caplog):
    op = package(machine)
    tables(entry({"chunk_size": 32}))
    with caplog.at_level(logging.INFO, logger="kdagen"):
        call(op.load())
    assert launched[0]["chunk_size"] == 16
    words = f"kernels as tuned for {H100[0]}, bucket 7 are not in {machine / 'made' / 'gla'}"
    assert said(caplog) == [f"gla inference on {H100[0]}: default: {words}"]


def test_arguments_are_checked_at_each_call(machine, launched):
    op = package(machine, entry({"chunk_size": 32}))
    call(op.load())
    with FakeTensorMode(), pytest.raises(kg.ArgumentError, match="q is float16, expected bfloat16"):
        q, *rest = fake()
        op.fitting({"q": q.half()}, "9.0", want=next(iter(op.choices)))


def test_without_tables_a_build_is_as_it_was(machine):
    default = source()
    (only,) = variants.variants(default, kg.load("gla"), None, lambda s: source(schedule=s))
    assert only is default and builder.manifest_of(default, []).keys() == packages.contents(default).keys()


@pytest.mark.parametrize(
    ("only", "chunks"),
    [(["H100"], [16, 32]), ([H100[0]], [16, 32]), (["H100", "H200"], [16, 32, 64]), ([], [16, 32, 64])],
)
def test_a_build_for_some_gpus_has_the_schedules_of_their_tables(only, chunks):
    tables(entry({"chunk_size": 32}), entry({"chunk_size": 64}, device=H200))
    found = variants.variants(source(), kg.load("gla"), None, lambda s: source(schedule=s), only)
    assert sorted(s.schedule["chunk_size"] for s in found) == chunks


def test_a_build_for_a_gpu_without_a_table_has_those_of_the_nearest(monkeypatch):
    tables(entry({"chunk_size": 32}, device=H200), entry({"stages": 1}, device=("Some GPU", 8)))
    found = variants.variants(source(), kg.load("gla"), None, lambda s: source(schedule=s), ["H100"])
    assert [s.schedule["chunk_size"] for s in found] == [16, 32]


def test_a_build_for_a_gpu_without_any_table_has_what_the_model_chooses(machine, monkeypatch, launched):
    monkeypatch.setattr(choose, "picked", lambda task, at, shape, fixed: source(schedule={"chunk_size": 32}).schedule)
    default, picked = variants.variants(source(), kg.load("gla"), None, lambda s: source(schedule=s), ["H100"])
    assert (default.tuned, picked.schedule["chunk_size"], len(picked.tuned)) == ((), 32, 3)
    for one in (default, picked):
        packages.write(machine / "made", one, machine)
    for device in (H100, H200):
        monkeypatch.setattr(tuned, "gpu", lambda _, device=device: device)
        call(BuiltOp(machine / "made" / "gla").load(), (1, 8192, 64))
    assert [p["chunk_size"] for p in launched[::3]] == [32, 16]


def test_a_later_build_removes_folders_of_schedules_that_are_gone(machine):
    package(machine, entry({"chunk_size": 32}))
    out = machine / "made" / "gla"
    assert len(list(out.glob("sm90-bf16-64x64-t*"))) == 1
    kept = packages.write(machine / "made", source("training"), machine)
    from kdagen.build import folder

    folder.remove_tuned(out / "sm90-bf16-64x64", keep=set())
    assert sorted(p.name for p in out.iterdir()) == ["sm90-bf16-64x64", kept.name]


# -- the model


def test_a_pick_of_the_model_is_remembered(monkeypatch):
    from kdagen.autotune import model

    asked = []

    def pick(task, shape, **fixed):
        asked.append((str(shape), fixed))
        return CpuSchedule()

    monkeypatch.setattr(model, "pick", pick)
    task = Task("gla", "training", "sm90", "H100", DIMS)
    found = [MODELLED(task, tuned_tables.key(KEY, purpose="training", bucket=b), "all") for b in (18, 19, 20)]
    assert found[0] == found[2] and found[0].modelled and found[0].key.bucket == 19
    assert asked == [("1x8192x64", {"keep": "all"})]


def test_the_model_knows_no_other_gpus():
    task = Task("gla", "inference", "sm90", "H100", DIMS)
    assert MODELLED(task, tuned_tables.key(KEY, device=("Some GPU", 3))) is None
    assert MODELLED(task, tuned_tables.key(KEY, target="sm80")) is None


# -- CPU


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(tuned, "this_cpu", lambda: ("A CPU", 2))


def cpu_entry(rows: int, shape: str, purpose="inference", **changed):
    task = Task("gla", purpose, "cpu", "cpu", (16, 24), "float32")
    found = choose.key_of(task, Workload.parse(shape), "A CPU", 2)
    return tuned_tables.entry(CpuSchedule(rows=rows).fields(), found, **changed)


def inputs(shape, dtype=torch.float32) -> dict:
    drawn = kg.zoo.sample(canonical(kg.load("gla")), (*shape, 16, 24))
    return {n: x.to(dtype) for n, x in drawn.items()}


@pytest.fixture
def chunks(monkeypatch):
    """The rows of the schedules that the CPU backend ran by."""
    from kdagen.runtime import cpu

    found, init = [], cpu.Sequences.__init__

    def noting(self, program, tensors, ends=None, schedule=None):
        found.append(schedule.rows)
        init(self, program, tensors, ends, schedule)

    monkeypatch.setattr(cpu.Sequences, "__init__", noting)
    return found


def test_calls_on_the_cpu_run_as_tuned(cpu, chunks, caplog):
    tables(cpu_entry(16, "1x64x2"), cpu_entry(128, "1x4096x2"))
    op = fresh()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        for shape in ((1, 64, 2), (1, 3000, 2), (1, 64, 2)):
            op(**inputs(shape))
        op(**inputs((1, 64, 2), torch.float64))
    assert chunks == [16, 128, 16, 64]
    assert [m for m in caplog.messages if "A CPU" in m] == [
        "gla inference on A CPU: exact: as tuned for A CPU, bucket 7",
        "gla inference on A CPU: nearest bucket: as tuned for bucket 13, not 12",
    ]


def test_a_table_of_another_cpu_is_none(cpu, chunks):
    tables(cpu_entry(16, "1x64x2", device=("Another CPU", 2)))
    op = fresh()
    op(**inputs((1, 64, 2)))
    assert chunks == [64] and op.tuned.cpu_entries == {}


def test_a_given_schedule_turns_selection_off_on_the_cpu_too(cpu, chunks):
    tables(cpu_entry(16, "1x64x2"))
    fresh(schedule={})(**inputs((1, 64, 2)))
    assert chunks == [64]


@pytest.mark.parametrize(("keep", "dynamic"), [("states", False), ("states", True), ("inputs", True)])
def test_training_on_the_cpu_agrees_with_what_torch_compiles(cpu, chunks, keep, dynamic):
    tables(cpu_entry(16, "1x64x2", "training"), cpu_entry(32, "1x512x2", "training"))
    op, untuned = fresh(keep=keep), fresh(keep=keep, schedule={}, training_schedule={})

    def loss(op, *given):
        return op(*given)[0].square().sum()

    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (64, 500, 70):
        given = [x.requires_grad_() for x in inputs((1, tokens, 2)).values()]
        chunks.clear()
        found = torch.autograd.grad(traced(op, *given), given)
        assert set(chunks) == {16 if tokens < 100 else 32}
        for x, y in zip(found, torch.autograd.grad(loss(untuned, *given), given)):
            assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 2), (3, 5, 1)])
def test_the_bucket_of_a_call_is_that_of_its_workload(cpu, shape):
    op = fresh()
    tables(cpu_entry(16, "1x64x2"))
    call = op.call(tuple(inputs(shape).values()), {})
    want = op.tuned._want(call, "inference", "cpu", "A CPU", 2)
    task = Task("gla", "inference", "cpu", "cpu", (16, 24), "float32")
    assert want.key == choose.key_of(task, Workload(shape[0], shape[1], shape[2], shape[2]), "A CPU", 2)


@pytest.mark.parametrize("work", [0, 1, 2, 3, 4, 1023, 1024, 1 << 40])
def test_buckets_by_comparisons_alone(work):
    class Symbolic:  # what torch's compiler gives: no int
        def __ge__(self, other):
            return work >= other

    assert bucket(Symbolic()) == bucket(work) == max(0, work.bit_length() - 1)


def test_this_cpu_has_a_name_and_cores():
    name, cores = tuned.this_cpu()
    assert name and cores >= 1
