"""tests/gpu without a GPU: that its checks pass on programs that are right, and fail on those that are not."""

import importlib
import sys
from pathlib import Path

import packages
import pytest
import simulated_gpu
from kdagen.autotune import cases
from kdagen.autotune.check import cases as drawn

from kdagen import zoo
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.state import StateType

GPU_TESTS = Path(__file__).parents[1] / "gpu"
KEEP = {"default": "states", "keep_inputs": "inputs", "keep_all": "all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As pack_for_device.py leaves it, of linear attention and RetNet, small enough to run as programs."""
    place = tmp_path_factory.mktemp("packed")
    for name in ("linear_attention", "retnet"):
        for package, keep in KEEP.items():
            schedule = {"keep": keep, "segment": 2, "chunk_size": 16}
            packages.write(place / package, compile_training(zoo.get(name), 64, schedule=schedule), place)
        packages.write(place / "default", compile_op(zoo.get(name), 64), place)
        packages.write(place / "default", compile_decode(zoo.get(name), 64), place)
        packages.write(place / "vk", compile_decode(zoo.get(name), 64, state=StateType("VK", "bfloat16")), place)
    return place


@pytest.fixture
def gpu_tests(folder, monkeypatch):
    """Imports a module of tests/gpu whose GPU is simulated."""
    simulated_gpu.install(monkeypatch)
    monkeypatch.setenv("KDAGEN_BUILD_DIR", str(folder / "default"))
    monkeypatch.syspath_prepend(str(GPU_TESTS))
    names = [path.stem for path in GPU_TESTS.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.import_module("built_ops"), "DEVICE", "cpu")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_kernels_are_told_apart_by_purpose_and_policy(gpu_tests):
    ops = gpu_tests("built_ops")
    assert [v.training for v in ops.variants("retnet")] == [False]
    assert [v.plan["schedule"]["keep"] for v in ops.trained("retnet")] == ["states", "all", "inputs"]
    policies = ops.by_policy("retnet")
    assert {keep: k.plan["schedule"]["keep"] for keep, k in policies.items()} == {k: k for k in KEEP.values()}
    assert [k.folder.parents[1].name for k in policies.values()] == ["keep_inputs", "default", "keep_all"]


@pytest.mark.parametrize("length", ["one token", "a chunk and a token", "segments and a part"])
def test_training_is_within_tolerance(gpu_tests, length):
    tests = gpu_tests("test_training_kernels")
    for kernels in gpu_tests("built_ops").trained("retnet"):
        tests.check("retnet", kernels, (1, tests.tokens(kernels, length), 2))


def test_missing_states_and_cotangents_are_zero(gpu_tests):
    tests = gpu_tests("test_training_kernels")
    kernels = gpu_tests("built_ops").trained("linear_attention")[0]
    tests.check("linear_attention", kernels, (2, 20, 1), with_states=False)
    tests.check("linear_attention", kernels, (2, 20, 1), with_d_out=False)


def test_bits_are_compared(gpu_tests, monkeypatch):
    tests, ops = gpu_tests("test_training_bits"), gpu_tests("built_ops")
    monkeypatch.setattr(tests, "SHAPE", (3, 37, 2))
    monkeypatch.setattr(tests, "REPLAYS", 2)
    monkeypatch.setattr(tests, "by_policy", lambda name: ops.by_policy("retnet"))
    tests.test_replays_are_identical("retnet")
    tests.test_policies_agree("mild")
    tests.test_other_sequences_leave_gradients_alone("retnet")
    monkeypatch.setattr(tests, "by_policy", lambda name: ops.by_policy("linear_attention"))
    monkeypatch.setattr(tests, "HUGE_TOKENS", 75)
    monkeypatch.setattr(tests, "HUGE_HEADS", 3)
    monkeypatch.setattr(tests, "DEVICE", "cpu")
    tests.test_offsets_beyond_32_bits()


def test_the_forward_tests_take_kernels_of_inference_alone(gpu_tests):
    gpu_tests("test_kernels").check("linear_attention", (1, 33, 2), "mild", with_state=True)


def test_ragged_batches(gpu_tests, monkeypatch):
    tests = gpu_tests("test_ragged_kernels")
    monkeypatch.setattr(tests, "DEVICE", "cpu")
    monkeypatch.setattr(tests, "MANY", 9)
    monkeypatch.setattr(tests, "LENGTHS", {"short and empty": [0, 1, 0, 33, 16]})
    tests.test_against_the_recurrence("retnet", "short and empty")
    tests.test_a_sequence_alone_is_the_same("retnet", "mild")
    tests.test_states_on_the_way_are_final_states_of_what_comes_before("linear_attention")
    tests.test_gradients_of_a_sequence_alone_are_the_same("retnet")
    tests.test_more_sequences_than_a_grid_has_rows()
    tests.test_a_graph_serves_all_lengths("linear_attention")


@pytest.mark.parametrize("number", range(5))
def test_wrong_ends_of_sequences(gpu_tests, number):
    tests = gpu_tests("test_ragged_kernels")
    tests.test_ends_that_are_wrong_lead_nowhere_outside("retnet", tests.BAD_ENDS[number])


def test_decoding(gpu_tests, monkeypatch):
    tests = gpu_tests("test_decode_kernels")
    monkeypatch.setattr(tests, "DEVICE", "cpu")
    monkeypatch.setattr(tests, "HEADS", 2)
    assert [k.state.name for k in gpu_tests("built_ops").decoding("retnet")] == ["", "vk.bf16"]
    tests.test_against_the_recurrence("retnet", 3)
    tests.test_slots_are_updated_and_all_others_left_alone("retnet")
    tests.test_a_sequence_alone_is_the_same("retnet")
    tests.test_ragged_decoding_is_that_of_each_sequence("retnet")
    tests.test_null_slots_give_zero_and_touch_nothing("retnet", 1)
    tests.test_speculation_starts_at_what_was_accepted_and_stores_a_state_a_token("retnet")
    tests.test_replays_are_identical("linear_attention")
    monkeypatch.setattr(tests, "decoding", lambda name: gpu_tests("built_ops").decoding("retnet"))
    monkeypatch.setattr(tests, "POOL_ELEMENTS", 5 * 2 * 64 * 64)
    tests.test_a_pool_beyond_32_bits()
    tests.test_a_graph_serves_all_slots("retnet")


@pytest.mark.parametrize("wrong", ["slots", "slots of 64 bits", "counts", "ends"])
def test_wrong_integers_of_decoding(gpu_tests, wrong):
    gpu_tests("test_decode_kernels").test_what_is_wrong_leads_nowhere_outside("retnet", wrong)


def test_the_tuner(gpu_tests, monkeypatch):
    simulated_gpu.install_device(monkeypatch)
    tests = gpu_tests("test_tune_on_gpu")
    monkeypatch.setattr(cases, "SHORT", (1, 0, 17))
    monkeypatch.setattr(cases, "LONG", (9,))
    drawn.cache_clear()
    device = tests.Device("0")
    device.name = "cpu"
    monkeypatch.setattr(tests, "WORKLOADS", {"inference": ("1x9x1", "5+0+1:1/2"), "decode": ("2x1x2",)})
    contender = tests.contender
    monkeypatch.setattr(tests, "contender", lambda name, purpose: contender("retnet", purpose))
    for purpose in tests.WORKLOADS:
        tests.test_built_ops_are_right(device, "retnet", purpose)
        for mode in ("device", "graph"):
            tests.test_every_policy_times(device, purpose, mode, "warm")
        with monkeypatch.context() as patch:
            tests.test_one_that_is_off_is_not(device, purpose, patch)
    tests.test_what_does_not_fit_is_refused_and_leaves_the_device_usable(device)
    drawn.cache_clear()


def beyond(tensors: dict) -> None:
    gradient = tensors["d_q_out"]
    gradient.as_strided((1,), (1,), gradient.storage_offset() + gradient.numel()).zero_()


WRONG = {
    "a kernel wrote outside its tensors": beyond,
    "a kernel wrote to S_w, which it was given": lambda t: t["S_w"].add_(1),
    "a kernel wrote to q, which it was given": lambda t: t["q"].zero_(),
    "a gradient that is NaN": lambda t: t["d_q_out"][3].fill_(float("nan")),
    "error and tolerance": lambda t: t["d_q_out"].mul_(1.05),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_is_wrong_is_found(gpu_tests, monkeypatch, says):
    tests, kernels = gpu_tests("test_training_kernels"), gpu_tests("built_ops").trained("linear_attention")[0]
    simulated_gpu.tampered(monkeypatch, "backward", WRONG[says])
    with pytest.raises(AssertionError, match=says):
        tests.check("linear_attention", kernels, (1, 20, 1))


def test_a_gradient_that_moves_is_found(gpu_tests, monkeypatch):
    tests, times = gpu_tests("test_training_bits"), iter(range(99))
    monkeypatch.setattr(tests, "SHAPE", (1, 20, 1))
    simulated_gpu.tampered(monkeypatch, "backward", lambda t: t["d_v_out"].view(-1)[:1].add_(next(times)))
    with pytest.raises(AssertionError, match="d_v"):
        tests.test_replays_are_identical("linear_attention")
