"""Candidates through a compiler that compiles nothing: what the log is told, what is shared, what a second run does."""

import itertools
import time

import pytest
from fake_compiler import LAUNCH, TASK, Bench, Compiler, Said, candidate, source_of
from kdagen.autotune.climb import objection
from kdagen.autotune.compile import KERNEL_SECONDS, compile_candidates, load
from kdagen.autotune.folder import Folder
from kdagen.autotune.sweep import Study, Sweep, Task, Workload

from kdagen.build.toolchain import Died
from kdagen.errors import ScheduleError, ToolchainError
from kdagen.runtime import manifest

KEPT = ["lowered kept", "ptxas kept", "identical kept"]
DEFAULT, STAGES, TILE, CHUNK = candidate(), candidate(stages=3), candidate(v_tile=128), candidate(chunk_size=32)
ALL = [DEFAULT, STAGES, TILE, CHUNK]
SCAN = "scan: 16 tokens, tile 64, 3 stages"  # that of STAGES alone
PREPARE = "prepare for (128, 128): 16 tokens"  # that of all but CHUNK


@pytest.fixture
def bench(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path)
    bench.planned(*ALL)
    return bench


def lines(bench, wanted) -> dict:
    return {line["rung"]: line for line in bench.lines(wanted)}


def test_each_candidate_has_a_line_on_each_rung(bench):
    compiler = bench.run(ALL)
    assert all(bench.verdicts(c) == KEPT for c in ALL)
    assert (compiler.workers, compiler.timeout) == (2, KERNEL_SECONDS)
    lowered, ptxas, identical = lines(bench, DEFAULT).values()
    launch = {"shared_bytes": LAUNCH["shared_bytes"], "threads": 128, "grid": LAUNCH["grid"]}
    assert lowered["kernels"] == dict.fromkeys(("toy_index", "toy_prepare", "toy_scan"), launch)
    assert ptxas["kernels"]["toy_scan"] == {"registers": 168, "spills": 0, "warnings": [], "seconds": 1.5}
    assert identical["kernels_hash"] == manifest.digest(source_of(DEFAULT))
    assert bench.said.stages == [("compile", 4)] and bench.said.notes == []
    assert [v for v in bench.folder.log if v["rung"] != "model"] == bench.said.lines


def test_kernels_are_compiled_once_in_the_search_s_order_the_longest_of_a_candidate_first(bench):
    texts = [k.text for c in ALL for k in sorted(source_of(c).kernels, key=lambda k: -len(k.text))]
    assert bench.run(ALL, jobs=1).compiled == list(dict.fromkeys(texts))
    assert len(set(texts)) == 7 < len(texts)
    kernels = [f.name for f in bench.folder.kernels.iterdir()]
    assert len(kernels) == 7 and all(len(name) == 40 for name in kernels)
    assert sorted(p.stem for p in bench.folder.candidates.iterdir()) == sorted(c.id for c in ALL)


def test_a_second_run_does_nothing(bench):
    bench.run(ALL)
    assert bench.run(ALL).compiled == [] and bench.said.lines == bench.said.stages == []


def test_a_kept_candidate_is_loaded_from_the_folder(bench):
    bench.run(ALL)
    found = load(bench.folder, STAGES.id)
    assert found.plan["schedule"] == STAGES.schedule.fields()
    assert found.folder == bench.folder.kernels
    libraries = [found.folder / k["library"] for k in found.manifest["kernels"]]
    assert libraries[2].read_text() == SCAN and {p.name for p in libraries[2].parent.iterdir()} == {
        "toy_scan.so",
        "report.json",
    }
    assert (
        libraries[1].parent
        == (bench.folder.kernels / load(bench.folder, TILE.id).manifest["kernels"][1]["library"]).parent
    )


def test_what_the_gpu_does_not_take_is_decided_before_nvcc(bench):
    too_much = ScheduleError("toy_scan needs 300.0 KiB of shared memory a block")
    compiler = bench.run(ALL, Compiler({SCAN: too_much}))
    (line,) = bench.lines(STAGES)
    assert (line["rung"], line["verdict"], line["reason"]) == ("lowered", "rejected", str(too_much))
    assert line["kernel"] == "toy_scan" and line["kernels"]["toy_scan"]["shared_bytes"] == LAUNCH["shared_bytes"]
    assert all(bench.verdicts(c) == KEPT for c in (DEFAULT, TILE, CHUNK))
    assert compiler.compiled.count(SCAN) == 1
    twin = candidate(stages=3, prepare_threads=128)  # has the same scan
    assert bench.run([*ALL, twin]).compiled == []
    assert bench.verdicts(twin) == ["lowered rejected"] and bench.lines(twin)[0]["reason"] == str(too_much)


