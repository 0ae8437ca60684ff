"""`kdagen tune why`: for each study, shape and machine who won and by how much, what limits it, and the funnel.

Text for people, of a folder at any stage; the page with plots is kdagen.autotune.report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from kdagen.autotune.folder import Folder
from kdagen.autotune.progress import digits
from kdagen.autotune.standing import Place, Standing, StudyStanding, Timed

CLOSE = 1.3  # times the best that was measured: what a pick of the model should be within
KINDS = 4  # of reasons that a line has room for


def why(folder: Folder) -> str:
    """What the folder's log says, in words."""
    lines = list(folder.log)
    standing = Standing(folder.sweep, lines)
    parts = [_study(folder, name, study, lines) for name, study in standing.studies.items()]
    return "\n".join(line for part in parts for line in [*part, ""])


def _study(folder: Folder, name: str, study: StudyStanding, lines: list[dict]) -> Iterator[str]:
    task = study.study.task
    dims = f"K = {task.head_dim[0]}, V = {task.head_dim[1]}"
    states = f"states {task.state.layout} {task.state.dtype}"
    yield name
    yield f"  {task.op} for {task.purpose} on {task.device}, {dims}, {task.dtype}, {states}"
    if not study.places:
        yield from [
            "",
            f"  not measured yet; next: {_next(study)}",
            *(f"    {w}: {words}" for w, words in expected(study)),
        ]
    for place in study.places:
        yield from ["", f"  measured on {place}; {versions(place)}"]
        for workload in map(str, study.study.workloads):
            yield f"    {workload}"
            yield from (f"      {label:<11}{text}" for label, text in shape(study, place, workload))
        yield from (f"    {line}" for line in [picks(study, place)] if line)
    yield from ["", "  funnel", *(f"    {line}" for line in funnel(study))]
    if left := waiting(folder, study, lines):
        yield f"    {left} candidates wait, chosen by the search"
    if failed := failures(study):
        yield from ["", "  failures"]
    for rung, candidate, schedule, what in failed:
        yield f"    {rung:<10}{candidate}  {schedule}: {what}"


def _next(study: StudyStanding) -> str:
    if not study.lines["model"]:
        return "`kdagen tune plan`"
    ready = study.lines["identical"] or study.study.task.target == "cpu"
    return "`kdagen tune measure`" if ready else "`kdagen tune compile`"


def expected(study: StudyStanding) -> Iterator[tuple[str, str]]:
    """Of each shape what the model expects."""
    for workload in map(str, study.study.workloads):
        if pick := study.pick(workload):
            line, default = study.model(pick), study.model(study.default).get("predicted_ms", {}).get(workload)
            beside = f", {digits(default)} for the default" if default and pick != study.default else ""
            words = f"{digits(line['predicted_ms'][workload])} ms predicted for {study.difference(pick)}"
            yield workload, f"{words} ({line['limiter'][workload]}){beside}"


def waiting(folder: Folder, study: StudyStanding, lines: list[dict]) -> int:
    """How many candidates wait of those that the search wants as of now."""
    from kdagen.autotune.search import todo

    return sum(study.waits(candidate.id) for candidate in todo(folder, study.study, lines))


def shape(study: StudyStanding, place: Place, workload: str) -> Iterator[tuple[str, str]]:
    """What is to be said of one shape on one machine: labels and texts."""
    ranking = study.ranking(place, workload)
    if not ranking:
        yield "winner", "none: not measured yet"
        return
    best, default = ranking[0], study.times(place, workload).get(study.twin(study.default))
    screened = "" if best.rung == "final" else "; screened only, no final yet"
    yield "winner", f"{timed(best)}  {study.difference(best.candidate)}{screened}"
    for second in ranking[1:2]:
        tie = ", a tie: the intervals overlap" if best.interval.overlaps(second.interval) else ""
        yield "runner-up", f"{timed(second)}  {study.difference(second.candidate)}; {_slower(second, best)}{tie}"
    if default and default.candidate != best.candidate:
        yield "default", f"{timed(default)}  the winner is {default.ms / best.ms:.2f}x as fast"
    if best.unsteady:
        yield "caution", f"the device was not steady: {best.unsteady}"
    yield from _model(study, place, workload, best)


