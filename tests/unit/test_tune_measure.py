"""What measure does with candidates, on recordings that misbehave as devices do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kdagen.autotune.bench import Limits
from kdagen.autotune.measure import measure
from kdagen.autotune.progress import Silent
from kdagen.autotune.sweep import Study, Workload
from kdagen.autotune.timing import Interval, winner
from recordings import (
    BEST,
    CANDIDATES,
    CLOSE,
    DEFAULT,
    MIDDLE,
    MS,
    OTHER,
    SHAPE,
    SLOW,
    TASK,
    WRONG,
    faulty,
    planned,
    recording,
    todo,
)

ALWAYS = range(1, 100)
QUICK = Limits(hang_s=30, patience_s=10, final_s=0.05)
HASTY = Limits(hang_s=30, patience_s=1, final_s=0.05)


class Notes(Silent):
    def __init__(self):
        self.notes, self.lines = [], []

    def __call__(self, line):
        self.lines.append(line)

    def note(self, text):
        self.notes.append(text)


def run(folder, *devices, deadline=None, limits=QUICK, **options) -> Notes:
    say = Notes()
    measure(folder, list(devices), deadline, say, limits=limits, todo=todo, **options)
    return say


def found(folder, rung, candidate=None, workload=None) -> list[dict]:
    return [
        line
        for line in folder.log
        if line["rung"] == rung
        and (candidate is None or line["candidate"] == candidate.id)
        and (workload is None or line["workload"] == str(workload))
    ]


@pytest.fixture
def device(tmp_path):
    return recording(tmp_path / "recorded.jsonl")


@pytest.fixture
def folder(tmp_path):
    return planned(tmp_path / "sweep")


def test_each_candidate_is_checked_then_screened_then_the_best_race(folder, device):
    say = run(folder, device)
    assert [x["candidate"] for x in found(folder, "correct")] == [c.id for c in CANDIDATES]
    assert {x["candidate"] for x in found(folder, "screen")} == {c.id for c in CANDIDATES if c != WRONG}
    finals = found(folder, "final")
    assert [x["candidate"] for x in finals][0] == DEFAULT.id and len({x["race"] for x in finals}) == 1
    assert {x["candidate"] for x in finals} == {c.id for c in (DEFAULT, BEST, CLOSE, MIDDLE)}
    assert all(x["low"] <= x["median"] <= x["high"] and x["among"] == len(finals) for x in finals)
    best = next(x for x in finals if x["candidate"] == BEST.id)
    assert best["median"] == pytest.approx(0.8, rel=0.01) and best["calls"] > 6
    assert best["state"]["before"] == {"clocks": {"sm": 1755}} and best["on"] == device
    measured = [x for x in folder.log if x["rung"] in ("correct", "screen", "final")]
    assert say.lines == measured and not say.notes


def test_a_measured_line_says_under_what(folder, device):
    run(folder, device)
    facts = {"kernels": "code", "device": "A made-up GPU", "processors": 132, "versions": {"cuda": "13.0"}}
    task = {"policy": "device cold", "dtype": "bfloat16", "head_dim": [128, 128]}
    assert found(folder, "correct", DEFAULT)[0]["under"] == facts | task
    shape = {"ratio": 1, "bucket": SHAPE.bucket}
    for rung in ("screen", "final"):
        assert found(folder, rung, DEFAULT)[0]["under"] == facts | task | shape


def test_a_fast_wrong_candidate_is_a_failure_and_never_timed(folder, device):
    run(folder, device)
    (line,) = found(folder, "correct", WRONG)
    assert (line["verdict"], line["errors"]) == ("failed", {"output": [0.31, 0.005]})
    assert line["reason"] == "output is 0.31 from the recurrence" and "death" not in line
    assert not found(folder, "screen", WRONG) and not found(folder, "final", WRONG)


def test_screening_stops_early_what_is_far_from_the_best(folder, device):
    run(folder, device)
    (slow,), (close,) = found(folder, "screen", SLOW), found(folder, "screen", CLOSE)
    assert slow["verdict"] == "rejected" and slow["stopped"] and slow["calls"] < close["calls"]
    assert slow["reason"].endswith("x the best, more than 1.25x") and slow["ms"] == pytest.approx(3, rel=0.05)


def test_what_is_in_the_log_is_not_measured_again(folder, device):
    run(folder, device)
    before = list(folder.log)
    assert run(folder, device).lines == [] and list(folder.log) == before


def test_what_was_measured_under_something_else_is_measured_again(tmp_path, folder, device):
    run(folder, device)
    before = len(list(folder.log))
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "recorded.jsonl").read_text().replace('"13.0"', '"13.1"'))
    run(folder, f"replay:{other}")
    assert len(list(folder.log)) - before == before - len(CANDIDATES)  # but the lines of the model


@pytest.mark.parametrize(
    "death, reason",
    [
        ("crash", "the worker died of SIGKILL, as where the machine's memory runs out"),
        ("hang", "no answer within 1 s"),
        ("out of memory", "asked of a recording"),
        ("device error", "asked of a recording"),
    ],
)
def test_a_death_is_recorded_and_the_sweep_goes_on(tmp_path, folder, device, death, reason):
    spec = faulty(device, tmp_path / "faults", (death, "check", BEST, [1]))
    say = run(folder, spec, limits=HASTY if death == "hang" else QUICK)
    first, second = found(folder, "correct", BEST)
    assert (first["verdict"], first["death"], first["reason"]) == ("failed", death, f"{death}: {reason}")
    assert second["verdict"] == "kept" and found(folder, "final", BEST)
    assert any("is started again" in note for note in say.notes)
    assert found(folder, "correct")[-1] == second  # after all others


def test_an_exception_of_a_candidate_is_its_own_and_tried_once(tmp_path, folder, device):
    say = run(folder, faulty(device, tmp_path / "faults", ("error", "samplers", BEST, ALWAYS)))
    (line,) = found(folder, "screen", BEST)
    assert (line["verdict"], line["reason"]) == ("failed", "RuntimeError: asked of a recording")
    assert "death" not in line and not say.notes and not found(folder, "final", BEST)


def test_what_was_not_recorded_is_an_error_that_says_so(tmp_path, device):
    folder = planned(tmp_path / "sweep", Study(TASK, (Workload.parse("3x1x32"),)))
    run(folder, device)
    reasons = {x["reason"].split(" ", 1)[1] for x in found(folder, "screen")}
    assert reasons == {f"does not record candidate {c.id} at screen on 3x1x32" for c in CANDIDATES if c != WRONG}


def test_three_deaths_quarantine_a_candidate_over_restarts(tmp_path, folder, device):
    spec = faulty(device, tmp_path / "faults", ("crash", "check", BEST, [1, 2]), ("crash", "sample", BEST, ALWAYS))
    say = run(folder, spec)
    deaths = [x["rung"] for x in folder.log if "death" in x]
    assert deaths == ["correct", "correct", "screen"]
    assert f"candidate {BEST.id} is quarantined after 3 deaths" in say.notes
    assert run(folder, device).lines == []  # although it would run there
    assert not found(folder, "final", BEST)


def test_deaths_of_earlier_runs_count(folder, tmp_path, device):
    for _ in range(2):
        folder.log.append(TASK.name, BEST.id, "ptxas", "failed", "killed", death="crash")
        folder.log.append(TASK.name, BEST.id, "identical", "kept", binary="b", kernels_hash="code")
    run(folder, faulty(device, tmp_path / "faults", ("crash", "check", BEST, ALWAYS)))
    assert len(found(folder, "correct", BEST)) == 1


def test_a_death_in_finals_is_blamed_on_who_ran(tmp_path, folder, device):
    # Screening makes at most 15 calls: a later one is in the finals, where others' calls are in between.
    run(folder, faulty(device, tmp_path / "faults", ("crash", "sample", CLOSE, [20])))
    deaths = [x for x in folder.log if "death" in x]
    assert [(x["candidate"], x["rung"], x["workload"]) for x in deaths] == [(CLOSE.id, "final", str(SHAPE))]
    assert {x["candidate"] for x in found(folder, "final")} == {c.id for c in (DEFAULT, BEST, CLOSE, MIDDLE)}


def test_who_keeps_dying_in_finals_is_out_of_them(tmp_path, folder, device):
    run(folder, faulty(device, tmp_path / "faults", ("device error", "sample", BEST, range(16, 1000))))
    finals = found(folder, "final")
    assert [x["candidate"] for x in finals if "death" in x] == [BEST.id] * 3
    assert {x["candidate"] for x in finals if "death" not in x} == {c.id for c in (DEFAULT, CLOSE, MIDDLE)}


def test_memory_that_runs_out_in_finals_is_no_death(tmp_path, folder, device):
    run(folder, faulty(device, tmp_path / "faults", ("out of memory", "samplers", CLOSE, [2])))
    (line,) = found(folder, "final", CLOSE)
    assert line["verdict"] == "failed" and "death" not in line
    assert line["reason"] == "out of memory: asked of a recording (beside 3 others)"
    assert {x["candidate"] for x in found(folder, "final")} >= {DEFAULT.id, BEST.id, MIDDLE.id}


def test_finals_on_a_slowed_device_are_repeated_once_and_marked(tmp_path, folder, device):
    run(folder, faulty(device, tmp_path / "faults", ("throttle", "samplers", BEST, [2])))
    finals = found(folder, "final")
    assert len(finals) == 4
    assert {x["repeated"] for x in finals} == {"throttled: asked of a recording"}
    assert not any("unsteady" in x for x in finals)


def test_finals_that_stay_unsteady_say_so(tmp_path, folder, device):
    run(folder, faulty(device, tmp_path / "faults", ("throttle", "samplers", BEST, ALWAYS)))
    assert {x["unsteady"] for x in found(folder, "final")} == {"throttled: asked of a recording"}


def test_of_a_tie_in_finals_the_simplest_wins(tmp_path, folder):
    """One that differs from the default in two fields is ahead by less than can be told from one that does in one."""
    run(folder, recording(tmp_path / "recorded.jsonl", MS | {BEST: 0.8, CLOSE: 0.7999}, spread=0.05))
    intervals = {x["candidate"]: Interval(x["median"], x["low"], x["high"], x["calls"]) for x in found(folder, "final")}
    assert intervals[BEST.id].overlaps(intervals[CLOSE.id])

    def changed(name) -> int:
        schedule = next(c.schedule for c in CANDIDATES if c.id == name)
        return sum(x != y for x, y in zip(vars(schedule).values(), vars(DEFAULT.schedule).values()))

    assert winner(intervals, DEFAULT.id, changed) == BEST.id


def test_a_default_that_is_wrong_leaves_the_others_to_race(tmp_path, folder):
    device = recording(tmp_path / "recorded.jsonl", wrong=(DEFAULT,))
    run(folder, device)
    assert not found(folder, "screen", DEFAULT)
    assert {x["candidate"] for x in found(folder, "final")} == {BEST.id, WRONG.id}


class Gpu:
    """A worker whose device runs compiled kernels, which a recording does not; it answers in order."""

    device = "cuda:0"

    def __init__(self, target="sm90", *replies):
        self.replies = [
            {"facts": {"device": "G", "processors": 1, "versions": {"cuda": "13.0"}, "target": target}},
            *replies,
        ]
        self.requests = []

    def ask(self, request, timeout, say):
        self.requests.append(request)
        return self.replies.pop(0)

    def end(self):
        pass


def test_candidates_that_are_not_compiled_are_left_out_with_one_note(tmp_path, folder, device):
    say = run(folder, workers=[Gpu()])
    (note,) = say.notes
    assert note.startswith(
        f"{TASK.name}: 6 candidates are not compiled, or damaged, and left out: `kdagen tune compile --dir "
    )


def test_a_compiled_candidate_is_sent_with_its_manifest(folder):
    folder.candidates.mkdir()
    (folder.candidates / f"{DEFAULT.id}.json").write_text('{"versions": {"tilelang": "0.1.15"}}')
    (folder.candidates / f"{BEST.id}.json").write_text("{")
    gpu = Gpu("sm90", {"ok": False, "reason": "all zero", "errors": {}, "oracle": "the float64 recurrence"})
    (note,) = run(folder, workers=[gpu]).notes
    assert "5 candidates are not compiled, or damaged, and left out" in note
    (sent,) = gpu.requests[1]["contenders"]
    assert (sent["kernels"], sent["manifest"]) == (str(folder.kernels), {"versions": {"tilelang": "0.1.15"}})
    (line,) = found(folder, "correct")
    assert (line["verdict"], line["reason"], line["oracle"]) == ("failed", "all zero", "the float64 recurrence")
    assert line["under"]["versions"] == {"tilelang": "0.1.15", "cuda": "13.0"}


@pytest.mark.parametrize("again", ["", "from 1 ms to 2 ms"])
def test_finals_in_which_the_default_drifts_are_repeated_once(folder, again):
    folder.candidates.mkdir()
    (folder.candidates / f"{DEFAULT.id}.json").write_text("{}")
    right, timed = {"ok": True, "reason": "", "errors": {}}, {"ms": 1.0, "calls": 5, "stopped": False}
    races = [
        {"intervals": {DEFAULT.id: [ms, ms, ms, 9]}, "drift": drift, "state": {}}
        for ms, drift in ((1.5, "from 1 ms to 3 ms"), (1.0, again))
    ]
    run(folder, workers=[Gpu("sm90", right, timed, *races)])
    (line,) = found(folder, "final")
    assert (line["median"], line["repeated"], line.get("unsteady", "")) == (1.0, "from 1 ms to 3 ms", again)


def test_finals_that_break_outside_of_candidates_are_given_up(folder):
    folder.candidates.mkdir()
    (folder.candidates / f"{DEFAULT.id}.json").write_text("{}")
    right, timed = {"ok": True, "reason": "", "errors": {}}, {"ms": 1.0, "calls": 5, "stopped": False}
    broken = {"error": "error", "reason": "no nvidia-smi", "running": None}
    notes = run(folder, workers=[Gpu("sm90", right, timed, *[broken] * 3)]).notes
    assert notes[1:4] == ["cuda:0: finals of 64x1x32 broke outside of any candidate: no nvidia-smi"] * 3
    assert notes[4:] == [f"finals of {TASK.name} 64x1x32 are given up"] and not found(folder, "final")


def test_kernels_that_are_damaged_are_no_failure_of_the_candidate(folder):
    folder.candidates.mkdir()
    (folder.candidates / f"{DEFAULT.id}.json").write_text("{}")
    gpu = Gpu("sm90", {"error": "unreadable", "reason": "kernels/a.so is missing", "running": DEFAULT.id})
    notes = run(folder, workers=[gpu]).notes
    assert notes[1:] == [f"candidate {DEFAULT.id} is left out: kernels/a.so is missing"]
    assert not found(folder, "correct")


def test_a_device_of_another_target_leaves_a_study_alone(folder):
    assert run(folder, workers=[Gpu("sm80")]).notes == [f"{TASK.name} is for sm90: no device that is left runs it"]


def test_what_the_compiler_refused_is_not_run(folder, device):
    folder.log.append(TASK.name, BEST.id, "ptxas", "rejected", "spills 96 bytes")
    folder.log.append(TASK.name, CLOSE.id, "identical", "rejected", "same machine code", same_as=MIDDLE.id)
    run(folder, device)
    assert not found(folder, "correct", BEST) and not found(folder, "correct", CLOSE)


def test_the_default_is_known_by_its_twin(folder, device):
    folder.log.append(TASK.name, DEFAULT.id, "identical", "rejected", "same machine code", same_as=MIDDLE.id)
    run(folder, device)
    assert found(folder, "screen")[0]["candidate"] == MIDDLE.id and found(folder, "final")[0]["candidate"] == MIDDLE.id


# -- several devices --------------------------------------------------------------------------------------------------


def test_two_devices_share_the_candidates_and_judge_by_their_own_default(tmp_path, device):
    folder = planned(tmp_path / "sweep", Study(TASK, (SHAPE, OTHER)))
    slower = f"{device}?slower=1.5"
    run(folder, device, slower)
    checked = found(folder, "correct")
    assert len(checked) == len(CANDIDATES) and {x["on"] for x in checked} == {device, slower}
    for shape in (SHAPE, OTHER):
        assert {x["on"] for x in found(folder, "screen", DEFAULT, shape)} == {device, slower}
        assert len({x["on"] for x in found(folder, "final", workload=shape)}) == 1
    for line in found(folder, "screen", BEST) + found(folder, "screen", CLOSE):
        assert line["verdict"] == "kept" and line["relative"] == pytest.approx(0.8, rel=0.05)
        assert line["ms"] == pytest.approx(0.8 * (1.5 if line["on"] == slower else 1), rel=0.05)
    assert run(folder, device, slower).lines == []


def test_a_device_that_does_not_start_again_leaves_its_work_to_the_others(tmp_path, device):
    folder = planned(tmp_path / "sweep")
    (tmp_path / "copy.jsonl").write_text((tmp_path / "recorded.jsonl").read_text())
    doomed = faulty(f"replay:{tmp_path / 'copy.jsonl'}", tmp_path / "faults", ("crash", "samplers", DEFAULT, [1]))
    from kdagen.autotune.pool import Worker

    class Doomed(Worker):
        """Its device goes away with its first worker."""

        def ask(self, *request):
            try:
                return super().ask(*request)
            finally:
                if request[0]["do"] == "screen":
                    (tmp_path / "copy.jsonl").unlink(missing_ok=True)

    say = run(folder, workers=[Worker(device), Doomed(doomed)])
    assert any(note.startswith(f"{doomed} is given up: ") for note in say.notes)
    assert {x["candidate"] for x in found(folder, "correct")} == {c.id for c in CANDIDATES}
    assert {x["on"] for x in found(folder, "final")} == {device}


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_leaves_time_for_finals(tmp_path, folder, device):
    """One hangs: no time is left for those after it, but for finals of those before."""
    spec = faulty(device, tmp_path / "faults", ("hang", "check", SLOW, ALWAYS))
    began = time.monotonic()
    run(folder, spec, deadline=began + 3.5, limits=Limits(hang_s=9, patience_s=9, final_s=1))
    assert time.monotonic() - began < 4.5
    assert not found(folder, "correct", SLOW)  # the deadline came amid its check, which is not its fault
    assert {x["candidate"] for x in found(folder, "final")} == {DEFAULT.id, BEST.id}


def test_a_deadline_that_is_past_does_nothing(folder, device):
    assert run(folder, device, deadline=time.monotonic() - 1).lines == []


def test_finals_can_be_left_for_later(folder, device):
    run(folder, device, finals=False)
    assert found(folder, "screen", BEST) and not found(folder, "final")


def test_the_default_alone_does_not_race_again_in_the_place_of_a_race_among_several(folder, device):
    run(folder, device)
    before = found(folder, "final")
    for line in found(folder, "screen"):
        if line["candidate"] != DEFAULT.id:
            figures = {n: line[n] for n in ("under", "workload", "ms", "calls", "relative", "stopped", "on")}
            folder.log.append(TASK.name, line["candidate"], "screen", "rejected", "2x the best", **figures)
    run(folder, device)
    assert found(folder, "final") == before


# -- killed -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from kdagen.autotune.bench import Limits
from kdagen.autotune.folder import Folder
from kdagen.autotune.measure import measure
from kdagen.autotune.progress import Silent
from recordings import todo
measure(Folder(sys.argv[1]), [sys.argv[2]], None, Silent(), todo=todo, limits=Limits(final_s=0.05))
"""


