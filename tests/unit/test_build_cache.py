"""The cache: made once among processes, never half made however a build dies, checked whenever it is read."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kdagen.build.cache import STALE_SECONDS, Cache, key

# Makes entry "k" of the cache argv[1] from ten files with a pause after each, and notes in argv[2] that it did.
MAKER = """
import pathlib, sys, time
from kdagen.build.cache import Cache

def fill(folder):
    with open(sys.argv[2], "a") as notes:
        notes.write("made\\n")
    for i in range(10):
        (folder / f"{i}.txt").write_text(str(i) * 50_000)
        time.sleep(float(sys.argv[3]))

print("ready", flush=True)
Cache(pathlib.Path(sys.argv[1])).make("k", fill)
"""


def maker(root, notes, pause) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", MAKER, root, notes, str(pause)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def fill(folder):
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")


def test_an_entry_is_made_once(cache):
    made = []
    for _ in range(2):
        entry, cached = cache.make("k", lambda folder: (made.append(1), fill(folder)))
    assert (len(made), cached, cache.get("k")) == (1, True, entry)
    assert (entry / "b.txt").read_text() == "b"


def test_the_key_depends_on_contents_and_not_on_their_order():
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1, "b": 3})


def test_what_fails_leaves_nothing(cache):
    def fail(folder):
        fill(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.make("k", fail)
    assert cache.get("k") is None
    assert list(cache.temporary.iterdir()) == []


@pytest.mark.parametrize("damage", ["change", "remove", "add", "seal"])
def test_a_corrupt_entry_is_reported_and_made_again(cache, damage, caplog):
    entry, _ = cache.make("k", fill)
    if damage == "change":
        (entry / "a.txt").write_text("A")
    elif damage == "remove":
        (entry / "a.txt").unlink()
    elif damage == "add":
        (entry / "c.txt").write_text("c")
    else:
        (entry / "sha256.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert cache.get("k") is None
    (line,) = caplog.messages
    assert line.startswith(f"cache entry {entry} is corrupt (") and line.endswith("): building it again")
    assert cache.make("k", fill)[1] is False
    assert cache.get("k") == entry


def test_two_processes_make_an_entry_once(cache, tmp_path):
    notes = tmp_path / "notes"
    both = [maker(cache.entries.parent, notes, 0.05) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert notes.read_text() == "made\n"
    assert cache.get("k")


def test_a_kill_at_any_moment_leaves_all_or_nothing(cache, tmp_path):
    dice, seen = random.Random(0), set()
    for delay in [0, *(dice.uniform(0, 0.2) for _ in range(10))]:  # making the entry takes at least 0.1 s
        shutil.rmtree(cache.entries / "k", ignore_errors=True)
        process = maker(cache.entries.parent, tmp_path / "notes", 0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = os.listdir(cache.entries / "k") if (cache.entries / "k").exists() else []
        seen.add(len(files))
        assert len(files) in (0, 11)  # ten files and the seal
    assert cache.make("k", fill)[0] == cache.get("k")  # the dead process holds no lock
    assert 0 in seen


def test_what_the_killed_left_is_swept_when_it_is_old(cache):
    old, new = cache.temporary / "old", cache.temporary / "new"
    old.mkdir()
    new.mkdir()
    then = time.time() - STALE_SECONDS - 60
    os.utime(old, (then, then))
    cache.make("k", fill)
    assert (old.exists(), new.exists()) == (False, True)
