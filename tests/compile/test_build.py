"""A whole build of the toy op: TileLang, nvcc, the launcher, the folder; then loading it with none of them."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import mock_driver
import pytest
import toy
import toy_training
from mock_driver import tensor

from kdagen import debug
from kdagen.build import builder
from kdagen.build.progress import summary
from kdagen.runtime import manifest
from kdagen.runtime.loader import find_built

pytestmark = pytest.mark.nvcc
TESTS = Path(__file__).parents[1]
VARIANT = "sm90-bf16-64x64-g.fp32"
# Builds the toy op as a process of its own: argv[1] is the folder; prints the modules that a build must not need.
BUILD = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import pathlib, toy
from kdagen.build.builder import build
build([toy.toy()], pathlib.Path(sys.argv[1]))
print(sorted(set(sys.modules) & {{"tilelang", "torch", "tvm", "sympy"}}))
"""


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory):
    """One cache for this module, so that each kernel is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDAGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield debug.cache_dir()


@pytest.fixture(scope="module")
def built(cache_dir, tmp_path_factory):
    """The toy op, built."""
    out = tmp_path_factory.mktemp("out") / "my_ops"
    (op,) = builder.build([toy.toy()], out, jobs=2)
    return op


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    process = mock_driver.MockProcess(mock_driver.compile_mock(tmp_path_factory.mktemp("mock")))
    yield process
    process.close()


def build_process(out, **environment) -> subprocess.Popen:
    """A build of the toy op under way."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_build_leaves_sources_libraries_and_a_manifest(built):
    assert built.folder.parts[-3:] == ("my_ops", "toy", VARIANT)
    assert sorted(f.name for f in built.folder.iterdir()) == [
        "manifest.json",
        *(f"toy_{kernel}.{kind}" for kernel in ("index", "prepare", "scan") for kind in ("cu", "py", "so")),
    ]
    found = manifest.read(built.folder)
    index, prepare, scan = found["kernels"]
    assert found["plan"] == toy.toy().plan()
    assert found["target"] == {"name": "sm90", "arch": "sm_90a", "runs_on": ["9.0"], "compiled": True}
    assert found["host"] == platform.machine()
    assert set(found["versions"]) == {"kdagen", "tilelang", "nvcc"}
    assert (index["grid"], index["block"]) == (["N1 - 1", "1", "1"], [64, 1, 1])
    assert (prepare["grid"], prepare["block"]) == (["NC", "HV", "1"], [64, 1, 1])
    assert (scan["grid"], scan["block"]) == (["N", "HV", "1"], [256, 1, 1])  # a producer warpgroup on top
    assert (scan["shared_bytes"], scan["tma_descriptors"]) == (2 * 16 * 64 * 2, 1)
    assert all(0 < k["registers"] <= 255 and k["spill_stores"] == k["spill_loads"] == 0 for k in found["kernels"])
    assert (built.folder / "toy_scan.py").read_text() == toy.toy().kernels[2].text
    assert "__global__" in (built.folder / "toy_scan.cu").read_text()


def test_the_summary_lists_every_kernel(built):
    header, _, prepare, scan = summary([built]).splitlines()
    titles = "op for target kernel threads registers spilled bytes shared KiB seconds"
    assert " ".join(header.split()) == titles
    assert prepare.split()[:5] == ["toy", "inference", "sm90", "toy_prepare", "64"]
    assert scan.split()[:5] == ["toy", "inference", "sm90", "toy_scan", "256"]


def test_what_takes_longest_is_compiled_first(monkeypatch, tmp_path):
    order = []
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(builder.pool, "compile_all", lambda jobs, *_: order.extend(len(j.text) for j in jobs.values()))
    builder.compile_kernels([toy.toy(), toy_training.toy()], 2, builder.Progress(silent=True))
    assert len(order) == 7 and order == sorted(order, reverse=True)


def test_a_warm_build_needs_no_tilelang_and_leaves_the_same_bytes(built, tmp_path):
    process = build_process(tmp_path / "again")
    assert process.communicate() == ("[]\n", "")
    assert manifest.hash_files(tmp_path / "again" / "toy" / VARIANT) == manifest.hash_files(built.folder)
    assert manifest.read(tmp_path / "again" / "toy" / VARIANT) == manifest.read(built.folder)


def test_a_cold_build_elsewhere_leaves_the_same_bytes(built, tmp_path):
    process = build_process(tmp_path / "out", KDAGEN_CACHE_DIR=str(tmp_path / "cache"))
    assert process.communicate()[1] == ""
    assert manifest.read(tmp_path / "out" / "toy" / VARIANT) == manifest.read(built.folder)


def test_two_cold_builds_at_once_into_one_folder(tmp_path):
    out, environment = tmp_path / "out", {"KDAGEN_CACHE_DIR": str(tmp_path / "cache")}
    both = [build_process(out, **environment) for _ in range(2)]
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert manifest.read(out / "toy" / VARIANT)["name"] == "toy"
    assert sorted(f.name for f in (out / "toy").iterdir()) == [VARIANT]


def test_a_build_killed_at_any_stage_harms_neither_cache_nor_folder(built, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    for delay in (0.3, 3.0, 6.0):
        process = build_process(out, KDAGEN_CACHE_DIR=str(cache))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "toy" / VARIANT).exists() or manifest.read(out / "toy" / VARIANT)
    process = build_process(out, KDAGEN_CACHE_DIR=str(cache))
    assert process.communicate()[1] == ""
    assert manifest.read(out / "toy" / VARIANT) == manifest.read(built.folder)