def test_kill_9_at_any_point_loses_nothing_finished(tmp_path, device):
    folder = planned(tmp_path / "sweep", Study(TASK, (SHAPE, OTHER)))
    delays, kills = random.Random(5), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(folder.path), device], cwd=Path(__file__).parents[1]
        )
        target = len(list(folder.log)) + delays.randrange(1, 9)
        while process.poll() is None and len(list(folder.log)) < target:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    lines = [(x["candidate"], x["rung"], x.get("workload")) for x in folder.log if x["rung"] in ("correct", "screen")]
    assert len(lines) == len(set(lines)) == 6 + 2 * 5  # nothing twice
    for shape in (SHAPE, OTHER):
        last = found(folder, "final", workload=shape)[-1]
        assert (
            len([x for x in found(folder, "final", workload=shape) if x["race"] == last["race"]]) == last["among"] == 4
        )


def test_a_torn_last_line_is_measured_again(folder, device):
    run(folder, device)
    text = folder.log.path.read_text()
    folder.log.path.write_text(text[: text.rindex('"median"')])
    last = json.loads(text.splitlines()[-1])
    run(folder, device)
    again = [x for x in found(folder, "final") if x["candidate"] == last["candidate"]]
    assert len(again) == 1 and again[0]["race"] != last["race"]  # and so is all of its race