def test_the_other_kernels_of_what_is_rejected_are_not_compiled(bench):
    wanted = candidate(chunk_size=64, stages=3)
    compiler = bench.run([wanted], Compiler({"prepare for (128, 128): 64": ScheduleError("too many threads")}), jobs=1)
    assert len(compiler.compiled) == 2 and not any("scan" in text for text in compiler.compiled)


def test_a_schedule_that_the_compiler_refuses_is_rejected(bench, monkeypatch):
    def refused(wanted):
        if wanted == TILE:
            raise ScheduleError("v_tile 128: too wide")
        if wanted == STAGES:
            raise ZeroDivisionError("division by zero")
        return source_of(wanted)

    monkeypatch.setattr("kdagen.autotune.compile.source_of", refused)
    bench.run(ALL)
    assert bench.verdicts(TILE) == ["lowered rejected"] and bench.lines(TILE)[0]["reason"] == "v_tile 128: too wide"
    (line,) = bench.lines(STAGES)
    assert line["verdict"] == "failed"
    assert line["reason"] == "no source: ZeroDivisionError: division by zero (a bug in kdagen)"
    assert bench.verdicts(CHUNK) == KEPT


def test_nvcc_s_failure_is_that_of_all_who_share_the_kernel_and_is_remembered(bench):
    bench.run(ALL, Compiler({PREPARE: ToolchainError("nvcc failed on toy_prepare.cu")}, late=True))
    assert [bench.verdicts(c)[-1] for c in ALL] == ["ptxas failed"] * 3 + ["identical kept"]
    assert bench.lines(DEFAULT)[-1]["kernel"] == "toy_prepare"
    assert bench.run(ALL).compiled == []


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"spill_stores": 8, "spill_loads": 12}, "toy_scan spills 20 bytes of registers, the default's 0"),
        ({"warnings": ["ptxas info : (C7512) serialized"]}, "ptxas makes the products of toy_scan wait for each other"),
    ],
)
def test_spills_and_serialised_products_are_rejected(bench, report, reason):
    bench.run(ALL, Compiler({SCAN: report}))
    assert bench.verdicts(STAGES) == ["lowered kept", "ptxas rejected"]
    assert bench.lines(STAGES)[-1]["reason"].startswith(reason)
    assert not (bench.folder.candidates / f"{STAGES.id}.json").exists()
    assert bench.verdicts(TILE) == KEPT


def test_what_the_default_does_too_is_no_reason():
    found = {"scan": {"spills": 20, "warnings": ["(C7512)"]}, "prepare": {"spills": 4, "warnings": ["(C7517)"]}}
    usual = {"scan": {"spills": 24, "warnings": ["(C7512)"]}, "prepare": {"spills": 0, "warnings": []}}
    assert objection(found, usual) == "prepare spills 4 bytes of registers, the default's 0"
    assert objection({"scan": found["scan"]}, usual) == ""
    assert objection({"other": found["scan"]}, usual) == "other spills 20 bytes of registers, the default's 0"


def test_the_default_is_kept_though_it_spills_and_others_are_held_to_it(bench):
    spilling = {"scan: 16": {"spill_stores": 8, "spill_loads": 8}, "scan: 32": {"spill_stores": 32}}
    bench.run(ALL, Compiler(spilling, backwards=True))
    assert [bench.verdicts(c)[-1] for c in ALL] == ["identical kept"] * 3 + ["ptxas rejected"]
    more = candidate(chunk_size=64)  # in a later run, the default's figures are those of the log
    bench.run([*ALL, more], Compiler({"scan: 64": {"spill_loads": 16}}))
    assert bench.verdicts(more) == KEPT


@pytest.mark.parametrize("backwards", [False, True])
def test_of_candidates_with_one_machine_code_the_first_wins(bench, backwards):
    same = {"scan: 16 tokens, tile 64": {"library": b"same"}, "scan: 16 tokens, tile 128": {"library": b"same"}}
    bench.run(ALL, Compiler(same, backwards=backwards), jobs=8)
    assert [bench.verdicts(c)[-1] for c in ALL] == [
        "identical kept", "identical rejected", "identical rejected", "identical kept",
    ]  # fmt: skip
    assert bench.lines(TILE)[-1]["same_as"] == DEFAULT.id
    again = candidate(stages=1)
    bench.run([*ALL, again], Compiler({"1 stages": {"library": b"same"}}))
    assert bench.lines(again)[-1]["same_as"] == DEFAULT.id


