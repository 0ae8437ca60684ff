"""The rungs that need no compiler: which candidates are legal, and which of these the model cannot rule out."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from kdagen.autotune import gpus
from kdagen.autotune.folder import Folder
from kdagen.autotune.model import Prediction, predicted
from kdagen.autotune.space import Rejected, Survey, space_of
from kdagen.autotune.sweep import CPU, Candidate, Study, Sweep, Task, short_hash

from kdagen.errors import ArgumentError
from kdagen.schedule import Choices
from kdagen.target import target

MARGIN = 1.25  # times the best estimate: what is bound to take longer, on every workload, is rejected


def plan(folder: Folder, say) -> None:
    """Writes what the space and the model say of each study's candidates; what the log says already is left."""
    with folder.lock():
        studies = [(study, surveyed(study, folder.sweep.fixed)) for study in folder.sweep.studies]
        said = {(line["rung"], line["candidate"]) for line in folder.log}
        for study, survey in studies:
            judged = judge(study, survey.legal, folder.sweep)
            refused = [r for r in survey.rejected if ("space", refusal_id(study.task, r)) not in said]
            new = [j for j in judged if ("model", j.candidate.id) not in said]
            say.stage(f"plan {study.task.name}", len(refused) + len(new))
            with folder.log.together():
                for rejected in refused:
                    say(_space_line(folder, study.task, rejected))
                for candidate in new:
                    say(candidate.append(folder))
            counts = survey.size, len(survey.legal), sum(j.verdict == "kept" for j in judged)
            say.note("{}: {:,} candidates, {:,} of them legal, {:,} go on".format(study.task.name, *counts))


def surveyed(study: Study, fixed: dict) -> Survey:
    """The survey of a study's space, some of its axes narrowed; fields of other studies' schedules are no matter."""
    space = space_of(_checked(study.task))
    return space.survey(space.own(fixed))


def _checked(task: Task) -> Task:
    """The task, whose device must be known and of its target."""
    if task.target == CPU:
        return task
    gpu = gpus.find(task.device)
    if gpu is None:
        raise ArgumentError(
            f"no facts about the device '{task.device}', which candidates are judged by: expected one of "
            f"{', '.join(gpus.GPUS)}, or another one added to autotune/gpus.py"
        )
    if gpu.target != task.target:
        raise ArgumentError(f"the device {gpu.name} is of target {gpu.target}, not {task.target}: choose one of them")
    if not target(task.target).compiles:
        raise ArgumentError(f"for {gpu.name} ({gpu.target}) kdagen writes sources, which it cannot compile or measure")
    return task


# -- space


def refusal_id(task: Task, refused: Rejected) -> str:
    """Stands for all candidates that were refused for the same reason."""
    return short_hash({"task": task.fields(), "constraint": refused.constraint, "fields": refused.fields})


def _space_line(folder: Folder, task: Task, refused: Rejected) -> dict:
    """One line for many candidates: those that have these fields, whatever the others are."""
    return folder.log.append(
        task.name,
        refusal_id(task, refused),
        "space",
        "rejected",
        refused.reason,
        schedule=refused.fields,
        constraint=refused.constraint,
        candidates=refused.candidates,
    )


# -- model


@dataclass(frozen=True)
class Judged:
    """A legal candidate and what the model says of it."""

    candidate: Candidate
    predictions: dict[str, Prediction]  # by workload; none on a CPU
    default: bool
    reason: str  # why the model rules it out, if it does
    audit: bool  # whether it is tried all the same, to see whether the model was right

    @property
    def verdict(self) -> str:
        return "rejected" if self.reason and not self.audit else "kept"

    def append(self, folder: Folder) -> dict:
        """Its line of the log."""
        figures = {
            "schedule": self.candidate.schedule.fields(),
            "predicted_ms": {w: rounded(p.ms) for w, p in self.predictions.items()},
            "bound_ms": {w: rounded(p.bound_ms) for w, p in self.predictions.items()},
            "limiter": {w: p.limiter for w, p in self.predictions.items()},
        }
        figures |= {"audit": True} if self.audit else {}
        figures |= {"default": True} if self.default else {}
        task, candidate = self.candidate.task.name, self.candidate.id
        return folder.log.append(task, candidate, "model", self.verdict, self.reason, **figures)


def judge(study: Study, legal: tuple[Choices, ...], sweep: Sweep) -> list[Judged]:
    """What the model says of all candidates, the untuned default first; it is kept whatever the model says."""
    task, default = study.task, space_of(study.task).default
    schedules = [default, *(s for s in legal if s != default)]
    if task.target == CPU:
        return [Judged(Candidate(task, s), {}, s == default, "", False) for s in schedules]
    predictions = {s: {str(w): predicted(task, s, w) for w in study.workloads} for s in schedules}
    best = {str(w): min(p[str(w)].ms for p in predictions.values()) for w in study.workloads}
    found = []
    for schedule in schedules:
        candidate = Candidate(task, schedule)
        reason = "" if schedule == default else too_slow(predictions[schedule], best)
        audit = bool(reason) and audited(sweep, candidate)
        found.append(Judged(candidate, predictions[schedule], schedule == default, reason, audit))
    return found


def too_slow(predictions: dict[str, Prediction], best: dict[str, float]) -> str:
    """Why a candidate cannot win on any workload; "" if it can."""
    behind = {workload: p.bound_ms / best[workload] for workload, p in predictions.items()}
    nearest = min(behind, key=behind.get)
    if behind[nearest] <= MARGIN:
        return ""
    p = predictions[nearest]
    return (
        f"takes {p.bound_ms:.3g} ms at least at {nearest} ({p.limiter}), {behind[nearest]:.2f} times the best estimate"
    )


def audited(sweep: Sweep, candidate: Candidate) -> bool:
    """Whether a reject is tried all the same: drawn for each by itself, so that nothing depends on their order."""
    return random.Random(f"{sweep.seed} {candidate.id}").random() < sweep.audit


def rounded(ms: float) -> float:
    """With five digits that count."""
    return round(ms, 4 - math.floor(math.log10(ms))) if ms > 0 else ms
