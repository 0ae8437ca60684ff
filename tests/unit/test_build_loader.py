"""Launching from a manifest: shapes from the plan, kernels in order, the variant that fits. The kernels are Python."""

import platform
import threading

import pytest
import torch
import toy

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
    loaded = loader.load_op(write_variant(tmp_path, toy.toy()))
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


def test_a_variant_names_target_dtype_dims_and_what_differs():
    assert manifest.variant(toy.toy().plan()) == "sm90-bf16-64x64-g.fp32"


def test_the_digest_tells_kernels_apart():
    assert manifest.digest(toy.toy()) == manifest.digest(toy.toy())
    assert (
        len({manifest.digest(s) for s in (toy.toy(), toy.toy(stages=3), toy.toy(target="sm80"), toy.toy("two"))}) == 4
    )
