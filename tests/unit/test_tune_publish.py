"""Winners of a sweep as tables: only finals count, nothing that loses to the default, old entries stay."""

import json
import random

import pytest
from kdagen.autotune.choose import key_of
from kdagen.autotune.folder import Folder
from kdagen.autotune.publish import publish, slug, winners
from kdagen.autotune.select import Selection, read, select, tables, user_tables
from kdagen.autotune.sweep import Candidate, Policy, Study, Sweep, Task, Workload
from tune_logs import SHAPES, measured

from kdagen.errors import ArtefactError
from kdagen.schedule import DecodeSchedule

TASK = Task("kda", "decode", "sm90", "H100")
ONE, TWO, FAR = map(Workload.parse, ("32x1x64", "1x2048x1", "256x1x64"))  # two of bucket 11, one of bucket 14
DEFAULT, FAST, WIDE = (
    Candidate(TASK, DecodeSchedule(**fields)) for fields in ({}, {"v_tile": 64}, {"v_tile": 128, "threads": 256})
)
MACHINE = {"device": "NVIDIA H200", "processors": 132, "versions": {"cuda": "13.0"}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    tables.cache_clear()
    yield
    tables.cache_clear()


@pytest.fixture
def folder(tmp_path) -> Folder:
    """A sweep of decoding, planned."""
    made = Folder.create(tmp_path / "sweep", Sweep((Study(TASK, (ONE, TWO, FAR)),), Policy("device", "cold")))
    for candidate in (DEFAULT, FAST, WIDE):
        default = {"default": True} if candidate == DEFAULT else {}
        made.log.append(TASK.name, candidate.id, "model", "kept", schedule=candidate.schedule.fields(), **default)
    return made


def race(folder, shape: Workload, times: dict, spread=0.01, machine=MACHINE, policy="device cold", **more) -> None:
    """Finals on a shape: ms by candidate."""
    for candidate, ms in times.items():
        under = {**machine, "policy": policy, "kernels": candidate.id, "bucket": shape.bucket}
        figures = {"median": ms, "low": ms * (1 - spread), "high": ms * (1 + spread), "calls": 40}
        names = {"workload": str(shape), "under": under, **more}
        folder.log.append(TASK.name, candidate.id, "final", "kept", **figures, **names)


def published(folder, into=None) -> dict:
    """Entries by bucket, from the files that were written."""
    return {entry.key.bucket: entry for path in publish(folder, into) for entry in read(path)}


def test_what_a_recording_answered_goes_into_named_tables_alone(folder, tmp_path):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0}, on="replay:log.jsonl")
    assert publish(folder) == [] and not user_tables().exists()
    assert published(folder, tmp_path / "tables")[ONE.bucket].schedule == FAST.schedule.fields()
    race(folder, FAR, {DEFAULT: 2.0, FAST: 1.0}, on="cuda:0")
    assert list(published(folder)) == [FAR.bucket]


def test_the_fastest_of_each_bucket_is_published(folder, tmp_path):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0, WIDE: 1.5})
    race(folder, FAR, {DEFAULT: 9.0, FAST: 8.0, WIDE: 6.0})
    (path,) = publish(folder, tmp_path / "tables")
    assert path == tmp_path / "tables" / "nvidia-h200-132.json"
    near, far = read(path)
    assert (near.schedule, far.schedule) == (FAST.schedule.fields(), WIDE.schedule.fields())
    assert near.key == key_of(TASK, ONE, "NVIDIA H200", 132)
    at = near.facts.pop("date")
    assert at == next(line["at"] for line in folder.log)[:10]
    assert near.facts == {
        "op": "kda", "workload": "32x1x64", "ms": 1.0, "low": 0.99, "high": 1.01, "default_ms": 2.0, "gain": 2.0,
        "kernels": FAST.id, "versions": {"cuda": "13.0"},
    }  # fmt: skip


