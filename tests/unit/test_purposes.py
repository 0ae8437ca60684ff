"""Kernels for inference, training and decoding, found for an op as `kdagen.compile` was asked for it."""

import packages
import pytest

import kdagen as kg
from kdagen.purposes import PURPOSES, without
from kdagen.runtime import manifest
from kdagen.runtime.jit import JustInTime
from kdagen.runtime.options import options
from kdagen.state import StateType
from kdagen.target import target

SM90, STATE = target("sm90"), StateType("VK", "bfloat16")
WORDS = "--head-dim 64,64 --decode-schedule v_tile=64 --state-layout VK --state-dtype bfloat16"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Those of gated linear attention, in an empty build folder."""
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    chosen = options(
        64, "bfloat16", None, None, None, (), tmp_path / "ops",
        state_layout="VK", state_dtype="bfloat16", decode_schedule={"v_tile": 64},
    )  # fmt: skip
    return JustInTime(kg.load("gla"), chosen, "gla")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_each_purpose_has_a_source_of_its_own(kernels, purpose):
    source = kernels.source(SM90, purpose)
    assert manifest.purpose(source.plan()) == purpose and source.state == STATE
    assert kernels.source(SM90, purpose) is source  # generated once
    suffix = "" if purpose == "inference" else f"-{purpose}"
    assert manifest.variant(source.plan()) == f"sm90-bf16-64x64-state.vk.bf16{suffix}"
    assert (source.schedule["v_tile"] == 64) or purpose != "decode"


def test_what_was_built_for_each_purpose_is_found(kernels, tmp_path):
    for purpose in PURPOSES:
        assert kernels.find(SM90, purpose) is None
        place = packages.write(tmp_path / "ops", kernels.source(SM90, purpose), tmp_path)
        assert kernels.find(SM90, purpose) == place
        assert kernels.fitting({}, "9.0", purpose).purpose == purpose
        assert kernels.planned({}, "9.0", purpose) is kernels.fitting({}, "9.0", purpose)


def test_kernels_for_other_states_are_not_taken(kernels, tmp_path):
    packages.write(tmp_path / "ops", kernels.source(SM90, "decode"), tmp_path)
    default = JustInTime(kg.load("gla"), options(64, "bfloat16", None, None, None, (), tmp_path / "ops"), "gla")
    assert default.find(SM90, "decode") is None


def test_the_command_repeats_the_options_of_states_and_decoding(kernels):
    assert kernels.command(SM90) == f"kdagen build --arch sm90 --op gla --out DIR {WORDS}"


def test_states_and_schedules_of_decoding_tell_ops_apart(kernels):
    other = options(64, "bfloat16", None, None, None, (), None)
    assert kernels.options.json()["state"] == {"layout": "VK", "dtype": "bfloat16"} != other.json()["state"]
    assert kernels.options.json()["decode_schedule"] == {"v_tile": 64} != other.json()["decode_schedule"]


def test_how_to_build_without_a_purpose():
    assert without("training") == "--only inference --only decode builds without training"
