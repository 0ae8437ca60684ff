"""`kdagen build` on recurrences: the flagship within its budget, and one that the user wrote in a file of their own."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from kdagen import cli
from kdagen.build import toolchain
from kdagen.runtime import manifest
from kdagen.target import target

pytestmark = pytest.mark.nvcc
USERS = """
import kdagen as kg

@kg.recurrence
def leaky(S, q, k, v, rate):
    S = kg.exp(-kg.softplus(rate)) * S + kg.outer(k, v)
    return S, S.T @ q
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the user's file, and a cache for this module."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "mine.py").write_text(USERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDAGEN_CACHE_DIR", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def build(*options) -> str:
    result = CliRunner().invoke(cli.main, ["build", "--arch", "sm90", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def folder(workplace, purpose: str = ""):
    return workplace / "kdagen_ops" / "kda" / f"sm90-bf16-128x128{purpose}"


@pytest.fixture(scope="module")
def said(workplace) -> str:
    return build("--op", "kda")


@pytest.fixture(scope="module")
def kda(said, workplace) -> dict:
    return manifest.read(folder(workplace))


def test_a_build_says_how_to_use_it_and_has_nothing_to_warn_of(said):
    assert "use:  from kdagen_ops import kda" in said
    assert "warning" not in said


@pytest.fixture(scope="module")
def training(kda, workplace) -> dict:
    return manifest.read(folder(workplace, "-training"))


@pytest.fixture(scope="module")
def decode(kda, workplace) -> dict:
    return manifest.read(folder(workplace, "-decode"))


@pytest.mark.parametrize("purpose", ["kda", "training", "decode"])
def test_kda_on_sm90_keeps_to_its_budget(purpose, request):
    for kernel in request.getfixturevalue(purpose)["kernels"]:
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
        assert kernel["shared_bytes"] + kernel["static_shared_bytes"] <= target("sm90").shared_bytes
        assert kernel["warnings"] == []  # C7512: wgmma serialised


def test_training_has_both_passes_and_keeps_the_states(training):
    forward = ["kda_index", "kda_prepare", "kda_scan"]
    names = [kernel["name"] for kernel in training["kernels"]]
    assert names == [*forward, "kda_reverse", "kda_gradients"]  # each once
    assert training["plan"]["passes"] == {
        "forward": forward,
        "backward": ["kda_index", "kda_prepare", "kda_reverse", "kda_gradients"],
    }
    assert training["plan"]["kept"] == ["S_w"]
    assert training["plan"]["tensors"]["d_beta_out"]["of"] == "beta"


def test_kda_on_sm90_uses_tensor_cores_in_every_kernel(kda, workplace):
    _, prepare, *_, scan = kda["kernels"]
    assert "mma" in (folder(workplace) / prepare["code"]).read_text()
    assert "wgmma" in (folder(workplace) / scan["code"]).read_text()
    if toolchain.has_disassembler():
        assert scan["sass"]["HGMMA"] > 0 == scan["sass"]["HMMA"]
        assert scan["sass"]["UTMALDG"] > 0 and scan["sass"]["LDL"] == scan["sass"]["STL"] == 0


def test_decoding_is_one_kernel(decode):
    assert decode["plan"]["passes"] == {"decode": ["kda_decode"]}
    assert decode["plan"]["kernels"][0]["name"] == "kda_decode"


def test_a_second_run_compiles_nothing(kda, training, decode, workplace):
    output = build("--op", "kda")
    assert output.count("cached") == sum(len(found["kernels"]) for found in (kda, training, decode))
    assert manifest.read(folder(workplace)) == kda and manifest.read(folder(workplace, "-training")) == training


def test_a_recurrence_from_a_file_joins_the_folder(kda, workplace):
    output = build("--op", "mine.py:leaky", "--head-dim", "64", "--dtype", "float16", "--only", "inference")
    assert "use:  from kdagen_ops import leaky" in output
    code = "import kdagen_ops as ops; print(ops.kda); print(ops.leaky)"
    run = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "kda(q, k, v, g, beta) built for sm90-bf16-128x128, sm90-bf16-128x128-decode, sm90-bf16-128x128-training",
        "leaky(q, k, v, rate) built for sm90-fp16-64x64",
    ], run.stderr
