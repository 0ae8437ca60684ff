"""The process that gpu.py asks: `python gpu_work.py FOLDER.. DEVICE MARK`. It checks and times on the GPU.

Requests and replies are those of kdagen.autotune.worker, one JSON a line: {"do": "facts"}, or a unit's "asked" with
{"do": "correct" | "time" | "compare" | "overlap" | "ratio"}. A reply says under "run" what it was found under. A
process that a kernel broke ends, and another one starts; so all that a ratio is formed of is in one reply.
"""

from __future__ import annotations

import math
import sys
from functools import cached_property
from pathlib import Path

import gpu_contenders as contenders
import gpu_correct as correct
import gpu_decode
import gpu_experiments as experiments
import gpu_inference
import gpu_overlap as overlap
import gpu_timing as timing
import gpu_training
from gpu_cases import case_of
from gpu_report import DECODE, INFERENCE, TRAINING, Case, rows
from kdagen.autotune import launches
from kdagen.autotune.devices.clock import sets_needed
from kdagen.autotune.guarded import same_bits
from kdagen.autotune.worker import Answering, serve

from kdagen.errors import ArgumentError

WORK = {INFERENCE: gpu_inference, TRAINING: gpu_training, DECODE: gpu_decode}
CHECKED = (2, 100, 3)  # B, T, H of what peers are checked on


class Bench(Answering):
    """Answers by one GPU, on the kernels of some folders."""

    def __init__(self, folders: list[Path], mark):
        super().__init__(mark)
        self.folders, self.facts = folders, timing.facts()

    @cached_property
    def ceilings(self) -> dict:
        """What this GPU does at best, measured by this process."""
        return timing.ceilings()

    @cached_property
    def run(self) -> dict:
        """What the figures of this process are found under."""
        return {"facts": self.facts, "ceilings": self.ceilings}

    def _facts(self, request: dict) -> dict:
        return {"facts": self.facts}

    def _correct(self, request: dict) -> dict:
        """Of kernels, or of a peer."""
        import torch

        op, purpose, labels = request["op"], request["purpose"], request.get("labels")
        kernels = contenders.built(self.folders, op, purpose)
        facts = {name: x for name, x in self.facts.items() if name not in ("date", "state")}
        with torch.no_grad():
            if not labels:
                peer = contenders.peer(op, purpose)
                found = check_peer(WORK[purpose], op, peer, next(iter(kernels.values())))
            else:
                self.mark(labels[0])
                found = correct.check(op, kernels[labels[0]])
        return {"run": {"facts": facts}, "figures": _json(found)}

    def _time(self, request: dict) -> dict:
        """Of one case, in every mode, beside a peer if asked."""
        import torch

        case = case_of(self.folders, request)
        peer = case.peer if request["peer"] else None
        with torch.set_grad_enabled(case.purpose == TRAINING):
            sets, work, found = inputs(case, self.facts["l2_bytes"]), WORK[case.purpose], []
            whole = {label: self.marked(label, call) for label, call in work.whole(case, peer).items()}
            peaks = {label: timing.peak_bytes(call, sets[0]) for label, call in whole.items()}
            for mode in request["modes"]:
                calls = work.calls(case, mode, peer)
                times = timing.measure(calls, sets, request["rounds"], mode, self.mark_label)
                found += rows(case, mode, times, peaks, request.get("errors", {}), self.ceilings, peer)
        return {"run": self.run, "figures": {"rows": found}, "state": timing.state()}

    def _compare(self, request: dict) -> dict:
        """Contenders of an experiment, the first one being what the others are measured by."""
        reply = self._time(request)
        whole = [row for row in reply["figures"]["rows"] if not row["part"]]
        reply["figures"]["table"] = experiments.table(whole)
        return reply

    def _overlap(self, request: dict) -> dict:
        """A whole forward, one in segments, and one whose segments are prepared beside the scan."""
        import torch

        case = case_of(self.folders, request)
        kernels, (label,) = case.first, case.kernels
        pieces = overlap.pieces_of(kernels, case.shape[1])
        with torch.no_grad():
            sets = inputs(case, self.facts["l2_bytes"])
            for given in sets:
                given |= {n: overlap.cut(kernels, given["arguments"], n) for n in pieces}
            calls = {"whole": contenders.of(label, launches.pass_call(kernels, "forward"))}
            for words, call in (("in turn", overlap.in_turn(kernels)), ("side by side", overlap.side_by_side(kernels))):
                calls |= {f"{n} segments, {words}": contenders.of(n, call) for n in pieces}
            bits = {name: self.bits(kernels, case, call, name, sets[0]) for name, call in calls.items()}
            times = timing.measure(calls, sets, request["rounds"], "device", self.mark_label)
        found = experiments.table([{"contender": name, "ms": vars(t)} for name, t in times.items()])
        table = [{**row, "same_bits": bits[row["contender"]]} for row in found]
        return {"run": self.run, "figures": {"table": table}, "state": timing.state()}

    def bits(self, kernels, case: Case, call, name: str, given: dict) -> bool:
        """Whether a way of launching leaves the bits of a launch of the whole."""
        import torch

        (label,), by_role = case.kernels, kernels.by_role
        self.mark(name)
        launches.pass_call(kernels, "forward")(given[label])
        expected = {role: given[label][by_role[role]].clone() for role in ("out", "final_state")}
        count = int(name.split()[0]) if name != "whole" else 0
        found = given[count].results if count else {role: given[label][by_role[role]] for role in expected}
        for x in found.values():
            x.fill_(math.nan)
        call(given)
        torch.cuda.synchronize()
        return all(same_bits(found[role].view_as(x), x) for role, x in expected.items())

    def _ratio(self, request: dict) -> dict:
        """One op's kernels and others', on inputs of the same sizes."""
        import torch

        case = case_of(self.folders, request)
        every, calls = {case.op: case}, {}
        for op in request["others"]:
            every[op] = case_of(self.folders, {**request, "op": op})
        with torch.set_grad_enabled(case.purpose == TRAINING):
            drawn = {op: inputs(of, self.facts["l2_bytes"]) for op, of in every.items()}
            sets = [dict(zip(drawn, group)) for group in zip(*_as_many(list(drawn.values())))]
            for op, of in every.items():
                found = WORK[of.purpose].calls(of, "device", None)
                whole = {label: call for label, call in found.items() if ": " not in label}
                calls |= {f"{op} {label.removeprefix('kdagen ')}": _on(op, call) for label, call in whole.items()}
            times = timing.measure(calls, sets, request["rounds"], "device", self.mark_label)
        table = experiments.table([{"contender": name, "ms": vars(t)} for name, t in times.items()])
        return {"run": self.run, "figures": {"table": table}, "state": timing.state()}

    def mark_label(self, label: str) -> None:
        """Names the contender, not the part of its work."""
        self.mark(label.partition(": ")[0].removeprefix("kdagen "))

    def marked(self, label: str, call):
        def run(given):
            self.mark_label(label)
            return call(given)

        return run


