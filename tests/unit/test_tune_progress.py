"""What people see while a sweep runs."""

import io
import re
import threading

import pytest
import tune_logs
from kdagen.autotune import progress
from kdagen.autotune.progress import Live, Plain, Silent, duration, ends
from kdagen.autotune.standing import Standing
from rich.console import Console

BEST = "0.433 ms by chunk_size 32, stages 3, v_tile 32, 1.97x the default's speed, 69% of roofline"


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tune_logs.measured(tmp_path_factory.mktemp("tune") / "sweep")


@pytest.fixture
def lines(folder):
    return list(folder.log)


def of(lines, rung: str) -> list[dict]:
    return [line for line in lines if line["rung"] == rung]


def plain(folder, deadline=None, clock=None) -> tuple[Plain, io.StringIO]:
    out = io.StringIO()
    return Plain(Standing(folder.sweep), deadline, out, clock=clock or Clock()), out


def test_silent_says_nothing(lines, capsys):
    with Silent() as say:
        say.stage("compile", 3)
        say.note("a note")
        say(lines[0])
    assert capsys.readouterr() == ("", "")


def test_many_lines_are_one_a_second(folder, lines):
    clock = Clock()
    say, out = plain(folder, clock=clock)
    models = of(lines, "model")[:21]
    say.stage("model", len(models))
    for i, line in enumerate(models):
        clock.now = 100.0 + i / 10
        say(line)
    texts = out.getvalue().splitlines()
    assert texts[0] == "model: 21 to do" and texts[1].startswith("model 1/21; 1 kept")
    assert [text.split(";")[0] for text in texts[1:]] == ["model 1/21", "model 11/21", "model 21/21"]


def test_failures_and_notes_are_always_said(folder, lines):
    say, out = plain(folder)
    for line in of(lines, "model"):
        say(line)
    say.stage("correct", 15)
    for line in of(lines, "correct"):
        say(line)
    say.note("cuda:0: the worker is started again")
    texts = out.getvalue().splitlines()
    failed = [text for text in texts if text.startswith("failed: ")]
    assert len(failed) == sum(line["verdict"] == "failed" for line in of(lines, "correct")) == 4
    assert "(chunk_size 32, v_tile 64) at correct: output is 0.31 from the recurrence" in failed[-1]
    assert texts[-1] == "cuda:0: the worker is started again"


def test_a_new_leader_of_finals_is_said_with_its_gain_and_roofline(folder, lines):
    say, out = plain(folder)
    for line in lines:
        say(line)
    best = [text for text in out.getvalue().splitlines() if text.startswith("best of ") and "1x8192x64" in text]
    assert best[0].endswith("0.854 ms by the default, 35% of roofline")
    assert best[-1].endswith(BEST)
    assert len(best) == len(set(best)) < len(of(lines, "final")) / 2


def test_time_left_by_rate_and_by_budget(folder, lines):
    clock = Clock()
    say, out = plain(folder, deadline=170.0, clock=clock)
    assert say.left == "70 s of budget left"
    say.stage("model", 10)
    clock.now = 104.0
    say(lines[2])
    say(lines[3])
    assert say.left == "about 16 s left"
    say.stage("model", 1000)
    clock.now = 105.0
    say(lines[4])
    assert say.left == "65 s of budget left"
    clock.now = 171.0
    assert say.left == "budget spent"
    assert plain(folder)[0].left == ""


def test_steps_of_a_stage(lines):
    kept = {rung: next(x for x in of(lines, rung) if x["verdict"] == "kept") for rung in ("lowered", "identical")}
    refused = next(x for x in of(lines, "ptxas") if x["verdict"] == "rejected")
    assert [ends(kept["lowered"], "compile"), ends(kept["identical"], "compile"), ends(refused, "compile")] == [0, 1, 1]
    assert ends(kept["lowered"], "lowered") and not ends(kept["identical"], "lowered")


def test_the_display_shows_leaders_counts_failures_and_the_time(folder, lines):
    clock, console = Clock(), Console(file=io.StringIO(), width=150, height=40, force_terminal=True, color_system=None)
    with Live(Standing(folder.sweep), 190.0, console, clock=clock) as say:
        say.stage("measure", 26)
        for line in lines:
            say(line)
        with console.capture() as seen:
            console.print(say.picture())
        say.note("a note")
    text = seen.get()
    assert f"1x8192x64  {BEST}" in text
    assert "kda-decode" not in text  # nothing was timed there
    assert re.search("measure 26/26; [0-9]+ kept, [0-9]+ rejected, 5 failed; 90 s of budget left", text)
    assert "failed: 3 crash, 1 out of memory, 1 wrong" in text
    assert "a note" in console.file.getvalue()


def test_a_display_goes_on_where_the_log_ends(folder, lines):
    say = Live(Standing(folder.sweep, lines), console=Console(file=io.StringIO(), width=150))
    say.console.print(say.picture())
    assert "0.433 ms by chunk_size 32" in say.console.file.getvalue()


def test_threads_do_not_lose_lines(folder, lines):
    say, _ = plain(folder)
    say.stage("model", 2000)
    line = of(lines, "model")[0]
    threads = [threading.Thread(target=lambda: [say(line) for _ in range(200)]) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert say.done == say.verdicts["kept"] == 2000


def test_plain_lines_where_stderr_is_no_terminal(monkeypatch):
    assert type(progress.show()) is Plain
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert type(progress.show()) is Live


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "4 s"), (99, "99 s"), (150, "2 min"), (5400, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
