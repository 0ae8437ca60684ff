"""A device that is a recording: "replay:LOG.jsonl" answers as the device did on which that log was made.

Checks answer what they did; times are drawn about the recorded median with the spread that its interval tells of.
For tests, and to run a search again without the device: it needs no torch. Options follow as in a URL,
"replay:LOG.jsonl?seed=1&slower=1.2&faults=FAULTS.jsonl":

    seed    of the draws
    slower  all times by this factor: a second device of the same kind that is not as fast
    faults  a file of JSON lines {"does", "at", "candidate", "on"}: one of FAULTS, or "throttle"; at "check", "samplers"
            or "sample"; of that candidate, or any if left out; on these attempts, from 1. Attempts are counted by lines
            {"attempt": number of the fault} that are appended to the file, and so over the deaths of workers
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from kdagen.autotune.devices import Compiled, Contender, DeviceError, Sampler
from kdagen.autotune.log import MEASURED, Log
from kdagen.autotune.sweep import Candidate, Policy, Workload

from kdagen.errors import ArgumentError

SPREAD = 0.01  # standard deviation of calls, where only a median was recorded
WIDTHS = 2 * 1.96 * 1.2533  # of the median's interval, times the root of calls, in standard deviations of normal noise


class OutOfMemoryError(RuntimeError):
    """As torch's, which a recording does without."""


def _raise(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[], None]] = {
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
    "out of memory": lambda: _raise(OutOfMemoryError("asked of a recording")),
    "device error": lambda: _raise(DeviceError("asked of a recording")),
    "error": lambda: _raise(RuntimeError("asked of a recording")),
}


class Device:
    """One recording."""

    def __init__(self, spec: str):
        path, _, options = spec.partition("?")
        options = dict(parse_qsl(options))
        if unknown := sorted(set(options) - {"seed", "slower", "faults"}):
            raise ArgumentError(f"option {', '.join(unknown)} of replay: expected seed, slower or faults")
        self.seed, self.slower = int(options.get("seed", 0)), float(options.get("slower", 1))
        self.faults = Path(options["faults"]) if "faults" in options else None
        self.path, self.slowed = Path(path), False
        self.lines = {_key(line): line for line in Log(self.path) if line["rung"] in MEASURED}
        if not self.lines:
            raise ArgumentError(f"{path} records nothing that was measured: expected the log.jsonl of a finished sweep")

    def facts(self) -> dict:
        """As last recorded."""
        under = list(self.lines.values())[-1]["under"]
        return {n: under[n] for n in ("device", "processors", "versions", "kernels")} | {"compiled": False}

    def state(self) -> dict:
        """As before the last final of the recording, if it has any; with the fault "throttle", slowed once."""
        states = [line["state"].get("before", {}) for line in self.lines.values() if "state" in line]
        slowed, self.slowed = {"throttling": ["asked of a recording"]} if self.slowed else {}, False
        return {**(states[-1] if states else {}), **slowed}

    def check(self, candidate: Candidate, compiled: Compiled | None = None) -> dict:
        """As recorded."""
        self._fault("check", candidate.id)
        line = self._line(candidate.id, "correct")
        return {"ok": line["verdict"] == "kept", "reason": line.get("reason", ""), "errors": line.get("errors", {})}

    def samplers(self, contenders: list[Contender], workload: Workload, policy: Policy) -> dict[str, Sampler]:
        """Draws about what was recorded in finals, else in screening."""
        return {candidate.id: self._sampler(candidate.id, str(workload)) for candidate, _ in contenders}

    def _sampler(self, candidate: str, workload: str) -> Sampler:
        self._fault("samplers", candidate)
        screened, final = self._line(candidate, "screen", workload), self.lines.get((candidate, "final", workload), {})
        ms = final.get("median", screened["ms"])
        width = (final["high"] - final["low"]) * final["calls"] ** 0.5 if "high" in final else None
        spread = SPREAD * ms if width is None else width / WIDTHS
        draw = random.Random(f"{self.seed} {candidate} {workload}").gauss

        def sample() -> float:
            self._fault("sample", candidate)
            return self.slower * max(ms / 10, draw(ms, spread))

        return sample

    def _line(self, candidate: str, rung: str, workload: str = "") -> dict:
        """That of the recording; what is recorded as a death or a failure to run happens again."""
        line = self.lines.get((candidate, rung, workload))
        if line is None:
            shape = f" on {workload}" if workload else ""
            raise ArgumentError(f"{self.path} does not record candidate {candidate} at {rung}{shape}")
        if "death" in line:
            FAULTS[line["death"]]()
        if line["verdict"] == "failed" and rung != "correct":
            raise RuntimeError(line["reason"])
        return line

    def _fault(self, at: str, candidate: str) -> None:
        """The faults that are asked for here."""
        lines = [json.loads(text) for text in self.faults.read_text().splitlines()] if self.faults else []
        asked = [line for line in lines if "does" in line]
        for number, fault in enumerate(asked):
            if fault["at"] == at and fault.get("candidate", candidate) == candidate:
                with open(self.faults, "a") as file:
                    file.write(json.dumps({"attempt": number}) + "\n")
                if lines.count({"attempt": number}) + 1 in fault["on"]:
                    self._do(fault["does"])

    def _do(self, fault: str) -> None:
        if fault == "throttle":
            self.slowed = True
        else:
            FAULTS[fault]()


def _key(line: dict) -> tuple[str, str, str]:
    return line["candidate"], line["rung"], line.get("workload", "")
