"""The log of a sweep: JSON lines that are only ever appended, one a (candidate, rung) or (candidate, rung, workload).

A line is an object with at least "task" (its name), "candidate" (its id), "rung" (of RUNGS), "verdict" (of VERDICTS)
and, unless it was kept, "reason". Measured lines (those of MEASURED) say under what in "under": kernels, policy,
device, processors, versions; a line counts again only where all of that is the same. A process that is killed leaves at
worst a torn last line, which the next reader skips and the next writer ends.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In the order in which a candidate climbs them.
RUNGS = ("space", "model", "lowered", "ptxas", "identical", "correct", "screen", "final")
MEASURED = ("correct", "screen", "final")
# "kept": goes on; "rejected": legal, but not worth going on; "failed": broke, or is wrong.
VERDICTS = ("kept", "rejected", "failed")


class Log:
    """One file of lines."""

    def __init__(self, path: Path):
        self.path, self._sync = path, True

    def append(self, task: str, candidate: str, rung: str, verdict: str, reason: str = "", **figures) -> dict:
        """Writes a line, whole and to the disk, and returns it."""
        assert rung in RUNGS and verdict in VERDICTS and (reason or verdict == "kept"), (rung, verdict, reason)
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"task": task, "candidate": candidate, "rung": rung, "verdict": verdict}
        line |= {"reason": reason} if reason else {}
        line |= {**figures, "at": at}
        text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell() and not _ends_line(file):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            if self._sync:
                os.fsync(file.fileno())
        return line

    @contextmanager
    def together(self) -> Iterator[None]:
        """Many lines that cost little to find again go to the disk at once."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True
            if self.path.exists():
                with open(self.path, "ab") as file:
                    os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict]:
        """Every whole line, in order."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and {"candidate", "rung", "verdict"} <= line.keys():
                    yield line


def _ends_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
