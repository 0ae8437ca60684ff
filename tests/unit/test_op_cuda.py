"""The op's CUDA implementation, up to the launch: tensors are fake ones on CUDA, kernels note what they are given.

What a launch does is tested in test_build_loader.py, and on a mock driver in tests/compile/test_op_launch.py.
"""

import logging
import threading
import uuid
from types import SimpleNamespace

import packages
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdagen as kg
from kdagen.build import builder
from kdagen.derive.canonical import canonical
from kdagen.errors import LaunchError
from kdagen.pipeline import compile_op
from kdagen.runtime import loader, torch_op
from kdagen.runtime import op as ops
from kdagen.runtime.jit import JustInTime
from kdagen.runtime.options import Options, options

DIMS = (64, 64)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H100, an empty cache and a working directory of its own."""
    monkeypatch.setattr(ops, "_capability", lambda device: "9.0")
    monkeypatch.setattr(torch_op, "identity", lambda *_: uuid.uuid4().hex)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDAGEN_BUILD_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launches(monkeypatch):
    """What each launch was given: (folder, tensors). Results are as the plan says."""
    calls = []

    def run(self, function, arguments):
        calls.append((self.folder, arguments))

    monkeypatch.setattr(loader.LoadedOp, "functions", lambda self: {k["name"]: None for k in self.plan["kernels"]})
    monkeypatch.setattr(loader.LoadedOp, "_run", run)
    return calls


def source(arch="sm90", **more):
    return compile_op(kg.load("gla"), DIMS, arch=arch, **more)


def fresh(**more):
    """An op that nobody has called yet: here each has an identity of its own."""
    return kg.compile("gla", head_dim=DIMS, **more)


def fake(shape=(2, 37, 3), dtype=torch.bfloat16) -> list:
    """q, k, v and g on a GPU that is not there."""
    drawn = kg.zoo.sample(canonical(kg.load("gla")), (*shape, *DIMS))
    return [torch.empty(x.shape, dtype=dtype, device="cuda") for x in drawn.values()]


def call(op, given, **options):
    return op._cuda(*given, **options)


def shares(x, y) -> bool:
    """Whether a kernel was given the memory of an argument."""
    return isinstance(x, torch.Tensor) and x.untyped_storage() is y.untyped_storage()


def test_kernels_of_the_build_folder_are_launched(machine, launches, caplog):
    place = packages.write(machine / "kdagen_ops", source(), machine)
    op = fresh()
    with caplog.at_level(logging.INFO, logger="kdagen"), FakeTensorMode():
        given = fake()
        state = torch.empty(2, 3, *DIMS, device="cuda")
        o, final, states = call(op, given, initial_state=state, output_final_state=True)
        call(op, given)
    assert (tuple(o.shape), o.dtype, o.device.type) == ((2, 37, 3, 64), torch.bfloat16, "cuda")
    assert (tuple(final.shape), final.dtype) == ((2, 3, 64, 64), torch.float32)
    assert states.numel() == 0
    assert len(launches) == 6 and {folder.resolve() for folder, _ in launches} == {place}
    assert any(t is state for t in launches[2][1]) and any(shares(t, given[2]) for t in launches[2][1])
    relative = place.relative_to(machine)
    assert caplog.messages == [f"gla: bfloat16 tensors on cuda:0: kernels in {relative}"]
    assert op.last == caplog.messages[0].removeprefix("gla: ")


def test_a_state_that_is_not_asked_for_is_empty(machine, launches):
    packages.write(machine / "kdagen_ops", source(), machine)
    with FakeTensorMode():
        _, final, _ = call(fresh(), fake())
    assert tuple(final.shape) == (0,)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 37, 3)])
def test_without_tokens_or_sequences_nothing_is_launched(machine, launches, shape):
    packages.write(machine / "kdagen_ops", source(), machine)
    with FakeTensorMode():
        o, final, _ = call(fresh(), fake(shape), output_final_state=True)
    assert tuple(o.shape) == (*shape, 64) and tuple(final.shape) == (shape[0], 3, *DIMS)
    assert launches == []


def test_tensors_that_are_not_contiguous_are_copied_and_that_is_logged_once(machine, launches, caplog):
    packages.write(machine / "kdagen_ops", source(), machine)
    op = fresh()
    q, k, v, g = (torch.zeros(2, 37, 3, 64, dtype=torch.bfloat16) for _ in range(4))
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    with caplog.at_level(logging.DEBUG, logger="kdagen"):
        call(op, [q, k, v, g])
        call(op, [q, k, v, g])
    assert all(t.is_contiguous() for _, tensors in launches for t in tensors if isinstance(t, torch.Tensor))
    assert caplog.messages.count("gla: q is not contiguous and is copied at each call") == 1


def test_a_failure_on_the_gpu_never_falls_back(machine, launches, monkeypatch):
    packages.write(machine / "kdagen_ops", source(), machine)

    def fail(self, function, arguments):
        raise LaunchError("cuLaunchKernel failed")

    monkeypatch.setattr(loader.LoadedOp, "_run", fail)
    op = fresh()
    with FakeTensorMode(), pytest.raises(LaunchError):
        call(op, fake())
    assert op.last is None


def test_the_places_in_which_kernels_are_found(machine, monkeypatch):
    """The folder that was named, else KDAGEN_BUILD_DIR, else kdagen_ops; and after each of them the cache."""
    gpu = SimpleNamespace(name="sm90")
    find = lambda **more: fresh(**more).kernels.find(gpu)  # noqa: E731
    assert find() is None
    packages.write(machine / "cached", source(), machine)
    cached = loader.cached_op_folder(packages.contents(source())["digest"])
    cached.parent.mkdir(parents=True)
    (machine / "cached" / "gla" / "sm90-bf16-64x64").rename(cached)
    assert find() == find(build_dir="nowhere") == cached
    default = packages.write(machine / "kdagen_ops", source(), machine)
    assert find().resolve() == default
    named = packages.write(machine / "named", source(), machine)
    monkeypatch.setenv("KDAGEN_BUILD_DIR", str(named.parents[1]))
    assert find() == named
    assert find(build_dir=machine / "kdagen_ops") == default


def test_kernels_of_another_schedule_are_not_taken(machine):
    packages.write(machine / "kdagen_ops", source(schedule={"chunk_size": 32}), machine)
    assert fresh().kernels.find(SimpleNamespace(name="sm90")) is None
    assert fresh(schedule={"chunk_size": 32}).kernels.find(SimpleNamespace(name="sm90"))


def test_missing_kernels_are_built_just_in_time_once(machine, launches, monkeypatch, caplog):
    built = []

    def build_cached(op_source):
        built.append(op_source)
        return packages.write(machine / "made", op_source, machine)

    monkeypatch.setattr(builder, "build_cached", build_cached)
    op = fresh()
    with caplog.at_level(logging.INFO, logger="kdagen"), FakeTensorMode():
        call(op, fake())
        call(op, fake())
    (made,) = built
    assert made == source()
    before, after, ran = caplog.messages
    assert before == (
        "gla for sm90-bf16-64x64: not built yet (kdagen_ops/gla holds nothing): compiling now. "
        "Ahead of time: kdagen build --arch sm90 --op gla --out DIR --head-dim 64,64"
    )
    assert after.startswith("gla for sm90-bf16-64x64: compiled in ") and after.endswith("made/gla/sm90-bf16-64x64")
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO", "INFO"]


def test_threads_that_meet_at_the_first_call_build_once(machine, monkeypatch):
    built, barrier, kernels = [], threading.Barrier(4), fresh().kernels

    def build_cached(op_source):
        built.append(op_source)
        return packages.write(machine / "made", op_source, machine)

    def first_call(found):
        barrier.wait()
        found.append(kernels.fitting({}, "9.0"))

    monkeypatch.setattr(builder, "build_cached", build_cached)
    found = []
    threads = [threading.Thread(target=first_call, args=(found,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(found) == 4 and len(set(map(id, found))) == 1


@pytest.mark.parametrize(("capability", "arch"), [("8.0", "sm80"), ("8.9", "sm89"), ("9.0", "sm90"), ("12.0", "sm120")])
def test_the_arch_is_that_of_the_gpu(capability, arch):
    assert JustInTime(kg.load("gla"), Options(), "gla").target(capability).name == arch


def test_the_command_repeats_the_options(tmp_path):
    chosen = options((64, 128), torch.float16, None, {"decay": "tree", "stages": 1}, "float32", [tmp_path], None)
    command = JustInTime(kg.load("gla"), chosen, "my file.py:gla").command(SimpleNamespace(name="sm90"))
    assert command == (
        "kdagen build --arch sm90 --op 'my file.py:gla' --out DIR --head-dim 64,128 --dtype float16 "
        f"--gate-dtype float32 --schedule decay=tree --schedule stages=1 --templates {tmp_path}"
    )


def test_explain_lists_kernels_that_are_found(machine):
    place = packages.write(machine / "kdagen_ops", source(), machine)
    text = fresh().explain()
    assert f"found in    {place.relative_to(machine)} (build folder)" in text
    line = "gla_scan: 256 threads, 96 registers, no spills, 4.0 KiB of shared memory"
    assert line in text or line.replace("256", "128") in text
