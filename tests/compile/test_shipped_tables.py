"""Every schedule of the tables that ship with kdagen compiles, for the recurrence and target that it was tuned for."""

import pytest
import tuned_tables
from kdagen.autotune import choose, select
from kdagen.autotune.select import Key, read
from kdagen.autotune.sweep import Workload

from kdagen import pipeline
from kdagen.build import builder
from kdagen.build.kernel import REPORT
from kdagen.build.progress import Progress
from kdagen.errors import ScheduleError
from kdagen.recurrence import load
from kdagen.schedule import CpuSchedule
from kdagen.state import StateType

pytestmark = pytest.mark.nvcc
MAKE = {
    "inference": pipeline.compile_op,
    "training": pipeline.compile_training,
    "decode": pipeline.compile_decode,
}


def source(entry):
    """The OpSource of an entry: its schedule as it stands, nothing filled in."""
    key = entry.key
    assert choose.recurrence_of(entry.facts["op"]) == key.recurrence, f"{entry.facts['op']} is not what was tuned"
    make, state = MAKE[key.purpose], StateType(*key.state.split())
    made = make(
        load(entry.facts["op"]), key.head_dim, key.dtype, key.target, entry.schedule, key.gate_dtype, state=state
    )
    assert made.schedule == entry.schedule
    return made


def compile_all(entries) -> set[str]:
    """The kernels of all entries for GPUs, compiled; those for CPUs are looked at."""
    for entry in entries:
        if entry.key.target == "cpu":
            assert CpuSchedule().replace(**entry.schedule).fields() == entry.schedule
    sources = [source(e) for e in entries if e.key.target != "cpu"]
    found = builder.compile_kernels(sources, None, Progress(silent=True))
    assert all((place / REPORT).is_file() for place, _ in found.values())
    return {kernel.name for s in sources for kernel in s.kernels}


def entries() -> list:
    return [entry for path in sorted(select.SHIPPED.glob("*.json")) for entry in read(path)]


def test_every_shipped_schedule_compiles():
    compile_all(entries())


def test_shipped_tables_are_sorted_and_of_one_device_each():
    for path in select.SHIPPED.glob("*.json"):
        found = read(path)
        places = [(*vars(e.key).values(), e.policy) for e in found]
        assert places == sorted(set(places)) and len({(k[-4], k[-3]) for k in places}) == 1
        assert len(path.read_text().splitlines()) == len(found) + 2


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one entry in the place of those that ship."""
    monkeypatch.setattr(select, "SHIPPED", tmp_path / "tables")

    def write(schedule: dict) -> None:
        key = Key(choose.recurrence_of("gla"), "decode", "sm90", (64, 64), 1, "bfloat16", "bfloat16", "KV float32",
                  "NVIDIA H100 80GB HBM3", 132, Workload.parse("32x1x64").bucket)  # fmt: skip
        tuned_tables.write(tmp_path / "tables", [tuned_tables.entry(schedule, key, facts={"op": "gla"})])

    yield write
    select.tables.cache_clear()


def test_a_table_that_ships_would_be_compiled(table):
    table({"v_tile": 64, "threads": 128, "skeleton": "decode"})
    assert compile_all(entries()) == {"gla_decode"}


@pytest.mark.parametrize(
    ("schedule", "refusal"),
    [
        ({"v_tile": 48, "threads": 128, "skeleton": "decode"}, ScheduleError),
        ({"v_tile": 64, "threads": 128}, AssertionError),  # of another kdagen: a field is missing
    ],
)
def test_one_that_does_not_compile_would_be_found(table, schedule, refusal):
    table(schedule)
    with pytest.raises(refusal):
        compile_all(entries())
