"""An op over processes beside the same op in one: time, and bytes sent. On CPU processes that talk by gloo.

    python benchmarks/sequence_parallel.py --ranks 2 [--share 0.57] [--threads]

In every round the whole sequence runs in one process, and split over the ranks, in turn: so whatever else the machine
does hits both alike. Every process has one thread; with --threads the one process also has a turn with as many as there
are ranks. `ms` is the time of the slowest rank, waiting included; `cpu ms` the processor time of the rank that computes
most, which is what `ms` comes to where each rank has a core of its own. Bytes are counted where they are sent, and
given for the rank that sends most. All ranks share one machine: what a network adds is not measured.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from records import keep, machine
from rich.console import Console
from rich.table import Table

import kdagen as kg
from kdagen.derive.canonical import canonical

OPS = ("kda", "gated_deltanet", "gla", "rwkv7")


class Sent:
    """Counts the bytes of what this process sends."""

    def __init__(self):
        self.bytes, swap = 0, dist.batch_isend_irecv

        def counted(ops):
            self.bytes += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
            return swap(ops)

        dist.batch_isend_irecv = counted

    def by(self, run) -> int:
        """Those of one call."""
        self.bytes = 0
        run()
        return self.bytes


def forward(op, given: dict):
    """A zero-argument forward."""

    def run():
        with torch.no_grad():
            return op(**given)

    return run


def training(op, given: dict):
    """A zero-argument forward and backward, of a loss of the output."""
    leaves = {n: x.requires_grad_() for n, x in given.items()}

    def run():
        o, _ = op(**leaves)
        return torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))

    return run


def seconds(run) -> list[float]:
    """Of one call, which all ranks begin together: until the slowest is done, and of the busiest rank's processor."""
    dist.barrier()
    started = time.perf_counter(), time.process_time()
    run()
    took = torch.tensor([time.perf_counter() - started[0], time.process_time() - started[1]], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.tolist()


@dataclass(frozen=True)
class Run:
    """What is measured, on every rank alike."""

    ranks: int
    tokens: int
    heads: int
    share: float
    rounds: int
    threads: bool
    ops: tuple[str, ...]

    @property
    def ends(self) -> list[int]:
        """Where each rank's tokens end, 0 first."""
        rest = int(self.tokens * (1 - self.share) / max(1, self.ranks - 1))
        return [0, *(self.tokens - rest * (self.ranks - 1 - n) for n in range(self.ranks))]


def on_rank(rank: int, run: Run, folder: str) -> None:
    """Measures all ops; the first rank writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=run.ranks)
    sent = Sent()
    found = {name: measured(name, rank, run, sent) for name in run.ops}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(name: str, rank: int, run: Run, sent: Sent) -> dict:
    """Of a forward, and of a forward and a backward: medians in ms of each contender, and bytes."""
    form = canonical(kg.load(name))
    per_token = {a.name for a in form.arguments if a.per_token}
    whole = {n: x.float() for n, x in kg.zoo.sample(form, (1, run.tokens, run.heads, 128, 128)).items()}
    here = slice(*run.ends[rank : rank + 2])
    mine = {n: x[:, here].contiguous() if n in per_token else x for n, x in whole.items()}
    op, split, found = kg.compile(name), kg.sequence_parallel(kg.compile(name)), {}
    for what, make in (("forward", forward), ("forward and backward", training)):
        alone, over = make(op, whole), make(split, mine)
        count = torch.tensor(sent.by(over))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        contenders = {"one": (alone if rank == 0 else nothing, 1), "ranks": (over, 1)}
        if run.threads:
            contenders["threads"] = contenders["one"][0], run.ranks
        found[what] = {"bytes": int(count)} | in_turn(contenders, run.rounds)
    return found


def nothing() -> None:
    """What other ranks do while one computes."""


def in_turn(contenders: dict, rounds: int) -> dict:
    """Medians of {"ms", "cpu_ms"} of each; the first round warms up."""
    times: dict = {contender: [] for contender in contenders}
    for _ in range(rounds + 1):
        for contender, (run, threads) in contenders.items():
            torch.set_num_threads(threads)
            times[contender].append(seconds(run))
    medians = {c: [1e3 * statistics.median(x) for x in zip(*taken[1:])] for c, taken in times.items()}
    return {c: dict(zip(("ms", "cpu_ms"), x)) for c, x in medians.items()}


def show(record: dict) -> None:
    """A row an op and pass."""
    heading = ["one process: ms", "cpu ms", f"{record['ranks']} ranks: ms", "cpu ms", "ratio of cpu ms", "KiB sent"]
    title = f"{record['shape']}, {record['share']:.0%} of the tokens on rank 0; medians"
    made = Table("", "", *heading, *["threads: ms"] * record["threads"], title=title)
    for name, found in record["ops"].items():
        for what, x in found.items():
            cells = [x["one"]["ms"], x["one"]["cpu_ms"], x["ranks"]["ms"], x["ranks"]["cpu_ms"]]
            ratio, sent = x["one"]["cpu_ms"] / x["ranks"]["cpu_ms"], x["bytes"] / 1024
            threads = [f"{x['threads']['ms']:.0f}"] if "threads" in x else []
            made.add_row(name, what, *(f"{c:.0f}" for c in cells), f"{ratio:.2f}x", f"{sent:,.0f}", *threads)
    Console(width=130).print(made)


@click.command()
@click.option("--ranks", default=2, show_default=True, help="Processes.")
@click.option("--tokens", default=4096, show_default=True, help="Of the whole sequence.")
@click.option("--heads", default=4, show_default=True, help="Of 128 channels.")
@click.option("--share", default=0.0, help="Of the tokens on the first rank; others have as many each unless given.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", is_flag=True, help="Also one process with a thread for each rank.")
@click.option("--ops", default=",".join(OPS), show_default=True)
def main(ops: str, ranks: int, share: float, **options) -> None:
    """Measure ops over ranks beside one process; append the record to the results."""
    run = Run(ranks=ranks, share=share or 1 / ranks, ops=tuple(ops.split(",")), **options)
    here = machine()  # before the ranks are its load
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (run, folder), ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    shape = f"B=1 T={run.tokens} H={run.heads} K=V=128 float32"
    record = here | {
        "shape": shape,
        "ranks": ranks,
        "share": run.share,
        "threads": run.threads,
        "rounds": run.rounds,
        "ops": found,
    }
    show(record)
    keep("sequence_parallel", record)


if __name__ == "__main__":
    main()