def test_the_device_is_the_one_that_measured(folder):
    """A sweep that was planned for an H100 and measured on an H200 says nothing of an H100."""
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0})
    publish(folder)
    found = select(key_of(TASK, ONE, "NVIDIA H100 80GB HBM3", 132))
    assert (found.how, found.words) == ("nearest GPU", "as tuned for NVIDIA H200, bucket 11")
    assert select(key_of(TASK, ONE, "NVIDIA H200", 132)).how == "exact"


@pytest.mark.parametrize("times", [{FAST: 2.1, WIDE: 3.0}, {FAST: 1.99, WIDE: 3.0}])
def test_what_does_not_beat_the_default_is_not_published(folder, times):
    """Nor what ties with it: then the default is the entry."""
    race(folder, ONE, {DEFAULT: 2.0, **times})
    entry = published(folder)[11]
    assert (entry.schedule, entry.facts["gain"]) == (DEFAULT.schedule.fields(), 1.0)
    assert entry.facts["ms"] == entry.facts["default_ms"] == 2.0


def test_of_those_that_tie_the_simplest_wins(folder):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.001, WIDE: 1.0})
    assert published(folder)[11].schedule == FAST.schedule.fields()


def test_one_schedule_for_all_shapes_of_a_bucket(folder):
    """By the geometric mean relative to the default: 0.5 and 1.2, 0.8 and 0.7."""
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0, WIDE: 1.6})
    race(folder, TWO, {DEFAULT: 10.0, FAST: 12.0, WIDE: 7.0})
    entry = published(folder)[11]
    assert entry.schedule == WIDE.schedule.fields()
    assert entry.facts["workload"] == "32x1x64, 1x2048x1"
    assert entry.facts["gain"] == round((0.8 * 0.7) ** -0.5, 3)
    assert entry.facts["ms"] == pytest.approx((1.6 * 7) ** 0.5, rel=1e-5)


def test_only_finalists_of_all_shapes_of_a_bucket_count(folder):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 0.1, WIDE: 1.6})
    race(folder, TWO, {DEFAULT: 10.0, WIDE: 7.0})
    assert published(folder)[11].schedule == WIDE.schedule.fields()


def test_a_race_that_was_cut_off_does_not_count(folder):
    race(folder, ONE, {DEFAULT: 2.0, WIDE: 1.6}, race="a", among=2)
    race(folder, ONE, {DEFAULT: 2.0, FAST: 0.1}, race="b", among=3)
    assert published(folder)[11].schedule == WIDE.schedule.fields()


def test_the_last_whole_race_counts_instead_of_earlier_ones(folder):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 0.1}, race="a", among=2)
    race(folder, ONE, {DEFAULT: 2.0, WIDE: 1.6, FAST: 1.8}, race="b", among=3, unsteady="throttled: heat")
    entry = published(folder)[11]
    assert (entry.schedule, entry.facts["unsteady"]) == (WIDE.schedule.fields(), "throttled: heat")


def test_figures_of_other_versions_are_not_mixed(folder):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 0.1, WIDE: 1.9})
    race(folder, ONE, {DEFAULT: 2.0, WIDE: 1.5}, machine={**MACHINE, "versions": {"cuda": "13.1"}})
    entry = published(folder)[11]
    assert (entry.schedule, entry.facts["versions"]) == (WIDE.schedule.fields(), {"cuda": "13.1"})


def test_without_the_default_in_the_finals_nothing_is_published(folder):
    race(folder, ONE, {FAST: 1.0, WIDE: 2.0})
    assert publish(folder) == []


def test_a_default_that_is_broken_loses(folder):
    folder.log.append(TASK.name, DEFAULT.id, "correct", "failed", "output is 0.3 from the recurrence")
    race(folder, ONE, {FAST: 1.0, WIDE: 2.0})
    entry = published(folder)[11]
    assert (entry.schedule, entry.facts["default_ms"], entry.facts["gain"]) == (FAST.schedule.fields(), None, None)


