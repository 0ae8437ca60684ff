"""What gpu.py is to do, stage by stage, as units of work: reads built folders, needs no GPU.

correct      each op's kernels for each purpose against the recurrence, and replays of a launch and of a CUDA graph
sanitizer    small launches under compute-sanitizer
time         every op at every shape beside its peer
roles, families, segments, overlap, ratio    open questions: see gpu_experiments.py
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import click
import gpu_contenders as contenders
import gpu_experiments as experiments
import gpu_sanitizer as sanitizer
from gpu_report import DECODE, INFERENCE, TRAINING, Case
from gpu_results import Unit
from kdagen.autotune.sweep import short_hash

OPS = ("kda", "kda_bounded", "gated_deltanet", "gla", "dplr")
CHECKED = (*OPS, "rwkv7")  # those whose kernels are checked first
PURPOSES = (INFERENCE, TRAINING, DECODE)
GATES = ("mild", "bounded")  # slow and fast: log decays of -0.05 and -2.5 a token on average
STAGES = ("correct", "sanitizer", "time", *experiments.EXPERIMENTS, "more")
SHAPES = (  # B, T, H; the first ones matter most
    (1, 8192, 64), (1, 8192, 96), (1, 8192, 12), (1, 8192, 24), (1, 65536, 12), (1, 2048, 12), (1, 8192, 16),
    (1, 16384, 12), (1, 32768, 12), (1, 65536, 24), (2, 16384, 16), (4, 2048, 16), (4, 4096, 64), (8, 2048, 32),
)  # fmt: skip
SIX = (1300, 547, 2048, 963, 271, 3063)
RAGGED = ((SIX, 64), ((1024,) * 8, 64), (SIX, 96), ((1024,) * 8, 96))  # lengths, H
DECODED = tuple((b, h) for b in (64, 128, 256, 1, 32, 16, 8, 4, 2) for h in (32, 128))  # B, H
QUICK, QUICK_RAGGED, QUICK_DECODED = ((1, 8192, 64), (1, 2048, 12)), RAGGED[:1], ((64, 32), (1, 32), (256, 32))
FIRST = 4  # shapes of each purpose that are measured before the experiments, and with fast gates too
WIDE = ("kda",)  # ops that are measured at all shapes; the others at so many
OTHERS = 6


def cases(folders, purposes, ops, gates, batch: int | None, tokens, heads, quick: bool) -> tuple[list, list]:
    """Every op at the shapes that matter most, and then at the rest; where they are chosen, at all of these at once.

    Ops that are named must be built for all purposes; where none are, those of OPS are taken that are.
    """
    built = {(p, op): timed(p, contenders.built(folders, op, p)) for p, op in product(purposes, ops or OPS)}
    for purpose in purposes:
        if missing := [op for op in ops if not built[purpose, op]]:
            what = f"not built for {purpose}: {', '.join(missing)}"
            raise click.ClickException(f"{what}; `kdagen build --op NAME`, or choose with --ops and --purpose")
    chosen, found = bool(batch or tokens or heads), ([], [])
    for gate, purpose in product(gates, purposes):
        for i, (shape, lengths) in enumerate(shapes(purpose, batch, tokens, heads, quick)):
            for op in (op for op in ops or OPS if built[purpose, op]):
                case = Case(op, shape, built[purpose, op], purpose, gate, lengths)
                if chosen or i < FIRST:
                    found[0].append(case)
                elif gate == gates[0] and (op in WIDE or i < OTHERS):
                    found[1].append(case)
    return found


def timed(purpose: str, kernels: dict) -> dict:
    """What is timed beside peers: not variants that experiments are about, nor types of states where these are few."""
    left = {n: k for n, k in kernels.items() if n.split()[0] not in experiments.VARIANTS}
    if purpose != DECODE:
        left = {n: k for n, k in left.items() if not n.startswith("state_")}
    return left or kernels


def shapes(purpose: str, batch: int | None, tokens, heads, quick: bool) -> list[tuple]:
    """(B, T, H), and the lengths of a ragged batch's sequences."""
    if purpose == DECODE:
        pairs = QUICK_DECODED if quick else DECODED
        if batch or heads:
            pairs = product([batch] if batch else [1, 32, 256], heads or [32])
        return [((b, 1, h), ()) for b, h in pairs]
    if tokens or heads or batch:
        return [((batch or 1, t, h), ()) for t, h in product(tokens or [8192], heads or [64])]
    even = [(shape, ()) for shape in (QUICK if quick else SHAPES)]
    ragged = [((1, sum(lengths), h), lengths) for lengths, h in (QUICK_RAGGED if quick else RAGGED)]
    return [*even[:3], *ragged[:1], *even[3:], *ragged[1:]]