def _slower(second: Timed, best: Timed) -> str:
    """The simplest of those that tie wins, so that second may be the faster one."""
    ratio = second.ms / best.ms
    if ratio >= 2:
        return f"takes {ratio:.1f}x as long"
    return f"{abs(ratio - 1):.1%} {'slower' if ratio >= 1 else 'faster'}"


def _model(study: StudyStanding, place: Place, workload: str, best: Timed) -> Iterator[tuple[str, str]]:
    limiter = (study.model(best.candidate).get("limiter") or {}).get(workload)
    if part := study.roofline(best, workload):
        yield "limiter", f"{limiter}, by the model; {part:.0%} of roofline"
    if pick := study.pick(workload):
        ratio = study.pick_ratio(place, workload)
        what = f"{ratio:.2f}x the best measured" if ratio else f"not timed ({_fate(study, study.twin(pick))})"
        yield "model", f"untuned, its pick is {study.difference(pick)}: {what}"
    tried, faster = study.audit(place, workload)
    if tried:
        trust = "do not trust it here" if faster else "it may be trusted here"
        timed = f"{len(tried)} of the model's rejects timed, {len(faster)} faster than all that it kept"
        yield "audit", f"{timed}: {trust}"


def picks(study: StudyStanding, place: Place) -> str:
    """How good the model's own choices are, in one sentence; "" where none was timed."""
    ratios = [r for w in study.study.workloads if (r := study.pick_ratio(place, str(w)))]
    if not ratios:
        return ""
    close = sum(r <= CLOSE for r in ratios)
    return (
        f"the model's untuned picks are within {CLOSE}x of the best measured on {close} of {len(ratios)} shapes, "
        f"{max(ratios):.2f}x at worst"
    )


def _fate(study: StudyStanding, candidate: str) -> str:
    """The last that is known of a candidate."""
    rung = [rung for rung in study.lines if candidate in study.lines[rung]][-1]
    return study.verdict(rung, candidate).get("reason") or f"{rung} was its last rung"


def funnel(study: StudyStanding) -> list[str]:
    """How many candidates came to each rung, and why they went no further."""
    lines = [f"{'rung':<10}{'came':>6}{'kept':>6}{'rejected':>10}{'failed':>8}"]
    for step in study.funnel():
        counts = step.verdicts.get("kept", 0), step.verdicts.get("rejected", 0), step.verdicts.get("failed", 0)
        reasons = [f"{n}: {reason}" for n, reason in step.reasons]
        reasons[KINDS:] = ["..."] if reasons[KINDS:] else []
        figures = f"{step.rung:<10}{step.reached:>6}{counts[0]:>6}{counts[1]:>10}{counts[2]:>8}"
        lines.append(f"{figures}  {'; '.join(reasons)}".rstrip())
    return lines


def failures(study: StudyStanding) -> list[tuple[str, str, str, str]]:
    """Rung, candidate, schedule and what happened, of each failure."""
    return [
        (line["rung"], line["candidate"], study.difference(line["candidate"]), f"{line['reason']}{_again(study, line)}")
        for line in study.failures()
    ]


def _again(study: StudyStanding, line: dict) -> str:
    deaths = study.deaths[line["candidate"]]
    return f"; quarantined after {deaths} deaths" if line["candidate"] in study.quarantined else ""


def conditions(study: StudyStanding, place: Place) -> list[tuple[str, str]]:
    """What was so while finals were timed: versions, clocks, temperature, throttling, load; each by all its values."""
    lines = (lines.get((place, str(w))) for lines in study.lines["final"].values() for w in study.study.workloads)
    states = [line.get("state") or {} for line in lines if line]
    seen: dict[str, set] = {}
    for name, value in (pair for state in states for when in state.values() for pair in _flat(when)):
        seen.setdefault(name, set()).add(value)
    return [("versions", versions(place)), *((name, _range(values)) for name, values in seen.items())]


def _flat(state: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, ", ".join(map(str, value)) or "none" if isinstance(value, list) else value


def _range(values: set) -> str:
    if all(isinstance(v, int | float) for v in values):
        return " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))
    return "; ".join(sorted(map(str, values)))


def timed(time: Timed) -> str:
    """A time with its interval."""
    interval = f" ({digits(time.low)} to {digits(time.high)})" if time.rung == "final" else ""
    return f"{digits(time.ms)} ms{interval}"


def versions(place: Place) -> str:
    """What it was measured with."""
    return ", ".join(f"{name} {version}" for name, version in json.loads(place.versions).items()) or "versions unknown"