def test_a_default_that_died_once_still_counts_where_it_came_to_the_finals(folder):
    folder.log.append(TASK.name, DEFAULT.id, "correct", "failed", "hang: no answer within 300 s", death="hang")
    race(folder, ONE, {DEFAULT: 1.0, FAST: 2.0})
    assert published(folder)[11].schedule == DEFAULT.schedule.fields()


def test_what_was_measured_without_finals_is_not_published(folder):
    under = {**MACHINE, "policy": "device cold", "kernels": "k", "bucket": 11}
    for candidate, ms in ((DEFAULT, 2.0), (FAST, 1.0)):
        folder.log.append(TASK.name, candidate.id, "screen", "kept", under=under, workload=str(ONE), ms=ms, calls=5)
    assert publish(folder) == []


def test_a_table_keeps_the_entries_of_other_keys(folder, tmp_path):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0})
    race(folder, FAR, {DEFAULT: 9.0, FAST: 8.0})
    publish(folder, tmp_path / "tables")
    race(folder, ONE, {DEFAULT: 2.0, WIDE: 0.5})
    other = Folder.create(tmp_path / "other", folder.sweep)
    other.log.path.write_text(
        "\n".join(text for text in folder.log.path.read_text().splitlines() if str(FAR) not in text)
    )
    found = published(other, tmp_path / "tables")
    assert {b: e.schedule for b, e in found.items()} == {11: WIDE.schedule.fields(), 14: FAST.schedule.fields()}


def test_a_table_is_sorted_one_line_an_entry_and_the_same_each_time(folder, tmp_path):
    shapes = [ONE, FAR, *(Workload.parse(f"{b}x1x64") for b in (1, 4, 512))]
    random.Random(0).shuffle(shapes)
    for shape in shapes:
        race(folder, shape, {DEFAULT: 2.0, FAST: 1.0})
    (path,) = publish(folder, tmp_path / "a")
    text = path.read_text()
    lines = [json.loads(line.rstrip(",")) for line in text.splitlines()[1:-1]]
    assert [line["key"]["bucket"] for line in lines] == [6, 8, 11, 14, 15]
    assert json.loads(text)["device"] == {"name": "NVIDIA H200", "processors": 132}
    (again,) = publish(folder, tmp_path / "a")
    (fresh,) = publish(folder, tmp_path / "b")
    assert again.read_text() == fresh.read_text() == text
    assert [p.name for p in (tmp_path / "a").iterdir()] == [path.name]


def test_policies_stand_side_by_side_and_the_first_is_chosen(folder):
    race(folder, ONE, {DEFAULT: 2.0, WIDE: 1.0}, policy="graph warm")
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0})
    (path,) = publish(folder)
    assert [entry.policy for entry in read(path)] == ["device cold", "graph warm"]
    assert select(key_of(TASK, ONE, "NVIDIA H200", 132)).schedule == FAST.schedule.fields()


def test_a_table_goes_to_the_folder_of_the_user(folder):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0})
    (path,) = publish(folder)
    assert path.parent == user_tables()


def test_a_damaged_table_is_not_overwritten(folder, tmp_path):
    race(folder, ONE, {DEFAULT: 2.0, FAST: 1.0})
    path = tmp_path / f"{slug('NVIDIA H200', 132)}.json"
    path.write_text('{"format": 1, "entries": [')
    with pytest.raises(ArtefactError, match="is not a table of this kdagen"):
        publish(folder, tmp_path)
    assert path.read_text().endswith("[")


def test_a_whole_sweep_ends_in_a_table(tmp_path):
    made = measured(tmp_path / "sweep")
    (path,) = publish(made, tmp_path / "tables")
    entries = read(path)
    assert {e.facts["workload"] for e in entries} == set(map(str, SHAPES))
    study = made.sweep.studies[0]
    assert winners(study, made.log) == entries
    assert all(entry.facts["gain"] >= 1 for entry in entries)
    assert isinstance(select(entries[0].key, entries), Selection)