# -- with the real search, on others' logs ----------------------------------------------------------------------------


def test_a_search_goes_on_as_figures_come_in_until_nothing_is_left(tmp_path, device):
    """Of six candidates a search that may not try all starts at the default and comes to the best by its neighbours."""
    folder = planned(tmp_path / "sweep", exhaustive=2)
    say = Notes()
    measure(folder, [device], None, say, limits=QUICK)
    assert found(folder, "final", BEST) and found(folder, "screen")[0]["candidate"] == DEFAULT.id
    before = len(list(folder.log))
    measure(folder, [device], None, say, limits=QUICK)
    assert len(list(folder.log)) == before


def test_a_replay_of_a_whole_sweep_comes_to_the_same_end(tmp_path):
    """With what crashed, what was wrong and whose finals came out how."""
    import tune_logs
    from kdagen.autotune.standing import Place, Standing

    recorded, folder = tune_logs.measured(tmp_path / "recorded"), tune_logs.compiled(tmp_path / "sweep")
    measure(folder, [f"replay:{recorded.log.path}"], None, Silent(), limits=QUICK)
    task, shape = tune_logs.INFERENCE.name, str(tune_logs.SHAPES[0])
    one, two = (Standing(f.sweep, f.log).studies[task] for f in (recorded, folder))
    assert one.quarantined == two.quarantined != []
    place = Place.of(found(folder, "final")[0])
    assert place == Place.of(found(recorded, "final")[0])
    best = [study.ranking(place, shape)[0] for study in (one, two)]
    assert best[0].candidate == best[1].candidate and best[0].ms == pytest.approx(best[1].ms, rel=0.02)
    wrong = [
        {x["candidate"] for x in found(f, "correct") if "errors" in x and x["verdict"] == "failed"}
        for f in (recorded, folder)
    ]
    assert wrong[0] == wrong[1] != set()
