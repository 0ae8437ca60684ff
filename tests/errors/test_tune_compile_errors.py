"""Each message of the tuner's compile stage, and of what compiles for it."""

import re
import sys
import time

import pytest
import toy
from fake_compiler import Bench, Compiler, candidate
from kdagen.autotune import compile
from kdagen.autotune.compile import compile_candidates, load
from kdagen.autotune.sweep import Task

from kdagen.build import pool, toolchain
from kdagen.build.kernel import job_of
from kdagen.errors import ArtefactError, RecurrenceError, ScheduleError, ToolchainError

ONE, SOURCE_OF = candidate(), compile.source_of
JOB = job_of(toy.toy().kernels[2], toy.toy())
FIX = "compile it again with `kdagen tune compile`"


def raises(error, message: str):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path)
    bench.run([ONE])
    return bench


# -- what was compiled ------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_not_compiled(bench):
    path = bench.folder.candidates / f"{candidate(stages=9).id}.json"
    with raises(ArtefactError, f"{path} is missing, so {candidate(stages=9).id} is not compiled: {FIX}"):
        load(bench.folder, candidate(stages=9).id)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"format": 99, "files": {}}', '{"format": 1}', '{"format": 1, "files": 3}']
)
def test_a_manifest_that_is_damaged(bench, text):
    path = bench.folder.candidates / f"{ONE.id}.json"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=rf"{path} is damaged(, or of another version of kdagen)?: {FIX}"):
        load(bench.folder, ONE.id)


def library(bench):
    found = load(bench.folder, ONE.id)
    return found.folder / found.manifest["kernels"][1]["library"]


def test_a_byte_that_flipped(bench):
    path = library(bench)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(
        ArtefactError, match=rf"is corrupt or was edited: its sha256 is .*, {ONE.id}.json says .*: {re.escape(FIX)}"
    ):
        load(bench.folder, ONE.id)


def test_a_library_that_was_left_behind(bench):
    path = library(bench)
    path.unlink()
    with raises(ArtefactError, f"{path} is missing although {ONE.id}.json lists it: {FIX}"):
        load(bench.folder, ONE.id)


# -- compiling --------------------------------------------------------------------------------------------------------


def test_no_compiler_is_said_before_anything_is_logged(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path)

    def missing():
        raise ToolchainError(toolchain.NO_NVCC)

    monkeypatch.setattr(toolchain, "check", missing)
    with raises(ToolchainError, "no nvcc found; kdagen compiles kernels with CUDA 13"):
        bench.run([ONE], Compiler())
    assert list(bench.folder.log) == []