def test_the_kernels_launch_on_the_mock_driver(built, driver):
    t, n, h, hv, nc, ns = 74, 2, 3, 6, 6, 1
    w, state = tensor((hv, nc, 16, 64), "bfloat16"), tensor((n, hv, 16, 64), "float32")
    x, g, o = tensor((t, h, 64), "bfloat16"), tensor((t, hv), "float32"), tensor((t, hv, 64), "float32")
    cu_seqlens, rows, states = tensor((n + 1,), "int32"), tensor((nc, 2), "int32"), tensor((ns, hv, 16, 64), "float32")
    call = lambda name, given: driver.call(built.folder / f"{name}.so", name, given)  # noqa: E731
    index, prepare = call("toy_index", [cu_seqlens, rows]), call("toy_prepare", [x, g, rows, w])
    scan = call("toy_scan", [w, cu_seqlens, state, 3, o, states, state])
    assert index["errors"] == prepare["errors"] == scan["errors"] == []
    assert f"cuLaunchKernel toy_index_kernel grid={n},1,1 block=64,1,1 shared=0" in index["log"][-1]
    assert f"cuLaunchKernel toy_prepare_kernel grid={nc},{hv},1 block=64,1,1 shared=2048" in prepare["log"][-1]
    assert f"cuLaunchKernel toy_scan_kernel grid={n},{hv},1 block=256,1,1 shared=4096" in scan["log"][-1]
    (descriptor,) = (line for line in scan["log"] if line.startswith("cuTensorMapEncodeTiled"))
    assert f"extents=64,16,{nc},{hv} strides=128,2048,{nc * 2048}" in descriptor
    wrong = call("toy_scan", [w, cu_seqlens, state, 3, tensor((t, 4, 64), "float32"), states, state])
    assert wrong["errors"] == ["ValueError: toy_scan: o has shape [74, 4, 64], expected [T, HV, 64] = [74, 6, 64]"]
    none = [w, cu_seqlens, state, 1 << 30, o, tensor((0, hv, 16, 64), "float32"), state]
    assert call("toy_scan", none)["errors"] == []  # no states are asked for


def test_the_package_loads_with_torch_and_tvm_ffi_only(built, tmp_path):
    """In a process with an empty PATH, in which no other package of kdagen's can be imported."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "tilelang tvm sympy jinja2 click rich filelock platformdirs".split():
            raise ImportError("not on this machine: " + name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(built.folder.parents[1].parent)!r})
from my_ops import toy
print(toy)
print(sorted(toy.variants[0].functions()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert run.stdout.splitlines() == [f"toy(x, g) built for {VARIANT}", "['toy_index', 'toy_prepare', 'toy_scan']"], (
        run.stderr
    )


def test_an_op_finds_its_kernels_in_the_build_folder_else_in_the_cache(built, monkeypatch, tmp_path):
    other = toy.toy(stages=3)
    assert find_built(toy.toy(), [built.folder.parents[1]]) == built.folder
    assert find_built(other, [built.folder.parents[1]]) is None  # same name and variant, other kernels
    monkeypatch.setenv("KDAGEN_BUILD_DIR", str(tmp_path))
    assert find_built(toy.toy()) is None
    cached = builder.build_cached(toy.toy())
    assert find_built(toy.toy()) == cached
    assert manifest.read(cached) == manifest.read(built.folder)


def test_a_corrupt_cache_entry_is_built_again(built, cache_dir, tmp_path, caplog):
    (library,) = cache_dir.glob("entries/*/toy_prepare.so")
    library.write_bytes(library.read_bytes()[:-1])
    (op,) = builder.build([toy.toy()], tmp_path / "out")
    (line,) = caplog.messages
    assert f"cache entry {library.parent} is corrupt (toy_prepare.so changed)" in line
    assert [k["cached"] for k in op.kernels] == [True, False, True]
    assert manifest.read(op.folder) == manifest.read(built.folder)


def test_amd_gets_source_only_and_is_told_so(tmp_path):
    from kdagen.errors import ArtefactError
    from kdagen.runtime.loader import load_op

    (op,) = builder.build([toy.toy(target="gfx942")], tmp_path / "out")
    assert sorted(f.suffix for f in op.folder.iterdir()) == [*[".hip"] * 3, ".json", *[".py"] * 3]
    assert summary([op]).count("source only") == 3
    assert "nvcc" not in manifest.read(op.folder)["versions"]
    with pytest.raises(ArtefactError, match="holds source only: kdagen does not compile for gfx942"):
        load_op(op.folder).functions()


def test_the_machine_code_is_counted_where_there_is_a_disassembler(built):
    from kdagen.build import toolchain

    counts = [kernel["sass"] for kernel in manifest.read(built.folder)["kernels"]]
    if toolchain.has_disassembler():
        assert counts[2]["UTMALDG"] >= 1 and counts[2]["STL"] == counts[2]["LDL"] == 0
    else:
        assert counts == [None, None, None]


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm100", "sm120"])
def test_the_other_targets_compile(arch, tmp_path):
    (op,) = builder.build([toy.toy(target=arch, stages=1)], tmp_path / "out")
    assert [k["library"] for k in op.kernels] == ["toy_index.so", "toy_prepare.so", "toy_scan.so"]
