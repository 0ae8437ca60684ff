"""Planning: a line for all that is refused alike, one for each legal candidate; none twice, whatever was cut off."""

import json
from collections import Counter

import pytest
from kdagen.autotune.folder import Folder
from kdagen.autotune.model import Part, Prediction, predicted
from kdagen.autotune.plan import MARGIN, audited, judge, plan, rounded, too_slow
from kdagen.autotune.progress import Silent
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Candidate, Study, Sweep, Task, Workload

KDA = Task("kda", "inference", "sm90", "H100")
DECODE = Task("kda", "decode", "sm90", "H100")
CPU = Task("kda", "inference", "cpu", "cpu", dtype="float32")
PROMPT, STEP = Workload.parse("1x8192x64"), Workload.parse("64x1x32")
FEW = {"output": "fused", "chunk_size": [16, 64], "scan_skeleton": "scan_specialised"}


class Said(Silent):
    """What was said."""

    def __init__(self):
        self.lines, self.stages, self.notes = [], [], []

    def __call__(self, line):
        self.lines.append(line)

    def stage(self, name, total):
        self.stages.append((name, total))

    def note(self, text):
        self.notes.append(text)


def planned(path, *studies, **fields):
    folder = Folder.create(path, Sweep(tuple(studies), **fields))
    said = Said()
    plan(folder, said)
    return folder, said


def timeless(lines):
    return [{k: v for k, v in line.items() if k != "at"} for line in lines]


def test_every_candidate_is_in_the_log(tmp_path):
    folder, said = planned(tmp_path / "sweep", Study(KDA, (PROMPT,)))
    lines, survey = list(folder.log), space_of(KDA).survey()
    refused = [line for line in lines if line["rung"] == "space"]
    judged = [line for line in lines if line["rung"] == "model"]
    assert sum(line["candidates"] for line in refused) == survey.size - len(survey.legal)
    assert {line["candidate"] for line in judged} == {Candidate(KDA, s).id for s in survey.legal}
    assert all(line["reason"] for line in lines if line["verdict"] == "rejected")
    assert {line["constraint"] for line in refused} == {name for name, n in survey.removed.items() if n}
    assert len({line["candidate"] for line in lines}) == len(lines)
    assert said.lines == lines and said.stages == [(f"plan {KDA.name}", len(lines))]
    assert f"{len(survey.legal):,} of them legal" in said.notes[0]


def test_the_model_line_has_the_schedule_and_figures_of_each_workload(tmp_path):
    folder, _ = planned(tmp_path / "sweep", Study(DECODE, (STEP, Workload.parse("1x1x32"))))
    for line in folder.log:
        if line["rung"] == "model":
            candidate = Candidate.of(DECODE, line["schedule"])
            p = predicted(DECODE, candidate.schedule, STEP)
            assert candidate.id == line["candidate"]
            assert line["predicted_ms"].keys() == line["bound_ms"].keys() == {"64x1x32", "1x1x32"}
            assert line["predicted_ms"]["64x1x32"] == pytest.approx(p.ms, rel=1e-4)
            assert line["limiter"]["64x1x32"] == p.limiter


def test_the_default_is_first_and_kept(tmp_path):
    for fixed in ({}, {"chunk_size": 64}):
        folder, _ = planned(tmp_path / str(len(fixed)), Study(KDA, (PROMPT,)), fixed=fixed)
        judged = [line for line in folder.log if line["rung"] == "model"]
        assert [line.get("default", False) for line in judged] == [True] + [False] * (len(judged) - 1)
        assert judged[0]["verdict"] == "kept" and judged[0]["schedule"] == space_of(KDA).default.fields()


def test_planning_again_adds_nothing(tmp_path):
    folder, _ = planned(tmp_path / "sweep", Study(DECODE, (STEP,)))
    before, said = folder.log.path.read_bytes(), Said()
    plan(Folder(folder.path), said)
    assert folder.log.path.read_bytes() == before and said.lines == [] and said.stages == [(f"plan {DECODE.name}", 0)]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.4003, 0.77, 0.9999])
def test_a_plan_that_was_cut_off_goes_on(tmp_path, part):
    folder, _ = planned(tmp_path / "sweep", Study(DECODE, (STEP,)), Study(KDA, (PROMPT,)), fixed=FEW)
    whole, log = timeless(folder.log), folder.log.path.read_bytes()
    folder.log.path.write_bytes(log[: int(part * len(log))])
    plan(Folder(folder.path), Silent())
    again = timeless(folder.log)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole))