def test_the_check_finds_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(toolchain, "find_cc", lambda: ["cc"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with raises(ToolchainError, "no C++ compiler found"):
        toolchain.check()


def test_an_op_that_is_nowhere_ends_it_all(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, (Task("none.py:op", "inference", "sm90", "H100"),))
    monkeypatch.setattr(compile, "source_of", SOURCE_OF)
    with raises(RecurrenceError, "'none.py:op': there is no file none.py"):
        bench.run([candidate(bench.folder.sweep.studies[0].task)])


def test_another_sweep_works_in_the_folder(bench):
    with bench.folder.lock(), raises(ArtefactError, "another `kdagen tune` works in"):
        compile_candidates(bench.folder, None, None, bench.said, todo=lambda *_: [ONE])


# -- workers ----------------------------------------------------------------------------------------------------------


def worker_that(monkeypatch, tmp_path, commands: str) -> None:
    """Worker processes are this shell script."""
    script = tmp_path / "worker"
    script.write_text(f"#!/bin/sh\n{commands}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def outcomes(tmp_path, jobs: int = 1, timeout: float | None = None) -> dict:
    """The error of each job, or None."""
    waiting = iter([(f"k{i}", JOB) for i in range(jobs)])
    events = pool.compile_each(lambda: next(waiting, None), tmp_path, 2, timeout)
    return {e.key: e.error for e in events if e.last}


def test_a_kernel_that_takes_too_long(monkeypatch, tmp_path):
    worker_that(monkeypatch, tmp_path, """read job; echo '{"stage": "nvcc"}'; sleep 60""")
    started = time.monotonic()
    (error,) = outcomes(tmp_path, timeout=0.5).values()
    assert (str(error), error.death) == ("toy_scan was not compiled within 0.5 s, and was given up", "hang")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("end", "death", "message"),
    [
        ("kill -9 $$", "out of memory", "died with exit status -9: if memory ran out, try fewer jobs (--jobs 1)"),
        ("echo torn >&2; exit 3", "crash", "died with exit status 3 (torn): if memory ran out"),
    ],
)
def test_a_worker_that_dies_amid_a_kernel_is_replaced(monkeypatch, tmp_path, end, death, message):
    worker_that(monkeypatch, tmp_path, f"""echo >> {tmp_path}/starts; read job; echo '{{"stage": "nvcc"}}'; {end}""")
    found = outcomes(tmp_path, jobs=3)
    assert (tmp_path / "starts").read_text() == 3 * "\n"
    assert len(found) == 3 and {e.death for e in found.values()} == {death}
    assert all(f"the process that compiled toy_scan {message}" in str(e) for e in found.values())


def test_workers_work_side_by_side(monkeypatch, tmp_path):
    """Each waits for the other."""
    met = tmp_path / "met"
    met.mkdir()
    wait = f"for i in $(seq 99); do [ $(ls {met} | wc -l) -ge 2 ] && break; sleep 0.1; done; [ $i -lt 99 ]"
    worker_that(monkeypatch, tmp_path, f"""read job; : > {met}/$$; {wait} || exit 1; echo '{{"cached": true}}'""")
    assert outcomes(tmp_path, jobs=2) == {"k0": None, "k1": None}


def test_a_worker_that_cannot_start_ends_it_all(monkeypatch, tmp_path):
    worker_that(monkeypatch, tmp_path, "echo 'no such module' >&2; exit 1")
    with raises(ToolchainError, "the process that compiled toy_scan died with exit status 1 (no such module)"):
        outcomes(tmp_path, jobs=3)


def test_what_a_worker_says_of_a_kernel_is_that_kernel_s_alone(monkeypatch, tmp_path):
    refused = '{"error": "ScheduleError", "message": "toy_scan has 2048 threads", "trace": "", "death": ""}'
    died = '{"error": "ToolchainError", "message": "nvcc died", "trace": "", "death": "out of memory"}'
    answer = """echo '{"stage": "lowering"}'; echo '%s'"""
    worker_that(
        monkeypatch,
        tmp_path,
        f"read job; {answer % refused}\nread job; {answer % died}\nread job; echo '{{\"cached\": true}}'",
    )
    waiting = iter([(f"k{i}", JOB) for i in range(3)])
    events = [e for e in pool.compile_each(lambda: next(waiting, None), tmp_path, 1) if e.last]
    refused, died, done = events
    assert type(refused.error) is ScheduleError and str(refused.error) == "toy_scan has 2048 threads"
    assert type(died.error) is toolchain.Died and died.error.death == "out of memory"
    assert (done.stage, done.error) == ("done", None)


def test_a_part_of_nvcc_that_was_killed(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho \"nvcc error   : 'cicc' died due to signal 9 (Kill signal)\" >&2\nexit 9\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: toolchain.Nvcc(str(nvcc), "13.0.88", "PATH"))
    monkeypatch.setattr(toolchain, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(toolchain, "tilelang_includes", list)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "x.cu").write_text("source")
    with raises(toolchain.Died, "nvcc 13.0.88 failed on x.cu for sm_90a: nvcc error   : 'cicc' died due to") as found:
        toolchain.compile_cubin(tmp_path / "x.cu", "sm_90a")
    assert found.value.death == "out of memory"


def test_memory_that_runs_out_in_a_worker(monkeypatch, tmp_path):
    import json

    from kdagen.build import worker

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(worker, "compile_kernel", full)
    request, answers = json.dumps({"key": "k", "job": pool.job_fields(JOB)}), []
    worker.serve(worker.Cache(tmp_path), [request], lambda **answer: answers.append(answer))
    assert answers[0]["death"] == "out of memory"
