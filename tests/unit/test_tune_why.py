"""`kdagen tune why`: the text of a made-up folder, at each stage."""

import re

import pytest
import tune_logs
from kdagen.autotune.standing import Place, Standing, kind
from kdagen.autotune.why import why

NAME = tune_logs.INFERENCE.name
SHAPE = "1x8192x64"


@pytest.fixture
def folder(tmp_path):
    return tune_logs.measured(tmp_path / "sweep")


def final(folder, candidate, ms: float, spread: float = 0.01, workload: str = SHAPE, **more) -> None:
    """One more final of a candidate; later lines count instead of earlier ones."""
    interval = {"median": ms, "low": ms * (1 - spread), "high": ms * (1 + spread), "calls": 40}
    under = tune_logs.under(candidate, workload)
    folder.log.append(NAME, candidate.id, "final", "kept", under=under, workload=workload, **interval, **more)


def candidate(chunk_size: int, v_tile: int, stages: int):
    wanted = chunk_size, v_tile, stages
    return next(
        c for c in tune_logs.candidates() if (c.schedule.chunk_size, c.schedule.v_tile, c.schedule.stages) == wanted
    )


def shape(text: str, workload: str = SHAPE) -> dict[str, str]:
    """What is said of one shape, by label."""
    part = text.split(f"    {workload}\n")[1]
    found = re.findall(r"^ {6}(\S+) +(.*)$", part.split("\n    1x")[0].split("\n\n")[0], re.MULTILINE)
    return dict(found)


def test_golden(folder, golden):
    # ids are hashes of all fields of a schedule, which may get more of them
    golden("tune_why.txt", re.sub(r"\b[0-9a-f]{12}\b", "<candidate>", why(folder)))


def test_a_folder_that_was_only_planned(tmp_path):
    text = why(tune_logs.planned(tmp_path / "sweep"))
    assert text.count("not measured yet; next: `kdagen tune compile`") == 2
    assert re.search(r"^ +space +29 +27 +2 +0  2: shared memory$", text, re.MULTILINE)
    assert "winner" not in text


def test_a_folder_that_was_only_compiled(tmp_path):
    text = why(tune_logs.compiled(tmp_path / "sweep"))
    assert "not measured yet; next: `kdagen tune measure`" in text
    assert re.search(r"^ +ptxas +18 +16 +1 +1  ", text, re.MULTILINE)
    assert "nvcc was killed" in text


def test_an_empty_log(tmp_path):
    from kdagen.autotune.folder import Folder

    assert why(Folder.create(tmp_path / "sweep", tune_logs.SWEEP)).count("next: `kdagen tune plan`") == 2


def test_of_those_that_tie_the_simplest_wins(folder):
    final(folder, candidate(32, 32, 3), 0.4334, spread=0.05)
    said = shape(why(folder))
    assert (
        said["winner"] == "0.447 ms (0.442 to 0.451)  chunk_size 32, stages 3, v_tile 64"
        or "v_tile 32" in said["winner"]
    )
    final(folder, candidate(32, 32, 2), 0.4335, spread=0.05)
    said = shape(why(folder))
    assert said["winner"].endswith("  chunk_size 32, v_tile 32")
    assert said["runner-up"].endswith("  chunk_size 32, stages 3, v_tile 32; 0.0% faster, a tie: the intervals overlap")


def test_the_default_wins_what_nobody_wins_for_sure(folder):
    final(folder, tune_logs.candidates()[0], 0.44, spread=0.1)
    said = shape(why(folder))
    assert said["winner"] == "0.440 ms (0.396 to 0.484)  the default"
    assert "default" not in said and "a tie" in said["runner-up"]


def test_an_audit_that_speaks_against_the_model(folder):
    assert shape(why(folder))["audit"].endswith("0 faster than all that it kept: it may be trusted here")
    final(folder, candidate(16, 128, 2), 0.9)
    final(folder, tune_logs.candidates()[5], 0.2)  # audited
    said = shape(why(folder))
    assert said["audit"] == "1 of the model's rejects timed, 1 faster than all that it kept: do not trust it here"
    assert said["model"].endswith("2.17x the best measured")


def test_a_pick_of_the_model_that_was_never_timed(folder):
    pick = candidate(32, 32, 3)
    lines = [line for line in folder.log if not (line["candidate"] == pick.id and line["rung"] in ("screen", "final"))]
    folder.log.path.write_text("")
    for line in lines:
        rest = {n: v for n, v in line.items() if n not in ("task", "candidate", "rung", "verdict", "reason", "at")}
        folder.log.append(
            line["task"], line["candidate"], line["rung"], line["verdict"], line.get("reason", ""), **rest
        )
    assert shape(why(folder))["model"].endswith("not timed (correct was its last rung)")


def test_only_finals_of_one_race_are_compared(folder):
    """The last one that is whole: another day the device was faster, or a race was cut off."""
    default, other = tune_logs.candidates()[0], candidate(32, 32, 3)
    for c, ms in ((default, 0.2), (other, 0.19)):
        final(folder, c, ms, race="a", among=2)
    said = shape(why(folder))
    assert said["winner"].startswith("0.190 ms") and said["runner-up"].startswith("0.200 ms")
    final(folder, candidate(32, 64, 3), 0.01, race="b", among=2)
    assert shape(why(folder))["winner"].startswith("0.190 ms")


def test_a_device_that_was_not_steady(folder):
    final(folder, candidate(32, 32, 3), 0.4, unsteady="throttled: power")
    assert shape(why(folder))["caution"] == "the device was not steady: throttled: power"


def test_what_is_wrong_or_quarantined_is_no_winner(folder):
    for c, death in ((candidate(32, 128, 2), "crash"), (candidate(32, 64, 2), None)):
        final(folder, c, 0.001)
        assert c.id not in why(folder).split("funnel")[0]
        assert shape(why(folder))["winner"].endswith("  chunk_size 32, stages 3, v_tile 32"), death


def test_another_machine_is_told_apart(folder):
    line = next(line for line in folder.log if line["rung"] == "screen")
    under = line["under"] | {"device": "Another made-up GPU"}
    folder.log.append(NAME, line["candidate"], "screen", "kept", under=under, workload=SHAPE, ms=0.5)
    standing = Standing(folder.sweep, folder.log).studies[NAME]
    assert [place.device for place in standing.places] == ["A made-up GPU", "Another made-up GPU"]
    assert len(standing.times(Place.of({"under": under}), SHAPE)) == 1
    assert "; screened only, no final yet" in why(folder).split("Another made-up GPU")[1]


def test_reasons_of_one_kind_count_as_one():
    assert kind("1.5x the best of 0.25 ms") == kind("2e-3x the best of 3 ms") != kind("spills 3 bytes")
