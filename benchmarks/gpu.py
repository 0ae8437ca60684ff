"""Built kernels on a GPU: checked against the float64 recurrence, then timed beside flash-linear-attention.

    python benchmarks/gpu.py device_ops                     # folders that `kdagen build` or pack_for_device.py wrote
    python benchmarks/gpu.py device_ops --purpose training  # forward and backward alone
    python benchmarks/gpu.py device_ops --dry-run           # no GPU: reads the folders, prints what would be measured

Everything that a ratio is formed of is measured in one process, contenders taking turns, and so are the ceilings: a
large copy and a large bf16 product. The floor of a case is its least traffic at that copy's rate.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import click
import gpu_contenders as contenders
import gpu_decode
import gpu_inference
import gpu_timing as timing
import gpu_training
from gpu_report import DECODE, INFERENCE, TRAINING, Case, plan_table, rows, table
from kdagen.autotune import launches
from kdagen.autotune.devices.clock import sets_needed
from rich.console import Console

from kdagen.errors import ArgumentError, LaunchError

RESULTS = Path(__file__).parent / "results" / "gpu.json"
OPS = ("kda", "kda_bounded", "gated_deltanet", "gla", "dplr")
WORK = {INFERENCE: gpu_inference, TRAINING: gpu_training, DECODE: gpu_decode}
GATES = ("mild", "bounded")  # slow and fast: log decays of -0.05 and -2.5 a token on average
SHAPES = [(8192, 64), (8192, 96), (8192, 24), (8192, 16), (8192, 12), (2048, 12), (65536, 12)]  # T, H
QUICK_SHAPES = [(8192, 64), (2048, 12)]
RAGGED = [((1300, 547, 2048, 963, 271, 3063), 64), ((1024,) * 8, 64), ((1300, 547, 2048, 963, 271, 3063), 96)]
DECODED = [(batch, heads) for heads in (32, 128) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]  # B, H
QUICK_DECODED = [(1, 32), (32, 32), (256, 32)]
CHECKED = (2, 100, 3)  # B, T, H of what peers are checked on
console = Console(width=180, highlight=False, soft_wrap=True)


def cases(folders, purposes, ops, gates, batch: int | None, tokens, heads, quick: bool) -> list[Case]:
    """Every op that was built, at every shape; those of slow gates come first."""
    built = {(p, op): contenders.built(folders, op, p) for p, op in product(purposes, ops)}
    for purpose in purposes:
        if missing := [op for op in ops if not built[purpose, op]]:
            what = f"not built for {purpose}: {', '.join(missing)}"
            raise click.ClickException(f"{what}; `kdagen build --op NAME`, or choose with --ops and --purpose")
    return [
        Case(op, shape, built[purpose, op], purpose, gate, lengths)
        for purpose, gate in product(purposes, gates)
        for shape, lengths in shapes(purpose, batch, tokens, heads, quick)
        for op in ops
    ]


def shapes(purpose: str, batch: int | None, tokens, heads, quick: bool) -> list[tuple]:
    """(B, T, H), and the lengths of a ragged batch's sequences."""
    if purpose == DECODE:
        pairs = QUICK_DECODED if quick else DECODED
        if batch or heads:
            pairs = product([batch] if batch else [1, 32, 256], heads or [32])
        return [((b, 1, h), ()) for b, h in pairs]
    if tokens or heads or batch:
        return [((batch or 1, t, h), ()) for t, h in product(tokens or [8192], heads or [64])]
    even = [((1, t, h), ()) for t, h in (QUICK_SHAPES if quick else SHAPES)]
    return even + [((1, sum(lengths), h), lengths) for lengths, h in (RAGGED[:1] if quick else RAGGED)]


def check(purpose: str, op: str, kernels: dict) -> dict[str, dict]:
    """The errors of each contender on small shapes, with what they may be; none if it does not run."""
    found = {label: check_kernels(op, label, loaded) for label, loaded in kernels.items()}
    if peer := contenders.peer(op, purpose):
        found[peer.label] = check_peer(WORK[purpose], op, peer, next(iter(kernels.values())))
    return found


def check_kernels(op: str, label: str, kernels) -> dict:
    """Their errors; a launch that fails is one."""
    try:
        return contenders.check_kernels(op, kernels)
    except (LaunchError, ArgumentError) as error:
        console.print(f"{op} {label}: {error}")
        return {"launch": (math.nan, 0.0)}


def check_peer(work, op: str, peer, kernels) -> dict:
    """Its errors; that it does not run here says nothing about kdagen."""
    try:
        return work.check_peer(op, peer, kernels, launches.arguments(kernels, CHECKED))
    except Exception as error:
        console.print(f"{op}: {peer.label} does not run here: {type(error).__name__}: {error}")
        return {}


def sound(case: Case, errors: dict) -> Case:
    """The case without kernels that compute something else."""
    kernels = {label: k for label, k in case.kernels.items() if contenders.sound(errors[label])}
    return replace(case, kernels=kernels)


def comparable(case: Case, errors: dict):
    """The peer, if it computes what kdagen computes."""
    peer = case.peer
    return peer if peer and contenders.sound(errors[peer.label]) else None


def inputs(case: Case, l2_bytes: int) -> list[dict]:
    """Sets of inputs: what all share, and for each kind of kernels these with workspaces and results."""
    made, (batch, tokens, heads) = [], case.shape
    for seed in range(sets_needed(case.least_bytes[""], l2_bytes)):
        drawn = launches.arguments(case.first, (batch, min(tokens, launches.SAMPLED), heads), case.gate, seed)
        long = launches.stretched(case.first, contenders.on_gpu(drawn), tokens)
        shared = launches.shared_inputs(case.first, launches.ragged(long, case.lengths), seed)
        made.append(shared | {label: launches.memory(k, shared) for label, k in case.kernels.items()})
    return made


