"""A store of finished folders, each under the hash of everything that it was made from.

An entry is written to a temporary folder, sealed with the hash of every file, and renamed into place; so a build
that is killed leaves no half-made entry, and two builds of the same thing make it once (the second waits).
An entry whose hashes no longer agree is reported, dropped and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

SEAL = "sha256.json"
STALE_SECONDS = 24 * 3600  # temporary folders older than this were left by builds that died
log = logging.getLogger("kdagen.build")


def key(contents: dict) -> str:
    """The name of an entry: a hash of all that decides what is in it."""
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class Cache:
    """Entries are folders root/entries/<key>; locks and unfinished work lie beside them."""

    def __init__(self, root: Path):
        self.entries, self.locks, self.temporary = root / "entries", root / "locks", root / "tmp"
        for folder in (self.entries, self.locks, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Path | None:
        """The entry, if it is there and whole."""
        entry = self.entries / key
        if not entry.exists() or _problem(entry) is None:
            return entry if entry.exists() else None
        with self.lock(key):
            return self._checked(key)

    def make(self, key: str, fill: Callable[[Path], None]) -> tuple[Path, bool]:
        """The entry and whether it was there already; if not, `fill(folder)` makes it, once among all processes."""
        with self.lock(key):
            if entry := self._checked(key):
                return entry, True
            self._sweep()
            folder = Path(tempfile.mkdtemp(prefix=f"{key[:12]}-", dir=self.temporary))
            try:
                fill(folder)
                _seal(folder)
                os.replace(folder, self.entries / key)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return self.entries / key, False

    @contextmanager
    def lock(self, key: str):
        """Held by one process at a time; the system releases it if that process dies."""
        from filelock import FileLock

        with FileLock(self.locks / f"{key}.lock"):
            yield

    def _checked(self, key: str) -> Path | None:
        """The entry if it is whole; a corrupt one is dropped. Call with the lock held."""
        entry = self.entries / key
        if not entry.exists():
            return None
        if (problem := _problem(entry)) is None:
            return entry
        log.warning("cache entry %s is corrupt (%s): building it again", entry, problem)
        dropped = Path(tempfile.mkdtemp(prefix="corrupt-", dir=self.temporary))
        os.replace(entry, dropped / key)
        shutil.rmtree(dropped, ignore_errors=True)
        return None

    def _sweep(self) -> None:
        """Removes what builds that were killed left behind long ago."""
        for folder in self.temporary.iterdir():
            try:
                stale = time.time() - folder.stat().st_mtime > STALE_SECONDS
            except FileNotFoundError:
                continue
            if stale:
                shutil.rmtree(folder, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != SEAL
    }


def _seal(folder: Path) -> None:
    (folder / SEAL).write_text(json.dumps(_hashes(folder), indent=1))


def _problem(entry: Path) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        wanted, found = json.loads((entry / SEAL).read_text()), _hashes(entry)
    except (OSError, ValueError) as error:
        return f"{SEAL}: {error}"
    different = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return f"{', '.join(different)} changed" if different else None