def kernels_hash(kernels) -> str:
    """Of these kernels, as they were built."""
    return short_hash(sorted(k.manifest["digest"] for k in kernels))


def names(folders: list[Path]) -> list[str]:
    """All ops that were built, those that matter most first."""
    found = {op.name for package in contenders.packages(folders) for op in package.iterdir() if op.is_dir()}
    listed = sorted(op for op in found if not op.startswith((".", "_")))
    return sorted(listed, key=lambda op: CHECKED.index(op) if op in CHECKED else len(CHECKED))


def correct_units(folders, purposes, ops) -> list[Unit]:
    """A unit for each folder of kernels; of peers one for each op and purpose."""
    made = []
    for op, purpose in product(ops, purposes):
        kernels = contenders.built(folders, op, purpose)
        where = {"op": op, "purpose": purpose}
        made += [
            Unit("correct", correct_name(op, purpose, label), kernels_hash([k]), {**where, "labels": [label]})
            for label, k in kernels.items()
        ]
        if kernels and (peer := contenders.peer(op, purpose)):
            made.append(Unit("correct", correct_name(op, purpose, peer.label), "", {**where, "peer": True}))
    return made


def correct_name(op: str, purpose: str, label: str) -> str:
    return f"{op}, {purpose}, {label}"


def sanitizer_units(folders, purposes, ops) -> list[Unit]:
    """A unit for each tool and op: all that was built of it in one process."""
    made = []
    for tool, op in product(sanitizer.TOOLS, ops):
        kernels = [k for p in purposes for k in contenders.built(folders, op, p).values()]
        if kernels:
            asked = {"tool": tool, "op": op, "purposes": list(purposes)}
            made.append(Unit("sanitizer", f"{tool}, {op}", kernels_hash(kernels), asked))
    return made


def time_units(todo: list[Case], modes, rounds: int) -> list[Unit]:
    """A unit for each case."""
    how = {"modes": list(modes), "rounds": rounds}
    return [Unit("time", str(case), kernels_hash(case.kernels.values()), asked_of(case) | how) for case in todo]


def asked_of(case: Case) -> dict:
    """A case as plain data."""
    shape = {"shape": list(case.shape), "lengths": list(case.lengths), "gate": case.gate}
    return {"op": case.op, "purpose": case.purpose, "labels": list(case.kernels), "peer": True, **shape}


def case_of(folders, asked: dict) -> Case:
    """The inverse; kernels that are not asked for are left out."""
    kernels = contenders.built(folders, asked["op"], asked["purpose"])
    kernels = {label: kernels[label] for label in asked["labels"]}
    shape = tuple(asked["shape"]), kernels, asked["purpose"], asked["gate"], tuple(asked["lengths"])
    return Case(asked["op"], *shape)


def experiment_units(folders, name: str, rounds: int) -> list[Unit]:
    """Those of an experiment whose kernels were built; what was not built is left out of its tables."""
    made, asks = [], experiments.EXPERIMENTS[name]
    for purpose, (op, *others), shape, gate in asks.points():
        kernels = asks.kernels(folders, purpose, op)
        more = [k for other in others for k in asks.kernels(folders, purpose, other).values()]
        if len(kernels) + len(more) > (0 if asks.alone else 1):
            case = Case(op, shape, kernels, purpose, gate)
            asked = asked_of(case) | {"peer": False, "others": others, "rounds": rounds, "modes": ["device"]}
            made.append(Unit(name, point_name(case, others), kernels_hash([*kernels.values(), *more]), asked))
    return made


def point_name(case: Case, others) -> str:
    """The name of an experiment's unit."""
    return f"{case}, beside {', '.join(others)}" if others else f"{case}"
