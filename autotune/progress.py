"""`say`: what a sweep tells people while it runs; a live display on a terminal, plain lines elsewhere, or nothing.

say(line)               a line was appended to the log
say.stage(name, total)  work begins that has so many steps; a step is a line that ends what a candidate does in a stage
                        (rejected, failed, or kept on one of the rungs ENDS)
say.note(text)          something worth a line of its own: a worker that is started again, a sweep that goes on

Every object may be called from several threads. What is shown is counted by kdagen.autotune.board.
"""

from __future__ import annotations

import sys
import threading
import time


class Silent:
    """Says nothing: for tests and for calls from programs."""

    def __call__(self, line: dict) -> None:
        pass

    def stage(self, name: str, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Plain(Silent):
    """A line for each event of note; of the many that are not, at most one a second."""

    def __init__(self, out=None, every: float = 1.0, clock=time.monotonic):
        self._out, self._every, self._clock = out or sys.stderr, every, clock
        self._lock, self._name, self._total, self._done, self._last = threading.Lock(), "", 0, 0, float("-inf")

    def __call__(self, line: dict) -> None:
        with self._lock:
            self._done += 1
            if line["verdict"] == "failed":
                self._print(f"failed {line['candidate']} at {line['rung']}: {line['reason']}")
            elif self._clock() - self._last >= self._every:
                self._last = self._clock()
                self._print(f"{self._name} {self._done}/{self._total}")

    def stage(self, name: str, total: int) -> None:
        with self._lock:
            self._name, self._total, self._done = name, total, 0
            self._print(f"{name}: {total}")

    def note(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)
