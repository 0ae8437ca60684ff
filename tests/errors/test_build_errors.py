"""Each message that building, loading and launching can give."""

import json
import os
import platform
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import toy
from click.testing import CliRunner

from kdagen import cli
from kdagen.build import builder, kernel, pool, toolchain
from kdagen.build.adapter import Scalar, Tensor
from kdagen.build.kernel import job_of
from kdagen.errors import ArgumentError, ArtefactError, LaunchError, ScheduleError, ToolchainError
from kdagen.runtime import layout, loader, manifest
from kdagen.runtime.loader import LoadedOp
from kdagen.runtime.package import BuiltOp
from kdagen.target import target

SM90 = target("sm90")


def raises(error, message: str):
    return pytest.raises(error, match=re.escape(message))


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no compiler."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for variable in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain, "_wheel_folders", list)
    toolchain.find_nvcc.cache_clear()
    yield monkeypatch
    toolchain.find_nvcc.cache_clear()


def test_no_nvcc_names_all_three_ways(bare):
    with pytest.raises(ToolchainError) as error:
        toolchain.find_nvcc()
    assert str(error.value).startswith("no nvcc found")
    for way in ("put nvcc on PATH", "set CUDA_HOME (or CUDA_PATH)", "pip install 'kdagen[cuda]'"):
        assert way in str(error.value)


def test_no_host_compilers(bare):
    with raises(
        ToolchainError, "no C compiler found (tried cc, gcc, clang); it builds each kernel's host launcher: install gcc"
    ):
        toolchain.find_cc()
    with raises(
        ToolchainError, "no C++ compiler found (tried g++, clang++); it is what nvcc preprocesses with: install gcc"
    ):
        toolchain.find_cxx()


def test_a_named_compiler_that_is_not_there(bare):
    bare.setenv("CC", "icc -fast")
    with raises(ToolchainError, "no C compiler found ($CC is 'icc', which is not there)"):
        toolchain.find_cc()


