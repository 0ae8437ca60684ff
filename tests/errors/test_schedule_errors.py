"""Choices that do not fit are refused before anything is generated, each with what to write instead."""

import pytest

from kdagen import zoo
from kdagen.errors import ScheduleError, TargetError
from kdagen.pipeline import compile_decode, compile_op
from kdagen.schedule import Schedule
from kdagen.state import StateType

CASES = [
    ({"head_dim": 96}, r"head_dim \(96, 96\) has no kernels: expected K and V among"),
    ({"schedule": {"chunk_size": 24}}, "chunk_size 24: expected 16, 32 or 64"),
    ({"schedule": {"v_tile": 96}}, "v_tile 96: expected a multiple of 64 that divides V = 128"),
    ({"schedule": {"output": "both"}}, "output 'both': expected 'fused' or 'split'"),
    ({"schedule": {"chunks": 16}}, "unknown schedule field chunks: expected some of chunk_size"),
    ({"schedule": {"decay": "scalar"}}, "decay form 'scalar' does not fit: expected factored or tree"),
    ({"schedule": {"decay": "factored"}}, "decay 'factored' with chunk_size 16: a gate bounded by -inf"),
    ({"schedule": {"decay": "both"}}, "decay 'both': expected one of none, scalar, factored, tree"),
    ({"schedule": {"scan_skeleton": "mine"}}, "no skeleton 'mine': expected one of decode, gradients, index, output,"),
    ({"schedule": {"split": "few"}}, "split few: expected chunks in a segment, 1 to 65536, or 0 for no split"),
    ({"schedule": {"split": -1}}, "split -1: expected chunks in a segment, 1 to 65536, or 0 for no split"),
    ({"schedule": {"split": 2**17}}, "split 131072: expected chunks in a segment, 1 to 65536"),
    (
        {"arch": "gfx942", "head_dim": 256, "schedule": {"split": 8}},
        "split: to carry a state of 256 keys a block needs 84 KiB of shared memory, gfx942 has 64: expected split 0",
    ),
    ({"arch": "sm80", "schedule": {"stages": 2}}, "stages 2: sm80 has no TMA, expected 1"),
    ({"schedule": {"scan_skeleton": "scan_plain"}}, "stages 2: in 'scan_plain' all warps fetch, one chunk ahead: "),
    ({"arch": "sm80", "schedule": {"scan_skeleton": "scan_specialised"}}, "needs wgmma, which sm80 lacks"),
    ({"dtype": "float32"}, "dtype 'float32' has no kernels: expected bfloat16 or float16"),
    ({"gate_dtype": "int8"}, "gate_dtype 'int8': expected bfloat16, float16 or float32"),
]


@pytest.mark.parametrize("choices, message", CASES)
def test_choices_that_do_not_fit(choices, message):
    with pytest.raises(ScheduleError, match=message):
        compile_op(zoo.get("kda"), **choices)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"head_dim": 96}, r"head_dim \(96, 96\) has no kernels: expected K and V among"),
        ({"schedule": {"v_tile": 96}}, "v_tile 96 does not divide V = 128: expected 16, 32 or 64"),
        ({"schedule": {"threads": 96}}, "96 threads cannot share a tile of the state of 128 x 32 as float32"),
        (
            {"schedule": {"threads": 16}, "state": StateType("VK")},
            "16 threads cannot share a tile of the state of 32 x 128",
        ),
        ({"schedule": {"v_tile": 2}}, "128 threads cannot share a tile of the state of 128 x 2 as float32"),
        ({"schedule": {"chunk_size": 16}}, "unknown schedule field chunk_size: expected some of skeleton, threads"),
        ({"schedule": Schedule()}, "a Schedule is no choice here: expected a DecodeSchedule"),
    ],
)
def test_choices_that_do_not_fit_decoding(choices, message):
    with pytest.raises(ScheduleError, match=message):
        compile_decode(zoo.get("kda"), **choices)


def test_stacked_streams_need_a_narrow_tile():
    with pytest.raises(ScheduleError, match="v_tile 128: 2 streams are stacked in 'Y', expected 64"):
        compile_op(zoo.get("deltaproduct"), schedule={"v_tile": 128})


def test_warps_that_cannot_share_a_product():
    message = "prepare_threads 128: its 4 warps cannot share a product of 96 x 64 evenly on sm90: expected 64"
    with pytest.raises(ScheduleError, match=message):
        compile_op(zoo.get("deltaproduct"), schedule={"chunk_size": 32, "prepare_threads": 128})


def test_unknown_arch_lists_the_known():
    with pytest.raises(TargetError, match="unknown arch .sm75.: expected one of sm80, sm89, sm90"):
        compile_op(zoo.get("kda"), arch="sm75")


def test_schedules_are_their_json():
    assert Schedule().json() == Schedule(chunk_size=16).json() != Schedule(chunk_size=32).json()