def inputs(case: Case, l2_bytes: int) -> list[dict]:
    """Sets of inputs: what all share, and for each kind of kernels these with workspaces and results."""
    made, (batch, tokens, heads) = [], case.shape
    for seed in range(sets_needed(case.least_bytes[""], l2_bytes)):
        drawn = launches.arguments(case.first, (batch, min(tokens, launches.SAMPLED), heads), case.gate, seed)
        long = launches.stretched(case.first, contenders.on_gpu(drawn), tokens)
        shared = launches.shared_inputs(case.first, launches.ragged(long, case.lengths), seed)
        made.append(shared | {label: launches.memory(k, shared) for label, k in case.kernels.items()})
    return made


def check_peer(work, op: str, peer, kernels) -> dict:
    """As kernels are checked; that a peer does not run here says nothing about kdagen."""
    try:
        errors = work.check_peer(op, peer, kernels, launches.arguments(kernels, CHECKED))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return {"ok": False, "reason": f"does not run here: {type(error).__name__}: {first}", "errors": {}}
    off = [f"{name} is off by {error:.1e}" for name, (error, most) in errors.items() if not error <= most]
    return {"ok": not off, "reason": ", ".join(off), "errors": errors}


def _json(found: dict) -> dict:
    """Errors that no JSON holds are words."""
    errors = {n: [e if math.isfinite(e) else str(e) for e in pair] for n, pair in found["errors"].items()}
    return {**found, "errors": errors}


def _as_many(lists: list[list]) -> list[list]:
    """All as long as the longest: sets are used in turn anyway."""
    most = max(map(len, lists))
    return [[found[i % len(found)] for i in range(most)] for found in lists]


def _on(op: str, call):
    """A call, on the inputs of its op among those of several."""
    from kdagen.autotune.devices.clock import Call

    if not isinstance(call, Call):
        return lambda given: call(given[op])
    return Call(call.run, lambda given: call.before(given[op]), call.ahead)


def server_of(folders: list[Path], mark) -> Bench:
    """A Bench, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError(f"torch {torch.__version__} sees no GPU here: --dry-run shows what would be measured")
    return Bench(folders, mark)


if __name__ == "__main__":
    *given, device, mark = sys.argv[1:]
    serve(lambda marks: server_of([Path(folder) for folder in given], marks), int(mark))