def test_no_tilelang(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with raises(ToolchainError, "TileLang is not installed: pip install 'kdagen[build]'"):
        toolchain.tilelang_includes()


def test_no_tilelang_is_known_before_any_worker_starts(monkeypatch):
    def missing(name):
        raise builder.metadata.PackageNotFoundError(name)

    builder._versions.cache_clear()
    monkeypatch.setattr(builder.metadata, "version", missing)
    with raises(ToolchainError, "TileLang is not installed: pip install 'kdagen[build]'"):
        builder._versions()


def fake_nvcc(folder, text: str):
    """An nvcc that prints `text` and fails."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 2\n")
    path.chmod(0o755)
    return toolchain.Nvcc(str(path), "13.0.88", "PATH")


def test_nvcc_fails(tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "x.cu(7): error: identifier y is undefined")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(toolchain, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(toolchain, "tilelang_includes", list)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "x.cu").write_text("source")
    kept = tmp_path / "cache" / "failed"
    with raises(
        ToolchainError,
        "nvcc 13.0.88 failed on x.cu for sm_90a: x.cu(7): error: identifier y is undefined "
        f"(full log {kept / 'x.log'}, source {kept / 'x.cu'})",
    ):
        toolchain.compile_cubin(tmp_path / "x.cu", "sm_90a")
    assert (kept / "x.cu").read_text() == "source" and "identifier y" in (kept / "x.log").read_text()


def test_the_c_compiler_fails(tmp_path):
    (tmp_path / "x.c").write_text("int main( {")
    with pytest.raises(ToolchainError, match=r"cc failed on the launcher .*x\.c: x\.c:1:.* error: "):
        toolchain.compile_library(tmp_path / "x.c")


# -- kernels that cannot run ------------------------------------------------------------------------------------------

JOB = job_of(toy.toy().kernels[2], toy.toy())


def test_too_much_shared_memory():
    with raises(
        ScheduleError,
        "toy_scan needs 300.0 KiB of shared memory a block, sm90 (H100, H200) has 227 KiB: "
        "lower stages (now 2) or v_tile (now 64) or chunk_size (now 16) in the schedule",
    ):
        kernel.check_shared(JOB, SM90, 299 * 1024, 1024)


def test_too_many_threads():
    with raises(
        ScheduleError,
        "toy_scan has 1152 threads a block (its producer warps included), a GPU takes 1024: "
        "lower the tile sizes in the schedule",
    ):
        kernel.check_threads(JOB, SimpleNamespace(threads=("1152", "1", "1")))


def test_parameters_that_the_plan_does_not_pass():
    lowered = SimpleNamespace(arguments=[Tensor("w", "float32", ("B",)), Scalar("every", "int32")])
    taken = "toy_scan: the generated module takes a tensor of float32, int32 by value, but the launch plan passes "
    with raises(ToolchainError, f"{taken}a tensor of bfloat16, a tensor of "):
        kernel._check_arguments(JOB, lowered)


@pytest.mark.nvcc
def test_the_checks_reach_the_user_through_the_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path))
    with raises(ScheduleError, "toy_scan needs 256.0 KiB of shared memory a block, sm90 (H100, H200) has 227 KiB"):
        builder.build([toy.toy(stages=128)], tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.nvcc
def test_nvcc_and_tilelang_fail_in_the_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path))
    outside = toy.PREPARE.replace("T.exp(", 'T.call_extern("float32", "no_such_function", ')
    with pytest.raises(
        ToolchainError, match=r"nvcc .* failed on toy_prepare.cu for sm_90a: .*no_such_function.*full log"
    ):
        builder.build([toy.toy(prepare=outside)], tmp_path / "out", jobs=1)
    with raises(ToolchainError, "tracing toy_scan in"):
        builder.build([toy.toy(scan=toy.SCAN)], tmp_path / "out", jobs=2)  # STAGES is no name


def test_a_worker_that_dies(tmp_path, monkeypatch):
    worker = pool.Worker(tmp_path)
    worker.end()
    with raises(ToolchainError, "the process that compiled toy_scan died with exit status -9: if memory ran out, try"):
        worker.run("k", JOB, print)


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dataclasses.py").write_text("raise ImportError('no dataclasses here')")
    worker = pool.Worker(tmp_path)
    with raises(ToolchainError, "died with exit status 1 (ImportError: no dataclasses here): if memory ran out"):
        worker.run("k", job_of(toy.toy().kernels[0], toy.toy()), lambda *_: None)


def test_a_bug_in_a_worker_is_called_one(tmp_path, monkeypatch):
    from kdagen.build import worker

    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(worker, "compile_kernel", broken)
    request, answers = json.dumps({"key": "k", "job": pool.job_fields(JOB)}), []
    worker.serve(worker.Cache(tmp_path), [request], lambda **answer: answers.append(answer))
    assert answers[0]["error"] == "ToolchainError"
    assert answers[0]["message"] == "toy_scan: ZeroDivisionError: division by zero (a bug in kdagen)"


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A variant as a build leaves it, but that its libraries are no libraries."""
    source = toy.toy()
    place = tmp_path / "toy" / manifest.variant(source.plan())
    place.mkdir(parents=True)
    for k in source.kernels:
        (place / f"{k.name}.so").write_text(k.name)
    manifest.write(
        place,
        {
            "digest": manifest.digest(source),
            "host": platform.machine(),
            "target": {"name": "sm90", "runs_on": ["9.0"]},
            "plan": source.plan(),
            "kernels": [{"name": k.name, "library": f"{k.name}.so"} for k in source.kernels],
        },
    )
    return place


def test_no_manifest(tmp_path):
    with raises(ArtefactError, "manifest.json is missing, so"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with raises(ArtefactError, "manifest.json is not a manifest of kdagen (damaged?): rebuild it with `kdagen build`"):
        manifest.read(folder)


def test_a_manifest_of_another_kdagen(folder):
    contents = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**contents, "format": 99}))
    with raises(ArtefactError, "has format 99, this kdagen reads format 1: rebuild it with `kdagen build`"):
        manifest.read(folder)


def test_a_corrupt_library_is_refused_before_it_is_opened(folder):
    (folder / "toy_scan.so").write_text("toy_scam")
    with pytest.raises(ArtefactError, match="toy_scan.so is corrupt or was edited: its sha256 is .*: rebuild it with"):
        loader.load_op(folder)


def test_a_missing_library(folder):
    (folder / "toy_scan.so").unlink()
    with raises(
        ArtefactError, "toy_scan.so is missing although manifest.json lists it: rebuild it with `kdagen build`"
    ):
        loader.load_op(folder)


