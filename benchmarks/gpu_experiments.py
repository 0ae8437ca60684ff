"""Open questions that only a GPU answers, each with the kernels it takes and the calls it is asked for.

A question is answered by contenders of one process in turn, with no peer beside them. What is built for them alone is
in VARIANTS, which pack_for_device.py packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import gpu_contenders as contenders

VARIANTS = {  # schedules of inference, by the package that holds them
    "chunk16": {"chunk_size": 16},
    "chunk32": {"chunk_size": 32},
    "chunk64": {"chunk_size": 64},
    "v64": {"v_tile": 64},
    "stages3": {"stages": 3},
    "split": {"output": "split"},
    "pipelined": {"scan_skeleton": "scan_pipelined"},
    "pipelined1": {"scan_skeleton": "scan_pipelined", "stages": 1},
    "plain": {"scan_skeleton": "scan_plain", "stages": 1},
    "segments8": {"split": 8},
    "segments16": {"split": 16},
    "segments32": {"split": 32},
    "segments64": {"split": 64},
}
WORDS = {  # what a package is, for tables
    "default": "default",
    "pipelined": "roles by TileLang",
    "pipelined1": "roles by TileLang, a chunk ahead",
    "plain": "no roles, a chunk ahead",
    "split": "states stored, O apart",
    "v64": "V tiles of 64",
    "stages3": "3 stages",
    **{f"chunk{n}": f"chunks of {n}" for n in (16, 32, 64)},
    **{f"segments{n}": f"segments of {n} chunks" for n in (8, 16, 32, 64)},
}
FEW, MANY = (1, 8192, 12), (1, 8192, 64)
HEADS, LENGTHS = (4, 8, 12, 24), (8192, 65536)


@dataclass(frozen=True)
class Experiment:
    """A question: what is compared, of which ops, on which calls."""

    question: str
    labels: tuple[str, ...]
    ops: tuple[tuple[str, ...], ...]  # each with those it is compared with, besides its own variants
    shapes: tuple[tuple[int, int, int], ...]
    purposes: tuple[str, ...] = ("inference",)
    gates: tuple[str, ...] = ("mild",)
    alone: bool = False  # whether one set of kernels makes all contenders

    def points(self) -> Iterator[tuple]:
        """(purpose, ops, shape, gate) of all its tables."""
        return product(self.purposes, self.ops, self.shapes, self.gates)

    def kernels(self, folders: list[Path], purpose: str, op: str) -> dict:
        """Those of its contenders that were built, the default first."""
        found = contenders.built(folders, op, purpose)
        return {label: found[label] for label in self.labels if label in found}


EXPERIMENTS = {
    "roles": Experiment(
        "Do roles of warps pay: those that kdagen writes (default), those that TileLang finds, or none at all?",
        ("default", "pipelined", "pipelined1", "plain"),
        (("kda",), ("gated_deltanet",)),
        (MANY, FEW),
    ),
    "families": Experiment(
        "Which kernels win where: a scan that writes O beside its states (default), states that are stored and O by a "
        "kernel of its own, or others of the chunk's sizes?",
        ("default", "split", "chunk16", "chunk32", "chunk64", "v64", "stages3"),
        (("kda",), ("gated_deltanet",), ("dplr",), ("gla",), ("kda_bounded",)),
        (MANY, FEW, (4, 2048, 16), (1, 65536, 12)),
    ),
    "segments": Experiment(
        "What does a sequence gain that is split, exactly, in segments that are scanned side by side?",
        ("default", "segments8", "segments16", "segments32", "segments64"),
        (("kda",), ("gated_deltanet",)),
        tuple((1, t, h) for t in LENGTHS for h in HEADS),
    ),
    "overlap": Experiment(
        "What does it gain to prepare a segment beside the scan of the one before it, on two streams?",
        ("default",),
        (("kda",), ("gated_deltanet",)),
        (MANY, (1, 8192, 96), (1, 8192, 24), FEW, (1, 65536, 12)),
        alone=True,
    ),
    "ratio": Experiment(
        "How much faster is KDA than kdagen's own kernels of the general DPLR?",
        ("default",),
        (("kda", "dplr"),),
        (MANY, (1, 8192, 96), FEW),
        ("inference", "training"),
    ),
}


def asked_of(label: str) -> set[str]:
    """The ops that are compared in this variant."""
    return {op for asks in EXPERIMENTS.values() if label in asks.labels for ops in asks.ops for op in ops}


def table(rows: list[dict]) -> list[dict]:
    """A line for each contender: its time, and how much faster it is than the first one."""
    first = rows[0]["ms"]["median"]
    return [
        {"contender": r["contender"], "ms": r["ms"]["median"], "times_the_first": first / r["ms"]["median"]}
        for r in rows
    ]