def test_two_plans_of_one_sweep_say_the_same(tmp_path):
    plans = [planned(tmp_path / name, Study(KDA, (PROMPT,)), fixed=FEW)[0] for name in "ab"]
    assert timeless(plans[0].log) == timeless(plans[1].log)


def test_another_studys_axes_are_no_matter(tmp_path):
    folder, _ = planned(tmp_path / "sweep", Study(DECODE, (STEP,)), Study(KDA, (PROMPT,)), fixed={"stages": 2})
    schedules = [line["schedule"] for line in folder.log if line["rung"] == "model"]
    assert {s["stages"] for s in schedules if "stages" in s} == {2} and any("threads" in s for s in schedules)


def test_candidates_of_the_cpu_are_all_kept_in_order(tmp_path):
    folder, _ = planned(tmp_path / "sweep", Study(CPU, (Workload.parse("1x2048x8"),)))
    judged = [line for line in folder.log if line["rung"] == "model"]
    legal = [s.fields() for s in space_of(CPU).survey().legal]
    assert [line["schedule"] for line in judged if not line.get("default")] == [
        s for s in legal if s != space_of(CPU).default.fields()
    ]
    assert {line["verdict"] for line in judged} == {"kept"} and all(not line["predicted_ms"] for line in judged)


# -- what the model rules out


def says(**bounds):
    part = Part("k", 1, 1, "latency", 1, 1, 1)
    return {w: Prediction(9, bound, "latency", (part,)) for w, bound in bounds.items()}


def test_only_what_is_too_slow_on_every_workload_is_rejected():
    best = {"a": 1.0, "b": 10.0}
    assert too_slow(says(a=MARGIN + 0.01, b=10 * MARGIN + 0.1), best).startswith("takes")
    assert too_slow(says(a=MARGIN - 0.01, b=99), best) == "" == too_slow(says(a=99, b=9), best)


def test_the_reason_is_that_of_the_workload_where_it_comes_nearest():
    reason = too_slow(says(a=3.0, b=20.0), {"a": 1.0, "b": 10.0})
    assert reason == "takes 20 ms at least at b (latency), 2.00 times the best estimate"


def test_a_candidate_is_rejected_if_its_bound_is_far_above_the_best_estimate():
    legal = space_of(KDA).survey({"scan_skeleton": "scan_specialised", "stages": [1, 2]}).legal
    judged = judge(Study(KDA, (PROMPT,)), legal, Sweep((), audit=0))
    best = min(j.predictions[str(PROMPT)].ms for j in judged)
    for j in judged:
        assert bool(j.reason) == (j.predictions[str(PROMPT)].bound_ms > MARGIN * best and not j.default)
    assert Counter(j.verdict for j in judged)["rejected"] > 5


def test_some_rejects_are_tried_all_the_same(tmp_path):
    legal = space_of(KDA).survey({"scan_skeleton": "scan_pipelined", "chunk_size": 64}).legal

    def audits(**fields):
        judged = judge(Study(KDA, (PROMPT,)), legal, Sweep((), **fields))
        assert all(j.verdict == "kept" for j in judged if j.audit) and all(j.reason for j in judged if j.audit)
        return {j.candidate.id for j in judged if j.audit}

    everything = audits(audit=1.0)
    assert not audits(audit=0.0) and len(everything) > 20
    assert audits(audit=0.5, seed=1) != audits(audit=0.5, seed=2) != everything
    assert audits(audit=0.2, seed=1) <= audits(audit=0.5, seed=1)


def test_an_audit_does_not_depend_on_other_candidates():
    candidates = [Candidate(KDA, s) for s in space_of(KDA).survey().legal]
    sweep = Sweep((), audit=0.3)
    drawn = [audited(sweep, c) for c in candidates]
    assert drawn[::-1] == [audited(sweep, c) for c in candidates[::-1]]
    assert 0.15 < sum(drawn) / len(drawn) < 0.45


def test_an_audit_is_marked_in_the_log(tmp_path):
    folder, _ = planned(tmp_path / "sweep", Study(KDA, (PROMPT,)), audit=1.0)
    marked = [line for line in folder.log if line.get("audit")]
    assert marked and all(line["verdict"] == "kept" and "times the best estimate" in line["reason"] for line in marked)


def test_figures_have_five_digits():
    assert [rounded(x) for x in (1.23456789, 0.000123456789, 1234.56789, 0.0)] == [1.2346, 0.00012346, 1234.6, 0.0]
