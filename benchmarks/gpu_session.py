"""One call of gpu.py: units of work by processes that own the GPU, until the time is up, each into one record.

Where kernels break a process, or hang, that is a finding: they are named, left out, and another process goes on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import gpu_cases as cases
import gpu_sanitizer as sanitizer
from gpu_results import Results, Unit, path_for
from kdagen.autotune.bench import in_threads
from kdagen.autotune.pool import Worker, WorkerDied
from kdagen.autotune.progress import Silent
from rich.console import Console

WORK = Path(__file__).parent / "gpu_work.py"
PATIENCE = 240  # seconds that a unit may take: peers tune themselves at first
SANITIZER_SECONDS = 240
LEAST = 20  # seconds without which no unit is begun
console = Console(width=200, highlight=False, soft_wrap=True)


class GpuWorker(Worker):
    """A process that owns the GPU's figures: gpu_work.py."""

    def __init__(self, folders: list[Path]):
        super().__init__("cuda:0")
        self.program = (str(WORK), *map(str, folders))


class Session:
    """One call of gpu.py: what is done until the time is up, and where it is written."""

    def __init__(self, folders: list[Path], out: Path, until: float, jobs: int = 1, worker=None, fresh=False):
        self.folders, self.until, self.jobs, self.lock = folders, until, jobs, threading.Lock()
        self.make = lambda: (worker or GpuWorker)(folders)
        self.worker = self.make()
        facts = self.worker.ask({"do": "facts"}, until - time.monotonic())["facts"]
        self.results = Results(path_for(out, facts, fresh))
        self.results.facts = facts

    def checked(self, units: list[Unit]) -> None:
        """Those of "correct": several processes at a time, each with all kernels of an op and purpose."""
        groups: dict[tuple, list[Unit]] = {}
        for unit in self._missing(units):
            groups.setdefault((unit.asked["op"], unit.asked["purpose"]), []).append(unit)
        waiting = deque(groups.values())

        def work(worker) -> None:
            try:
                while waiting:
                    for unit in self._pop(waiting):
                        self.do(unit, worker, "correct")
            finally:
                if worker is not self.worker:
                    worker.end()

        self._several(work, [self.worker, *(self.make() for _ in range(min(self.jobs, len(groups)) - 1))])

    def sanitized(self, units: list[Unit]) -> None:
        """Those of "sanitizer", several at a time."""
        waiting = deque([unit] for unit in self._missing(units))

        def work(_) -> None:
            while waiting:
                for unit in self._pop(waiting):
                    self._sanitize(unit)

        self._several(work, range(self.jobs))

    def timed(self, units: list[Unit], do) -> None:
        """All other stages: by one process that has the GPU for itself; kernels that are off are left out."""
        for unit in map(self._sound, self._missing(units)):
            if unit.asked["unknown"]:
                self._left(unit)
            elif unit.asked["labels"]:
                self.do(unit, self.worker, do)
            else:
                self._left(unit, "no kernels that are right")

    def _missing(self, units: list[Unit]) -> list[Unit]:
        return [unit for unit in units if not self.results.find(unit)]

    def _pop(self, waiting: deque) -> list[Unit]:
        try:
            return waiting.popleft()
        except IndexError:
            return []

    def _several(self, work, over) -> None:
        if bugs := in_threads([lambda item=item: work(item) for item in over]):
            raise bugs[0]

    def do(self, unit: Unit, worker, do: str) -> None:
        """A record of one unit; without the contenders that broke the process, which are named."""
        broken: dict[str, str] = {}
        while unit.asked.get("labels", True):
            kill = min(PATIENCE, self.until - time.monotonic())
            if kill < LEAST:
                return self._left(unit)
            began = time.monotonic()
            try:
                reply = worker.ask({"do": do, **unit.asked}, kill, Notes())
            except WorkerDied as death:
                if death.kind == "hang" and kill < PATIENCE:
                    return self._left(unit)
                if not death.running or death.running in broken:
                    return self._add(unit, {}, failed=f"{death.kind}: {death}")
                broken[death.running] = f"{death.kind}: {death}"
                unit = unit.without(death.running)
                continue
            if "error" in reply and reply["running"] and reply["running"] not in broken:
                broken[reply["running"]] = reply["reason"]
                unit = unit.without(reply["running"])
                continue
            more = {"broken": broken} if broken else {}
            if "error" in reply:
                return self._add(unit, {}, failed=reply["reason"], **more)
            seconds = round(time.monotonic() - began, 1)
            found = {"figures": reply["figures"], "state": reply.get("state"), "seconds": seconds}
            return self._add(unit, reply["run"], **found, **more, **unit.asked.get("out", {}))
        return self._add(unit, {}, failed="; ".join(broken.values()), broken=broken)

    def _sanitize(self, unit: Unit) -> None:
        left = self.until - time.monotonic()
        if left < LEAST:
            return self._left(unit)
        asked = unit.asked
        program = sanitizer.watched(asked["op"], asked["purposes"], self.folders)
        found = sanitizer.run(asked["tool"], program, min(SANITIZER_SECONDS, left))
        if found["verdict"] == "late" and left < SANITIZER_SECONDS:
            return self._left(unit)
        return self._add(unit, {}, figures=found)

    def _sound(self, unit: Unit) -> Unit:
        """Without what is known to be off, and with the errors of the rest; what was not checked is so now."""
        asked, wanted = unit.asked, dict.fromkeys(unit.asked["labels"])
        for label in wanted:
            wanted[label] = self._standing(asked["op"], asked["purpose"], label)
        for other in asked.get("others", ()):
            wanted[other] = self._standing(other, asked["purpose"], asked["labels"][0])
        some = any(found and found["ok"] for found in wanted.values())
        peer = self._peer(asked["op"], asked["purpose"]) if some and asked.get("peer") else None
        wanted |= {"peer": peer} if peer else {}
        out = {name: found["reason"] for name, found in wanted.items() if found and not found["ok"]}
        right = {name: found for name, found in wanted.items() if found and found["ok"]}
        more = {
            "labels": [label for label in asked["labels"] if label in right],
            "others": [other for other in asked.get("others", ()) if other in right],
            "peer": "peer" in right,
            "errors": {
                name: max((e for e, _ in found["errors"].values()), default=None) for name, found in right.items()
            },
            "unknown": [name for name, found in wanted.items() if not found],
        }
        return replace(unit, asked={**asked, **more, **({"out": {"left_out": out}} if out else {})})

    def _standing(self, op: str, purpose: str, label: str) -> dict | None:
        """What the check found of kernels, in this call or before."""
        (unit,) = (u for u in cases.correct_units(self.folders, [purpose], [op]) if u.asked.get("labels") == [label])
        return self._found(unit)

    def _peer(self, op: str, purpose: str) -> dict | None:
        units = [u for u in cases.correct_units(self.folders, [purpose], [op]) if u.asked.get("peer")]
        return self._found(units[0]) if units else None

    def _found(self, unit: Unit) -> dict | None:
        if not self.results.find(unit):
            self.do(unit, self.worker, "correct")
        record = self.results.find(unit) or {}
        return record.get("figures") or ({"ok": False, "reason": record["failed"]} if "failed" in record else None)

    def _add(self, unit: Unit, run: dict, **found) -> None:
        known = {name: self.results.facts[name] for name in self.results.facts if name not in ("date", "state")}
        with self.lock:
            self.results.add(unit, run or {"facts": known}, **found)
        console.print(f"{time.strftime('%H:%M:%S')}  {unit.stage}: {unit.name}{_in_short(found)}")

    def _left(self, unit: Unit, why: str = "no time") -> None:
        with self.lock:
            self.results.left.append(f"{unit.stage}: {unit.name}: {why}")

    def end(self) -> None:
        """Writes what is left to do."""
        self.worker.end()
        self.results.save()


class Notes(Silent):
    """Says that a process was started again."""

    def note(self, text: str) -> None:
        console.print(text)


def _in_short(found: dict) -> str:
    """A record's outcome in a line."""
    figures = found.get("figures", {})
    if "failed" in found:
        return f": failed: {found['failed']}"
    if "verdict" in figures:
        return f": {figures['verdict']}"
    if "ok" in figures:
        return f": {'right' if figures['ok'] else figures['reason']}"
    times = {row["contender"]: row["ms"] for row in figures.get("table", [])}
    times = times or {row["contender"]: row["ms"]["median"] for row in figures["rows"] if not row["part"]}
    return ": " + ", ".join(f"{contender} {ms:.3f} ms" for contender, ms in times.items())
