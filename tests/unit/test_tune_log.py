"""The log and the folder of a sweep: what is written is whole, what is torn is skipped, one writer at a time."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kdagen.autotune.folder import Folder
from kdagen.autotune.log import RUNGS, VERDICTS, Log
from kdagen.autotune.sweep import Policy, Study, Sweep, Task, Workload

from kdagen.errors import ArtefactError

SWEEP = Sweep(
    (
        Study(Task("kda", "inference", "sm90", "H100"), tuple(map(Workload.parse, ("1x8192x64", "1300+547:16/64")))),
        Study(Task("kda", "decode", "cpu", "cpu", (64, 128), "float32"), (Workload.parse("64x1x32"),)),
    ),
    policy=Policy("graph", "warm"),
    seed=7,
    fixed={"chunk_size": [16, 32]},
)


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log.jsonl")


def fill(log, count=3) -> list[dict]:
    return [log.append("task", f"c{i}", "screen", "kept", ms=i + 0.5, workload="1x2x3") for i in range(count)]


def test_a_log_that_is_not_there_is_empty(log):
    assert list(log) == []


def test_what_is_appended_is_read_in_order(log):
    written = fill(log)
    assert list(log) == written and [x["ms"] for x in written] == [0.5, 1.5, 2.5]
    assert written[0]["at"].endswith("+00:00") and "reason" not in written[0]


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text() | st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=30, deadline=None)
def test_a_line_is_one_line_whatever_is_in_it(tmp_path_factory, figures):
    log = Log(tmp_path_factory.mktemp("log") / "log.jsonl")
    written = [log.append("task", "c", "ptxas", "failed", "line one\nline two\r\u2028", **figures) for _ in range(2)]
    assert list(log) == written and log.path.read_bytes().count(b"\n") == 2


def test_every_cut_of_the_last_line_loses_that_line_alone(log):
    fill(log)
    whole = log.path.read_bytes()
    first = list(log)[:2]
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole) - 1):
        log.path.write_bytes(whole[:cut])
        assert list(log) == first
    log.path.write_bytes(whole[:-1])  # only its end is missing: nothing of it is lost
    assert len(list(log)) == 3


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_a_torn_last_line_is_ended_by_the_next_writer(log, kept):
    fill(log, 2)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1][:kept])
    after = log.append("task", "c9", "final", "kept", median=1.0)
    found = list(log)
    assert found[0]["candidate"] == "c0" and found[-1] == after and len(found) == (3 if kept == -1 else 2)


@pytest.mark.parametrize(
    "torn", [b'{"task": "t", "cand', b"\0" * 40, b"\xff\xfe{}", b"7", b"[]", b'{"task": "t"}', b""]
)
def test_a_torn_line_in_the_middle_is_skipped(log, torn):
    first, last = fill(log, 2)
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join([lines[0], torn, lines[1], b""]))
    assert list(log) == [first, last]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_and_nothing_written(log, figure):
    fill(log, 1)
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append("task", "c", "screen", "kept", ms=figure)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize(
    "rung, verdict, reason", [("unknown", "kept", ""), ("final", "won", ""), ("final", "failed", "")]
)
def test_a_line_has_a_rung_a_verdict_and_where_it_was_not_kept_a_reason(log, rung, verdict, reason):
    with pytest.raises(AssertionError):
        log.append("task", "c", rung, verdict, reason)
    assert not log.path.exists()


def test_every_rung_and_verdict_is_written(log):
    for rung in RUNGS:
        for verdict in VERDICTS:
            log.append("task", "c", rung, verdict, "why")
    assert [(x["rung"], x["verdict"]) for x in log] == [(r, v) for r in RUNGS for v in VERDICTS]


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_the_sweep_that_it_was_made_for(tmp_path):
    Folder.create(tmp_path / "sweep", SWEEP)
    assert Folder(tmp_path / "sweep").sweep == SWEEP
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["format"] == 1


def test_a_folder_is_made_once_and_found_again(tmp_path):
    Folder.create(tmp_path / "sweep", SWEEP).log.append("task", "c", "model", "kept")
    assert len(list(Folder.create(tmp_path / "sweep", SWEEP).log)) == 1


def test_a_manifest_is_read_where_there_is_one(tmp_path):
    folder = Folder.create(tmp_path / "sweep", SWEEP)
    assert folder.manifest("c") is None
    folder.candidates.mkdir()
    (folder.candidates / "c.json").write_text('{"digest": "d"}')
    assert folder.manifest("c") == {"digest": "d"}


HOLD = """
import sys
from kdagen.autotune.folder import Folder
with Folder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_ends_even_by_kill_9(tmp_path):
    folder = Folder.create(tmp_path / "sweep", SWEEP)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ArtefactError, match="another `kdagen tune` works in"), folder.lock():
        pass
    process.kill()
    process.communicate()
    with folder.lock():
        pass


def test_a_lock_that_is_given_back_can_be_had_again(tmp_path):
    folder = Folder.create(tmp_path / "sweep", SWEEP)
    for _ in range(2):
        with folder.lock(), pytest.raises(ArtefactError), Folder(folder.path).lock():
            pass
