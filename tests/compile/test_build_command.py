"""`kdagen build` on recurrences: the flagship within its budget, and one that the user wrote in a file of their own."""

import subprocess
import sys

import mock_driver
import pytest
from click.testing import CliRunner
from mock_driver import ops

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
    return build("--op", "kda", "--untuned")


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


LAUNCH = """
sys.path.insert(0, ".")
from kdagen_ops import kda
by_purpose = {v.purpose: v for v in kda.variants}
H, HV = 2, 4

def arguments(b, t):
    q, k, v, g = (bf16(b, t, n, 128) for n in (H, H, HV, HV))
    return {"q": q, "k": k, "v": v, "g": g, "beta": bf16(b, t, HV)}

def shapes(made, *names):
    print(*(f"{n} {list(made[n].shape)}" for n in names), sep=", ")
    print(*launched(), sep=", ")

ragged = {**arguments(1, 300), "cu_seqlens": torch.tensor([0, 0, 1, 290])}
for given in (arguments(2, 150), ragged):
    made = by_purpose["inference"].launch(given, scalars={"every": 4})
    shapes(made, "o_out", "final_state", "states")
    train = by_purpose["training"]
    kept = train.launch(given)
    made = train.launch(given | {n: kept[n] for n in train.kept}, "backward")
    shapes({**kept, **train.gradients(made)}, "S_w", *"qkvg", "beta")
pool = torch.zeros(9, HV, 128, 128)
for given in (arguments(5, 2), {**arguments(1, 10), "cu_seqlens": torch.tensor([0, 0, 3, 9])}):
    indices = torch.zeros(len(given["cu_seqlens"]) - 1 if "cu_seqlens" in given else 5, 2, dtype=torch.int64)
    made = by_purpose["decode"].launch({**given, "state_pool": pool, "state_indices": indices}, "decode")
    shapes(made, "o_out")
"""


def test_kda_is_launched_on_batches_and_ragged_ones(kda, training, decode, workplace, tmp_path):
    """On the mock driver: all that launchers check, and the grids that the driver is asked for."""
    lines = ops.run(mock_driver.compile_mock(tmp_path), LAUNCH, workplace)
    schedules = [found["plan"]["chunk_size"] for found in (kda, training)], training["plan"]["schedule"]["segment"]
    tile, expected = training["plan"]["schedule"]["reverse_v_tile"], []
    for lead, n in (([2, 150], 2), ([1, 300], 3)):
        (chunk, longer), segment = schedules
        slots, kept = 300 // chunk + n, 300 // longer + n
        states = [2, 150 // (4 * chunk)] if n == 2 else [1, 300 // (4 * chunk)]
        expected += [
            f"o_out {[*lead, 4, 128]}, final_state {[n, 4, 128, 128]}, states {[*states, 4, 128, 128]}",
            f"kda_index grid={n},1,1, kda_prepare grid={slots},4,1, kda_scan grid={n},4,1",
            f"S_w {[4, kept, 128, 128]}, "
            + ", ".join(f"{name} {[*lead, heads, 128]}" for name, heads in zip("qkvg", (2, 2, 4, 4)))
            + f", beta {[*lead, 4]}",
            f"kda_index grid={n},1,1, kda_prepare grid={kept},4,1, kda_scan grid={n},4,1, kda_index grid={n},1,1, "
            f"kda_prepare grid={kept},4,1, kda_reverse grid={n * 128 // tile},4,1, "
            f"kda_gradients grid={300 // (longer * segment) + n},4,1",
        ]
    tiles = 128 // decode["plan"]["schedule"]["v_tile"]
    for lead, n in (([5, 2], 5), ([1, 10], 3)):
        expected += [f"o_out {[*lead, 4, 128]}", f"kda_decode grid={tiles * n},4,1"]
    assert lines == expected


def test_a_second_run_compiles_nothing(kda, training, decode, workplace):
    output = build("--op", "kda", "--untuned")
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