def test_each_candidate_waits_for_those_before_it(bench):
    bench.run([DEFAULT])
    same = {SCAN: {"library": b"same"}, "tile 128": {"library": b"same"}}
    bench.run(ALL, Compiler(same, backwards=True))
    assert bench.verdicts(STAGES) == KEPT and bench.lines(TILE)[-1]["same_as"] == STAGES.id


def test_the_default_is_kept_though_another_came_first(bench):
    same = {"scan": {"library": b"same"}}
    bench.run([STAGES], Compiler(same))
    bench.run(ALL, Compiler(same))
    assert bench.verdicts(DEFAULT) == bench.verdicts(STAGES) == KEPT
    assert bench.verdicts(TILE)[-1] == "identical rejected"


def test_candidates_with_equal_kernels_but_another_launch_are_two(bench):
    bench.run(ALL, Compiler({"prepare": {"library": b"same"}, "scan": {"library": b"same"}}))
    assert bench.verdicts(TILE)[-1] == "identical rejected"
    assert bench.verdicts(CHUNK) == KEPT  # its plan has chunks of another size


@pytest.mark.parametrize("death", ["out of memory", "hang", "crash"])
def test_a_death_is_that_of_one_candidate_and_the_next_tries_again(bench, death):
    compiler = bench.run(ALL, Compiler({PREPARE: [Died("died", death)]}), jobs=1)
    (line,) = bench.lines(DEFAULT)
    assert (line["rung"], line["verdict"], line["death"]) == ("lowered", "failed", death)
    assert all(bench.verdicts(c) == KEPT for c in ALL[1:])
    assert sum(PREPARE in text for text in compiler.compiled) == 2
    bench.run(ALL)  # the kernel went well meanwhile
    assert bench.verdicts(DEFAULT) == ["lowered failed", *KEPT]


def test_a_kernel_that_dies_three_times_is_given_up(bench):
    others = [candidate(stages=n) for n in (1, 4)]
    bench.planned(*others)
    dies = Compiler({PREPARE: Died("died", "hang")}, late=True)
    bench.run([*ALL, *others], dies, jobs=1)
    assert sum(PREPARE in text for text in dies.compiled) == 3
    assert [("death" in bench.lines(c)[-1]) for c in (DEFAULT, STAGES, TILE, *others)] == [True] * 3 + [False] * 2
    assert all(bench.verdicts(c)[-1] == "ptxas failed" for c in (DEFAULT, STAGES, TILE, *others))
    assert bench.verdicts(CHUNK) == KEPT
    assert bench.run([*ALL, *others]).compiled == []  # so are those who may be tried again: their kernel may not


def test_deaths_of_a_kernel_in_several_runs_are_added_up(bench):
    others = [candidate(stages=9), candidate(stages=10)]
    for wanted in ([DEFAULT], [STAGES], [TILE, others[0]]):
        dies = bench.run(wanted, Compiler({PREPARE: Died("died", "hang")}, late=True), jobs=1)
        assert sum(PREPARE in text for text in dies.compiled) == 1
    assert bench.run([others[1]]).compiled == []
    assert bench.verdicts(others[0]) == bench.verdicts(others[1]) == ["ptxas failed"]


def test_what_another_build_got_compiled_is_taken(bench, monkeypatch, tmp_path):
    bench.run(ALL, Compiler({PREPARE: ToolchainError("nvcc failed")}, late=True))
    other = Bench(monkeypatch, tmp_path / "other")
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    other.run(ALL)
    more = candidate(stages=9)
    bench.run([more])
    assert bench.verdicts(more) == KEPT


def test_a_candidate_that_dies_in_three_runs_is_quarantined(bench):
    for _ in range(3):
        assert bench.run([STAGES], Compiler({SCAN: Died("died", "hang")})).compiled[-1] == SCAN
    assert bench.run([STAGES]).compiled == []
    assert len([v for v in bench.lines(STAGES) if "death" in v]) == 3


