"""benchmarks/tune_compile.py: what it makes of a log and a cache."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_compile.py"


def script():
    spec = importlib.util.spec_from_file_location("tune_compile_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(candidate: str, rung: str, verdict: str = "kept", **more) -> dict:
    return {"candidate": candidate, "rung": rung, "verdict": verdict, **more}


def test_candidates_count_once_they_are_decided(tmp_path):
    two = {"kernels": {"prepare": {}, "scan": {}}}
    lines = [
        *(line(c, "model") for c in "abcd"),
        line("e", "model", "rejected", reason="slow"),
        *(line("a", rung, **two) for rung in ("lowered", "ptxas", "identical")),
        *(line("b", "lowered", **two), line("b", "ptxas", "rejected", reason="spills", **two)),
        line("c", "lowered", "rejected", reason=""),
        *(line("d", "lowered", **two), line("d", "ptxas", **two)),  # undecided
    ]
    for key, seconds in (("x", 4.0), ("y", 6.0), ("z", 9.0)):
        (tmp_path / "entries" / key).mkdir(parents=True)
        (tmp_path / "entries" / key / "report.json").write_text(json.dumps({"seconds": seconds}))
    found = script().figures(lines, tmp_path, 60.0)
    assert (found["candidates_kept_by_the_model"], found["decided"], found["decided_an_hour"]) == (4, 3, 180.0)
    assert found["verdicts"] == {"kept at identical": 1, "rejected at ptxas": 1, "rejected at lowered": 1}
    assert found["without_a_reason"] == 1
    assert (found["kernels_compiled"], found["kernels_needed"], found["kernels_shared"]) == (3, 6, 3)
    assert (found["kernel_median_s"], found["kernel_most_s"]) == (6.0, 9.0)


def test_the_sweep_is_the_one_that_the_command_plans():
    (study,) = script().sweep("kda", "inference", "H100").studies
    assert (study.task.op, study.task.purpose, study.task.target) == ("kda", "inference", "sm90")
