"""The choice among tables: exact, nearest bucket, nearest GPU, the same whatever the order of entries."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kdagen.autotune import select as module
from kdagen.autotune.select import Key, entry_of, select, select_compiling, tables
from tuned_tables import H100, H200, KEY, entry, key, name, write

from kdagen.errors import ScheduleError

MIG = ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16)
A100 = ("NVIDIA A100-SXM4-80GB", 108)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Shipped tables and the user's, both empty."""
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path))
    tables.cache_clear()
    yield tmp_path / "shipped", tmp_path / "tables"
    tables.cache_clear()


def test_the_bucket_itself_comes_first():
    found = select(KEY, [entry("near", bucket=18), entry("here"), entry("far", device=H200)])
    assert (name(found), found.how, str(found)) == ("here", "exact", f"exact: as tuned for {H100[0]}, bucket 19")


@pytest.mark.parametrize(("bucket", "chosen"), [(19, "of 17"), (20, "of 22"), (3, "of 17"), (40, "of 22")])
def test_then_the_nearest_bucket_of_the_same_gpu(bucket, chosen):
    entries = [entry("of 17", bucket=17), entry("of 22", bucket=22), entry("other GPU", device=H200, bucket=bucket)]
    found = select(key(bucket=bucket), entries)
    assert (name(found), found.how) == (chosen, "nearest bucket")
    assert found.words == f"as tuned for bucket {chosen[3:]}, not {bucket}"


def test_of_two_buckets_as_near_the_smaller_counts():
    assert name(select(KEY, [entry("above", bucket=20), entry("below", bucket=18)])) == "below"


def test_then_the_nearest_gpu_in_processors_and_memory():
    pcie = ("NVIDIA H100 80GB HBM3", 114)  # the same chip, fewer processors
    entries = [entry("H200", device=H200), entry("fewer", device=pcie), entry("MIG", device=MIG)]
    assert name(select(KEY, entries)) == "fewer"
    found = select(KEY, [e for e in entries if e.schedule["name"] != "fewer"])
    assert (name(found), found.how, found.words) == ("H200", "nearest GPU", "as tuned for NVIDIA H200, bucket 19")


def test_of_the_nearest_gpu_the_nearest_bucket():
    entries = [entry("far", device=H200, bucket=10), entry("near", device=H200, bucket=17), entry("MIG", device=MIG)]
    assert name(select(KEY, entries)) == "near"


def test_a_gpu_that_nobody_knows_is_near_by_its_processors():
    entries = [entry("H100"), entry("other", device=("Some GPU", 60))]
    assert name(select(key(device=("Another GPU", 64)), entries)) == "other"


@pytest.mark.parametrize(
    "changed",
    [
        {"head_dim": (128, 64)}, {"head_dim": (64, 128)}, {"target": "sm80", "device": A100}, {"dtype": "float16"},
        {"gate_dtype": "float32"}, {"ratio": 2}, {"state": "VK float32"}, {"purpose": "decode"}, {"recurrence": "xyz"},
    ],
)  # fmt: skip
def test_nothing_else_matches_nearly(changed):
    """Head dims above all: kernels are for theirs alone."""
    found = select(KEY, [entry("other", **changed)])
    assert (found.schedule, found.how) == (None, "default")
    assert found.words == f"no table for {H100[0]} with 132 processors"


@pytest.mark.parametrize("other", [("A CPU", 4), ("Another CPU", 2)])
def test_another_cpu_says_nothing(other):
    base = key(target="cpu", device=("A CPU", 2))
    assert select(base, [entry("other", base, device=other)]).schedule is None
    assert name(select(base, [entry("other", base, device=other), entry("mine", base, bucket=2)])) == "mine"


def test_what_nobody_measured_counts_where_no_table_speaks():
    modelled = entry("model", device=("H100", 132), bucket=15, facts={"how": "model"})
    found = select(KEY, [modelled])
    assert (name(found), str(found)) == ("model", "model: as chosen for H100, bucket 15")
    assert name(select(KEY, [modelled, entry("H200", device=H200)])) == "H200"
    assert select(key(device=H200), [modelled]).schedule is None


def test_schedules_that_do_not_give_what_was_asked_for_are_none():
    entries = [entry({"chunk_size": 64}), entry({"chunk_size": 16}, bucket=12)]
    assert select(KEY, entries, lambda s: s["chunk_size"] == 16).how == "nearest bucket"
    assert select(KEY, entries, lambda s: False).schedule is None


DEVICES = [H100, H200, MIG, ("Some GPU", 60), ("Another GPU", 60)]
ENTRIES = st.builds(
    lambda word, bucket, device, policy, how: entry(word, bucket=bucket, device=device, policy=policy, facts=how),
    st.sampled_from("abc"), st.integers(10, 25), st.sampled_from(DEVICES),
    st.sampled_from(["device cold", "graph warm"]), st.sampled_from([{}, {"how": "model"}]),
)  # fmt: skip


@settings(deadline=None)
@given(st.data(), st.lists(ENTRIES, max_size=8), st.integers(5, 30), st.sampled_from(DEVICES))
def test_the_order_of_entries_does_not_matter(data, entries, bucket, device):
    shuffled = data.draw(st.permutations(entries))
    wanted = key(bucket=bucket, device=device)
    first, second = select(wanted, entries), select(wanted, shuffled)
    assert (first.schedule, str(first)) == (second.schedule, str(second))
    order = ["exact", "nearest bucket", "nearest GPU", "model", "default"]
    without = select(wanted, [e for e in entries if e is not first.entry])
    assert order.index(first.how) <= order.index(without.how)


def test_a_schedule_that_does_not_compile_is_passed_over_with_one_warning(caplog):
    def compiles(schedule):
        if schedule["name"] == "old":
            raise ScheduleError("unknown schedule field name")

    module.warn.cache_clear()
    entries = [entry("old"), entry("old", bucket=18), entry("good", bucket=12)]
    for _ in range(2):
        assert name(select_compiling(KEY, entries, compiles)) == "good"
    (message,) = caplog.messages
    assert message == (
        f"the schedule of abc inference that was tuned for {H100[0]}, bucket 19, is passed over, for it does not "
        f"compile any more: unknown schedule field name: tune again with `kdagen tune`"
    )


# -- files


def test_the_tables_of_the_user_hide_those_that_are_shipped(folders):
    shipped, own = folders
    write(shipped, [entry("shipped"), entry("shipped too", bucket=12)])
    assert name(select(KEY)) == "shipped"
    write(own, [entry("own", policy="graph warm")])
    assert name(select(KEY)) == "own"
    assert {e.schedule["name"] for e in tables()} == {"own", "shipped too"}


def test_an_entry_survives_its_file(folders):
    one = entry("a", facts={"ms": 1.5, "versions": {"cuda": "13.0"}, "workload": "1x8192x64"})
    path = write(folders[1], [one])
    (found,) = module.read(path)
    assert (found, found.facts) == (one, one.facts)
    assert entry_of(json.loads(json.dumps(one.line()))) == one


def test_keys_name_all_that_must_agree():
    free = {"device", "processors", "bucket"}
    assert len(KEY.fixed) == len(dataclasses.fields(Key)) - len(free)