def test_no_kernel_is_begun_after_the_deadline(bench, monkeypatch):
    assert bench.run(ALL, deadline=time.monotonic()).compiled == []
    assert bench.said.notes == ["4 of 4 candidates are left for another `kdagen tune compile`"]
    clock = itertools.count()
    monkeypatch.setattr("kdagen.autotune.compile.time.monotonic", lambda: next(clock))
    compiler = bench.run(ALL, deadline=5, jobs=1)
    assert len(compiler.compiled) == 5
    assert bench.verdicts(DEFAULT) == bench.verdicts(STAGES) == KEPT  # whole ones, rather than parts of all
    assert bench.verdicts(CHUNK) == []
    monkeypatch.undo()


def test_a_run_that_was_killed_goes_on(monkeypatch, tmp_path):
    """After each number of lines, with a cache and without: the end is the same, and no line comes twice."""
    outcomes = lambda: {"tile 128": {"library": SCAN.encode()}, SCAN: {"library": SCAN.encode()}}  # noqa: E731
    whole = Bench(monkeypatch, tmp_path / "whole")
    whole.planned(*ALL)
    whole.run(ALL, Compiler(outcomes()))
    log = whole.folder.log.path.read_text().splitlines(keepends=True)
    untimed = lambda folder: [{n: v for n, v in line.items() if n != "at"} for line in folder.log]  # noqa: E731
    wanted = sorted(map(str, untimed(whole.folder)))
    for kept in range(4, len(log)):
        other = Bench(monkeypatch, tmp_path / str(kept))
        other.folder.log.path.write_text("".join(log[:kept]) + log[kept][:9])
        other.run(ALL, Compiler(outcomes()))
        assert sorted(map(str, untimed(other.folder))) == wanted


def test_what_is_damaged_in_the_folder_is_put_there_again(bench, monkeypatch):
    bench.run(ALL)
    found = load(bench.folder, STAGES.id)
    (found.folder / found.manifest["kernels"][2]["library"]).write_bytes(b"half")
    (bench.folder.candidates / f"{TILE.id}.json").unlink()
    before = len(list(bench.folder.log))
    assert bench.run(ALL).compiled == []
    assert load(bench.folder, STAGES.id) and load(bench.folder, TILE.id)
    bench.fresh_cache(monkeypatch, "another cache")
    (bench.folder.candidates / f"{TILE.id}.json").unlink()
    assert len(bench.run(ALL).compiled) == 3
    assert load(bench.folder, TILE.id) and len(list(bench.folder.log)) == before


def test_what_is_compiled_anew_and_otherwise_is_said(bench, monkeypatch):
    bench.run(ALL)
    bench.fresh_cache(monkeypatch, "another cache")
    (bench.folder.candidates / f"{TILE.id}.json").unlink()
    bench.run(ALL, Compiler({"tile 128": {"library": b"of another nvcc"}}))
    assert bench.verdicts(TILE) == [*KEPT, "identical kept"]
    first, second = (line["binary"] for line in bench.lines(TILE) if line["rung"] == "identical")
    assert first != second


def test_studies_take_turns_and_share_kernels(monkeypatch, tmp_path):
    others = Task("kda", "inference", "sm90", "H200")
    bench = Bench(monkeypatch, tmp_path, (TASK, others))
    both = [candidate(t, **f) for t in (TASK, others) for f in ({}, {"stages": 3})]
    bench.planned(*both)
    compiler = bench.run(both, jobs=1)
    assert len(compiler.compiled) == 4 and all(bench.verdicts(c) == KEPT for c in both)
    assert [v["candidate"] for v in bench.said.lines if v["rung"] == "lowered"] == [both[i].id for i in (0, 2, 1, 3)]


def test_a_target_without_a_compiler_ends_at_ptxas(monkeypatch, tmp_path):
    task = Task("kda", "inference", "gfx942", "MI300X")
    bench = Bench(monkeypatch, tmp_path, (task,))
    wanted = candidate(task)
    bench.run([wanted], Compiler({"scan": {"library": None}}))
    assert bench.verdicts(wanted)[-1] == "ptxas rejected"
    assert bench.lines(wanted)[-1]["reason"] == "kdagen makes no machine code for gfx942"


def test_a_sweep_of_the_cpu_needs_no_compiler(tmp_path, monkeypatch):
    task = Task("kda", "inference", "cpu", "cpu")
    folder = Folder.create(tmp_path / "f", Sweep((Study(task, (Workload.parse("1x64x1"),)),)))
    monkeypatch.setenv("PATH", "")
    said = Said()
    compile_candidates(folder, None, None, said, todo=lambda *_: pytest.fail("asked"))
    assert said.stages == []
