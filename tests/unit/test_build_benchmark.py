"""benchmarks/build.py: what it reads off a folder of kernels."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "build.py"
REPORT = {
    "name": "x_scan", "block": [128, 1, 1], "registers": 90, "spill_stores": 4, "spill_loads": 8, "stack_bytes": 0,
    "warnings": [], "sass": {"HGMMA": 5, "HMMA": 2}, "shared_bytes": 4096, "static_shared_bytes": 1024,
    "source": "x_scan.py", "code": "x_scan.cu",
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("build_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_products_are_counted_in_tilelang_and_in_cuda(script, tmp_path):
    (tmp_path / "x_scan.py").write_text("T.gemm(a, b, c)\nT.wgmma_gemm(a, b, c)\n# gemm\nT.copy(a, b)\n")
    (tmp_path / "x_scan.cu").write_text(
        "tl::mma_sync<A, B>(x);\ntl::mma_sync<A>(y);\ntl::wgmma_ss<A>(z);\ntl::wait_wgmma<0>();"
    )
    kernels = [{"name": "x_scan", "bytes_a_token": 900.0}, {"name": "x_reverse", "bytes_a_token": 700.0}]
    passes = {"forward": ["x_scan"], "backward": ["x_scan", "x_reverse"]}
    plan = {"schedule": {"chunk_size": 16}, "kernels": kernels, "passes": passes}
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"versions": {"nvcc": "13.0"}, "plan": plan, "kernels": [REPORT]}))
    found = script.figures(manifest, {(tmp_path / "x_scan.py").read_text(): 7.5})
    (kernel,) = found["kernels"]
    assert (kernel["products"], kernel["tensor_core_calls"], kernel["shared_bytes"]) == (2, 3, 5120)
    assert (kernel["modelled_bytes_a_token_a_head"], kernel["compile_s"]) == (900.0, 7.5)
    assert found["modelled_bytes_a_token_a_head"] == {"forward": 900.0, "backward": 1600.0}


def test_the_cache_knows_how_long_a_kernel_took(script, tmp_path):
    entry = tmp_path / "entries" / "abc"
    entry.mkdir(parents=True)
    (entry / "x_scan.py").write_text("text")
    (entry / "report.json").write_text(json.dumps({**REPORT, "seconds": 3.5}))
    assert script.compile_seconds(tmp_path) == {"text": 3.5}


def test_a_command_that_fails_is_shown(script):
    with pytest.raises(script.click.ClickException, match="No such option"):
        script.seconds([script.kdagen(), "build", "--archs"])


def test_several_runs_give_a_median(script, monkeypatch):
    taken = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(script, "seconds", lambda command: next(taken))
    assert script.repeated(["x"], 3) == {"median_s": 0.2, "least_s": 0.1, "most_s": 0.3}
