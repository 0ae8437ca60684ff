"""Launching from a manifest: shapes from the plan, kernels in order, the variant that fits. The kernels are Python."""

import dataclasses
import platform
import threading

import pytest
import torch
import toy
import toy_training

from kdagen.errors import ArgumentError
from kdagen.runtime import loader, manifest
from kdagen.runtime.loader import LoadedOp
from kdagen.runtime.package import BuiltOp

RUNS_ON = {"sm90": ["9.0"], "sm80": ["8.0"]}


def write_variant(folder, source):
    """A folder as a build leaves it, but for its libraries."""
    plan = source.plan()
    place = folder / source.name / manifest.variant(plan)
    place.mkdir(parents=True)
    kernels = [{"name": k.name, "library": f"{k.name}.so"} for k in source.kernels]
    target = {"name": source.target, "runs_on": RUNS_ON[source.target]}
    manifest.write(
        place,
        {
            "name": source.name,
            "host": platform.machine(),
            "digest": manifest.digest(source),
            "target": target,
            "plan": plan,
            "kernels": kernels,
        },
    )
    return place


@pytest.fixture
def op(tmp_path, monkeypatch):
    """The toy op whose kernels note what they are given."""
    return noting(tmp_path, monkeypatch, toy.toy())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The same of the toy op for training."""
    return noting(tmp_path, monkeypatch, toy_training.toy())


def noting(tmp_path, monkeypatch, source) -> LoadedOp:
    loaded = loader.load_op(write_variant(tmp_path, source))
    loaded.calls = []
    functions = {
        k["name"]: lambda *tensors, name=k["name"]: loaded.calls.append((name, tensors)) for k in loaded.plan["kernels"]
    }
    monkeypatch.setattr(loaded, "functions", lambda: functions)
    return loaded


def tensors(b=2, t=37, h=3, **more) -> dict:
    return {"x": torch.zeros(b, t, h, 64, dtype=torch.bfloat16), "g": torch.zeros(b, t, h), **more}


def test_sizes_are_evaluated():
    dims = {"B": 2, "H": 3, "T": 37}
    assert [loader.evaluate(s, dims) for s in (64, "T", "B*H", "(T + 15) // 16 * 16 - B")] == [64, 37, 6, 46]


def test_a_launch_makes_what_is_missing_and_runs_the_kernels_in_order(op):
    given = tensors()
    results = op.launch(given)
    (first, prepare), (second, scan) = op.calls
    assert (first, second) == ("toy_prepare", "toy_scan")
    assert prepare[0] is given["x"] and prepare[1] is given["g"]
    assert prepare[2] is scan[0]  # the workspace passes from one to the other
    assert (tuple(scan[0].shape), scan[0].dtype) == ((2, 3, 16, 3, 64), torch.bfloat16)
    assert tuple(results["o"].shape) == (2, 37, 3, 64)
    assert torch.equal(scan[1], torch.zeros(2, 3, 16, 64))  # no initial state: zero
    assert scan[3] is results["final_state"]


def test_an_initial_state_and_outputs_may_be_given(op):
    state, o = torch.ones(2, 3, 16, 64), torch.empty(2, 37, 3, 64)
    results = op.launch(tensors(initial_state=state, o=o))
    assert op.calls[1][1][1] is state and results["o"] is o


def test_each_call_has_the_sizes_of_its_own_arguments(op):
    for b, n in ((2, 37), (2, 37), (1, 64), (2, 37)):
        results = op.launch(tensors(b, n))
        assert tuple(results["o"].shape) == (b, n, 3, 64)
        assert tuple(op.calls[-1][1][0].shape)[:3] == (b, -(-n // 16), 16)


@pytest.mark.parametrize("state", [None, torch.ones(2, 3, 16, 64)])
def test_no_token_keeps_the_state_and_launches_nothing(op, state):
    results = op.launch(tensors(t=0, initial_state=state))
    assert op.calls == []
    assert torch.equal(results["final_state"], torch.zeros(2, 3, 16, 64) if state is None else state)


def training_tensors(t=37, **more) -> dict:
    return tensors(t=t, a=torch.zeros(3), **more)


def test_a_forward_in_training_returns_what_it_keeps(trained):
    results = trained.launch(training_tensors())
    assert [name for name, _ in trained.calls] == ["toy_scan"]
    assert trained.training and trained.kept == ("w",)
    assert tuple(results["w"].shape) == (2, 3, 3, 16, 64)
    assert not {"d_S_w", "d_x_out", "d_initial_state"} & results.keys()  # the backward's own


def test_a_backward_makes_gradients_from_what_was_kept(trained):
    kept, d_out = trained.launch(training_tensors())["w"], torch.ones(2, 37, 3, 64, dtype=torch.bfloat16)
    trained.calls.clear()
    results = trained.launch(training_tensors(w=kept, d_o_in=d_out), "backward")
    (first, reverse), (second, gradients) = trained.calls
    assert (first, second) == ("toy_reverse", "toy_gradients")
    assert torch.equal(reverse[0], torch.zeros(2, 3, 64, 64))  # no cotangent of the final state: zero
    assert tuple(reverse[1].shape) == (2, 3, 3, 64, 64)  # 3 chunks, 2 a segment: 2 starts and the end
    assert gradients[3] is kept and gradients[4] is d_out and gradients[5] is reverse[1]
    assert not {"o", "final_state", "initial_state"} & results.keys()
    results["d_a_out"][:] = torch.arange(18.0).view(2, 3, 3)
    found = trained.gradients(results)
    assert found["x"] is results["d_x_out"] and found["g"] is results["d_g_out"]
    assert found["a"].tolist() == [0 + 1 + 2 + 9 + 10 + 11, 3 + 4 + 5 + 12 + 13 + 14, 6 + 7 + 8 + 15 + 16 + 17]


def test_a_backward_without_what_was_kept_is_refused(trained):
    with pytest.raises(ArgumentError, match="toy: the backward lacks w: expected what the forward's launch returned"):
        trained.launch(training_tensors(), "backward")


def test_with_no_token_the_cotangent_of_the_state_stays_and_gradients_are_zero(trained):
    kept, d_final = torch.empty(2, 3, 0, 16, 64, dtype=torch.bfloat16), torch.rand(2, 3, 64, 64)
    results = trained.launch(training_tensors(t=0, w=kept, d_final_state=d_final), "backward")
    assert trained.calls == []
    assert torch.equal(results["d_initial_state"], d_final)
    assert torch.equal(trained.gradients(results)["a"], torch.zeros(3))
    assert trained.gradients(results)["x"].shape == (2, 0, 3, 64)


def test_a_plan_from_before_there_were_passes_still_runs(op):
    del op.plan["passes"], op.plan["kept"]
    op.launch(tensors())
    assert [name for name, _ in op.calls] == ["toy_prepare", "toy_scan"]
    assert not op.training and op.kept == ()


def test_libraries_are_opened_once_whichever_thread_comes_first(tmp_path, monkeypatch):
    loaded, opened, barrier = loader.load_op(write_variant(tmp_path, toy.toy())), [], threading.Barrier(8)
    monkeypatch.setattr(LoadedOp, "_open", lambda self, kernel: opened.append(kernel["name"]))
    threads = [threading.Thread(target=lambda: (barrier.wait(), loaded.functions())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["toy_prepare", "toy_scan"]


def test_the_variant_that_fits_the_gpu_is_picked(tmp_path):
    for target in RUNS_ON:
        write_variant(tmp_path, toy.toy(target=target))
    op = BuiltOp(tmp_path / "toy")
    assert op.fitting(tensors(), "8.0").plan["target"] == "sm80"
    assert op.fitting(tensors(), "9.0").plan["target"] == "sm90"


def test_training_and_inference_have_kernels_of_their_own(tmp_path):
    write_variant(tmp_path, toy_training.toy())
    op = BuiltOp(tmp_path / "toy")
    with pytest.raises(ArgumentError, match="no kernels of toy are in .*toy: build some with `kdagen build --op toy`"):
        op.fitting(training_tensors(), "9.0")
    assert op.fitting(training_tensors(), "9.0", training=True).training
    assert op.planned(training_tensors()) is op.planned(training_tensors(), "9.0") is op.variants[0]
    with pytest.raises(ArgumentError, match="no kernels of toy for training fit"):
        op.planned(training_tensors(x=torch.zeros(2, 37, 3, 64)))


def test_a_variant_names_target_dtype_dims_and_what_differs():
    assert manifest.variant(toy.toy().plan()) == "sm90-bf16-64x64-g.fp32"
    assert manifest.variant(toy_training.toy().plan()) == "sm90-bf16-64x64-g.fp32-training"


def test_the_digest_tells_kernels_apart():
    assert manifest.digest(toy.toy()) == manifest.digest(toy.toy())
    assert (
        len({manifest.digest(s) for s in (toy.toy(), toy.toy(stages=3), toy.toy(target="sm80"), toy.toy("two"))}) == 4
    )


def test_a_plan_says_what_training_keeps_and_moves():
    kernels = zip(toy_training.toy().kernels, (100.0, 20.0, 300.0))
    source = dataclasses.replace(
        toy_training.toy(), kernels=tuple(dataclasses.replace(k, bytes_a_token=n) for k, n in kernels)
    )
    assert manifest.memory(source.plan()) == (64 * 2, 100.0, 320.0)