def run(todo: list[Case], modes, rounds: int, seconds: float, out: Path) -> tuple[list[dict], dict]:
    """Checks, ceilings, every case; what was measured so far is in `out` after each case."""
    import torch

    started, before = time.perf_counter(), timing.facts()
    distinct = {(c.purpose, c.op): c.kernels for c in todo}
    with torch.no_grad():
        errors = {key: check(*key, kernels) for key, kernels in distinct.items()}
        ceilings, measured, left = timing.ceilings(), [], []
    for case in (sound(case, errors[case.purpose, case.op]) for case in todo):
        if not case.kernels or time.perf_counter() - started > seconds:
            left.append(str(case))
            continue
        try:
            with torch.set_grad_enabled(case.purpose == TRAINING):
                measured += measure(case, modes, rounds, errors[case.purpose, case.op], before["l2_bytes"], ceilings)
        except (torch.OutOfMemoryError, LaunchError) as error:
            left.append(f"{case}: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
        console.print(f"{time.perf_counter() - started:6.1f} s  {case}")
        write(out, before, ceilings, errors, measured, left)
    write(out, before, ceilings, errors, measured, left)
    console.print(f"\n{before['gpu']}: copy {ceilings['copy_bytes_a_second'] / 1e12:.2f} TB/s, ", end="")
    console.print(f"bf16 product {ceilings['bf16_flops_a_second'] / 1e12:.0f} TFLOP/s; not timed: {left or 'none'}")
    return measured, errors


def measure(case: Case, modes, rounds: int, errors: dict, l2_bytes: int, ceilings: dict) -> list[dict]:
    """Figures of one case, in every mode."""
    sets, peer, work, found = inputs(case, l2_bytes), comparable(case, errors), WORK[case.purpose], []
    peaks = {label: timing.peak_bytes(call, sets[0]) for label, call in work.whole(case, peer).items()}
    for mode in modes:
        times = timing.measure(work.calls(case, mode, peer), sets, rounds, mode)
        found += rows(case, mode, times, peaks, errors, ceilings["copy_bytes_a_second"])
    return found


def wrong(errors: dict, todo: list[Case]) -> list[str]:
    """The kernels that are off, and by how much."""
    every = {(case.purpose, case.op, label) for case in todo for label in case.kernels}
    return [
        f"{op} {label} ({purpose}): " + ", ".join(f"{n} {e:.1e}" for n, (e, most) in found.items() if not e <= most)
        for purpose, op, label in sorted(every)
        if not contenders.sound(found := errors[purpose, op][label])
    ]


def write(out: Path, before: dict, ceilings: dict, errors: dict, measured: list[dict], left: list[str]) -> None:
    """All figures, as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {**before, "state_after": timing.facts()["state"]}
    named = {f"{purpose} {op}": found for (purpose, op), found in errors.items()}
    figures = {"facts": facts, "ceilings": ceilings, "errors": named, "not_reached": left, "measured": measured}
    out.write_text(json.dumps(figures, indent=1) + "\n")


class Words(click.ParamType):
    """Some of a few words, comma-separated; any where none are listed."""

    name = "LIST"

    def __init__(self, known=()):
        self.known = tuple(known)

    def convert(self, value, param, ctx) -> list[str]:
        words = value if isinstance(value, list) else [word for word in value.split(",") if word]
        if self.known and (unknown := [word for word in words if word not in self.known]):
            self.fail(f"{', '.join(unknown)}: expected some of {', '.join(self.known)}", param, ctx)
        return words


def option(name: str, default, known=(), more: str = ""):
    """A list of words."""
    text = more or f"Some of {', '.join(known)}, comma-separated."
    return click.option(name, type=Words(known), default=",".join(default), show_default=bool(default), help=text)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@option("--purpose", WORK, WORK)
@option("--ops", OPS, more="Entries of the zoo, comma-separated.")
@option("--gates", GATES, GATES)
@option("--tokens", (), more="Lengths; 8192 if only --heads is given.  [default: seven shapes and three ragged ones]")
@option("--heads", (), more="Head counts; 64 if only --tokens is given.")
@click.option("--batch", type=int, help="Sequences; 1, and in decoding 1 to 256, if it is not given.")
@option("--modes", ("device",), timing.MODES)
@click.option("--calls", "rounds", default=30, show_default=True, help="Timed calls of each contender.")
@click.option("--quick", is_flag=True, help="Two shapes, ten calls.")
@click.option("--seconds", default=480.0, show_default=True, help="No case is begun after this time.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--dry-run", is_flag=True, help="Read the folders, print what would be measured; needs no GPU.")
def main(folders, purpose, ops, gates, tokens, heads, batch, modes, rounds, quick, seconds, out, dry_run) -> None:
    """Check and time the ops that were built into FOLDERS."""
    import torch

    if TRAINING in purpose and "graph" in modes:
        raise click.UsageError(
            "--modes graph is for inference and decoding: add --purpose inference,decode, or leave graph out"
        )
    rounds, tokens, heads = 10 if quick else rounds, [int(n) for n in tokens], [int(n) for n in heads]
    todo = cases(list(folders), purpose, ops, gates, batch, tokens, heads, quick)
    if dry_run:
        console.print(plan_table(todo, modes, rounds))
        console.print(f"\n{len(todo)} cases; installed: {timing.versions()}; would write {out}")
        return
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU here: --dry-run shows what would be measured")
    measured, errors = run(todo, modes, rounds, seconds, out)
    console.print(table(measured))
    if off := wrong(errors, todo):
        raise click.ClickException(f"off against float64, so not timed: {'; '.join(off)}")


if __name__ == "__main__":
    main()