def test_a_library_that_is_none(folder):
    with pytest.raises(ArtefactError, match=r"toy_index.so does not load here: .*: build it on a host like this one"):
        loader.load_op(folder).functions()


def test_a_library_for_another_host(folder, monkeypatch):
    monkeypatch.setattr(loader.platform, "machine", lambda: "riscv64")
    with pytest.raises(
        ArtefactError, match="toy_index.so was built for .* hosts, this one is riscv64: build it on such"
    ):
        loader.load_op(folder).functions()


def test_an_op_without_kernels(tmp_path):
    with raises(ArtefactError, "gone holds no built kernels: rebuild it with `kdagen build --op gone`"):
        BuiltOp(tmp_path / "gone").variants  # noqa: B018 (the property reads the folder)


def test_a_plan_with_a_size_that_is_no_size():
    with raises(ArtefactError, "cannot read the size 'max(B, 2)' of a launch plan"):
        layout.evaluate("max(B, 2)", {"B": 1})


# -- calls ------------------------------------------------------------------------------------------------------------


def tensors(dtype=torch.bfloat16) -> dict:
    return {"x": torch.zeros(1, 5, 1, 64, dtype=dtype), "g": torch.zeros(1, 5, 1)}


def test_no_variant_fits(folder):
    op, name = BuiltOp(folder.parent), "sm90-bf16-64x64-g.fp32"
    fix = "): build some with `kdagen build --op toy`"
    with raises(ArgumentError, f"no kernels of toy fit ({name}: for compute capability 9.0, the GPU has 8.0{fix}"):
        op.fitting(tensors(), "8.0")
    with raises(ArgumentError, f"({name}: x is float16, expected bfloat16{fix}"):
        op.fitting(tensors(torch.float16), "9.0")
    with raises(ArgumentError, f"({name}: x has shape [1, 5, 1, 32], expected [B, T, H, 64]{fix}"):
        op.fitting({**tensors(), "x": torch.zeros(1, 5, 1, 32, dtype=torch.bfloat16)}, "9.0")


def test_a_rank_that_is_wrong(folder):
    with raises(ArgumentError, "g has 2 dimensions, expected [B, T, HV]"):
        loader.load_op(folder).launch({**tensors(), "g": torch.zeros(1, 5)})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("toy: g has shape [1]\nstack"), ArgumentError),
        (TypeError("toy: takes 3 tensors"), ArgumentError),
        (RuntimeError("toy: cuLaunchKernel failed with CUDA_ERROR (x)\nstack"), LaunchError),
    ],
)
def test_a_launcher_s_error_is_one_of_ours_and_one_line(raised, expected):
    def function(*_):
        raise raised

    with pytest.raises(expected) as error:
        LoadedOp._run(function, [])
    assert str(error.value) == str(raised).splitlines()[0]


# -- the command ------------------------------------------------------------------------------------------------------

COMMANDS = {
    "arch": (["--arch", "sm75"], "error: unknown arch 'sm75': expected one of sm80"),
    "head dim": (["--arch", "sm90", "--head-dim", "1,2,3"], "error: --head-dim 1,2,3: expected K or K,V, such as 128"),
    "schedule": (["--arch", "sm90", "--schedule", "chunk"], "error: --schedule chunk: expected field=value, such as"),
    "op": (["--arch", "sm90", "--op", "nothing"], "error: no recurrence 'nothing'"),
    "file": (["--arch", "sm90", "--op", "none.py:x"], "error: 'none.py:x': there is no file none.py"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_prints_one_line_and_exits_with_1(case, monkeypatch):
    monkeypatch.delenv("KDAGEN_DEBUG", raising=False)
    options, message = COMMANDS[case]
    result = CliRunner().invoke(cli.main, ["build", *options])
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert result.output.startswith(message)


def test_the_command_shows_the_trace_when_debugging(monkeypatch):
    monkeypatch.setenv("KDAGEN_DEBUG", "1")
    result = CliRunner().invoke(cli.main, ["build", "--arch", "sm75"])
    assert type(result.exception).__name__ == "TargetError"


def test_somebody_else_s_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with raises(ArtefactError, "is not empty and was not made by kdagen"):
        builder.build([toy.toy()], tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert sys.modules["kdagen.build.builder"] is builder
