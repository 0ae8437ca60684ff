"""Built kernels on a GPU: checked against the float64 recurrence, then timed beside flash-linear-attention.

    python benchmarks/gpu_forward.py device_ops            # folders that `kdagen build` or pack_for_device.py wrote
    python benchmarks/gpu_forward.py device_ops --dry-run  # no GPU: reads the folders, prints what would be measured

Everything that a ratio is formed of is measured in one process, contenders taking turns, and so are the ceilings: a
large copy and a large bf16 product. The floor of a case is its least traffic at that copy's rate.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import click
import gpu_contenders as contenders
import gpu_timing as timing
from gpu_report import Case, plan_table, rows, table
from rich.console import Console

from kdagen.errors import LaunchError

RESULTS = Path(__file__).parent / "results" / "gpu_forward.json"
OPS = ("kda", "kda_bounded", "gated_deltanet", "gla", "dplr")
SHAPES = [(8192, 64), (8192, 96), (8192, 24), (8192, 16), (8192, 12), (2048, 12), (65536, 12)]  # T, H
QUICK_SHAPES = [(8192, 64), (2048, 12)]
CHECKED = (2, 100, 3)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}
PEER_TOLERANCE = 2e-2  # a peer that is further off computes something else
WIDTH = 132
console = Console(width=WIDTH, highlight=False, soft_wrap=True)


def cases(folders, ops, batch: int, tokens, heads, quick: bool) -> list[Case]:
    """Every op that was built, at every shape."""
    pairs = QUICK_SHAPES if quick else SHAPES
    if tokens or heads:
        pairs = [(t, h) for t in tokens or [8192] for h in heads or [64]]
    built = {op: contenders.built(folders, op) for op in ops}
    if missing := [op for op, kernels in built.items() if not kernels]:
        raise click.ClickException(f"not built: {', '.join(missing)}; `kdagen build --op NAME`, or choose with --ops")
    return [Case(op, (batch, t, h), built[op]) for t, h in pairs for op in ops]


def check(op: str, kernels: dict) -> dict[str, float]:
    """The error of each contender on a small shape."""
    found = {label: check_kernels(op, label, loaded) for label, loaded in kernels.items()}
    if peer := contenders.peer(op):
        found[peer.label] = check_peer(op, peer, contenders.arguments(next(iter(kernels.values())), CHECKED))
    return found


def check_kernels(op: str, label: str, loaded) -> float:
    """Their error, over mild gates and full resets; NaN if the launch fails."""
    errors = []
    for gate in ("mild", "reset"):
        given = contenders.arguments(loaded, CHECKED, gate=gate)
        try:
            made = loaded.launch(contenders.on_gpu(given))
        except LaunchError as error:
            console.print(f"{op} {label}: {error}")
            return math.nan
        errors.append(contenders.error(op, (made[loaded.by_role["out"]], made[loaded.by_role["final_state"]]), given))
    return contenders.worst(errors)


def sound(case: Case, errors: dict) -> Case:
    """The case without kernels that compute something else."""
    return Case(case.op, case.shape, {label: k for label, k in case.kernels.items() if right(k, errors[label])})


def right(kernels, error: float) -> bool:
    """Whether an error is one of rounding alone."""
    return error <= TOLERANCE[kernels.plan["dtype"]]


def check_peer(op: str, peer, given: dict) -> float | None:
    """Its larger error; None if it does not run here, which says nothing about kdagen."""
    try:
        return contenders.error(op, peer(contenders.on_gpu(given)), given)
    except Exception as error:
        console.print(f"{op}: {peer.label} does not run here: {type(error).__name__}: {error}")
        return None


def comparable(op: str, errors: dict) -> bool:
    """Whether the peer computes what kdagen computes."""
    peer = contenders.peer(op)
    error = errors[peer.label] if peer else None
    return error is not None and error <= PEER_TOLERANCE


def calls(case: Case, mode: str, with_peer: bool) -> dict:
    """What is timed, by label. Eager: ops as people call them, which allocate; else bare launches, and each kernel."""
    found = {}
    for label, kernels in case.kernels.items():
        if mode == "eager":
            op = contenders.BuiltOp(kernels.folder.parent)
            names = kernels.plan["arguments"]
            found[f"kdagen {label}"] = lambda given, op=op, names=names: op(
                *(given["arguments"][n] for n in names), output_final_state=True
            )
            continue
        parts = contenders.kernel_calls(kernels)
        found[f"kdagen {label}"] = lambda given, label=label, parts=parts: [f(given[label]) for f in parts.values()]
        for family, part in parts.items():
            found[f"kdagen {label}: {family}"] = lambda given, label=label, part=part: part(given[label])
    if with_peer and (peer := contenders.peer(case.op)):
        found[peer.label] = lambda given: peer(given["arguments"])
    return found


def inputs(case: Case, l2_bytes: int) -> list[dict]:
    """Sets of inputs: arguments, and for each kind of kernels these with workspaces and results."""
    made = []
    for seed in range(timing.sets_needed(case.floor_bytes, l2_bytes)):
        drawn = contenders.arguments(case.first, case.shape, seed)
        arguments = contenders.stretched(case.first, drawn, case.shape[1])
        results = {label: contenders.with_results(k, arguments) for label, k in case.kernels.items()}
        made.append({"arguments": arguments, **results})
    return made


def run(todo: list[Case], modes, rounds: int, seconds: float, out: Path) -> tuple[list[dict], dict]:
    """Checks, ceilings, every case; what was measured so far is in `out` after each case."""
    import torch

    started, before = time.perf_counter(), timing.facts()
    errors = {case.op: check(case.op, case.kernels) for case in {c.op: c for c in todo}.values()}
    ceilings, measured, left = timing.ceilings(), [], []
    for case in (sound(case, errors[case.op]) for case in todo):
        if not case.kernels or time.perf_counter() - started > seconds:
            left.append(str(case))
            continue
        sets = inputs(case, before["l2_bytes"])
        for mode in modes:
            times = timing.measure(calls(case, mode, comparable(case.op, errors[case.op])), sets, rounds, mode)
            measured += rows(case, mode, times, errors[case.op], ceilings["copy_bytes_a_second"])
        del sets
        torch.cuda.empty_cache()
        console.print(f"{time.perf_counter() - started:6.1f} s  {case}")
        write(out, before, ceilings, errors, measured, left)
    write(out, before, ceilings, errors, measured, left)
    console.print(f"\n{before['gpu']}: copy {ceilings['copy_bytes_a_second'] / 1e12:.2f} TB/s, ", end="")
    console.print(f"bf16 product {ceilings['bf16_flops_a_second'] / 1e12:.0f} TFLOP/s; not timed: {left or 'none'}")
    return measured, errors


def wrong(todo: list[Case], errors: dict) -> list[str]:
    """The kernels that are off, and by how much."""
    every = {(case.op, label): k for case in todo for label, k in case.kernels.items()}
    return [
        f"{op} {label}: {errors[op][label]:.1e}" for (op, label), k in every.items() if not right(k, errors[op][label])
    ]


def write(out: Path, before: dict, ceilings: dict, errors: dict, measured: list[dict], left: list[str]) -> None:
    """All figures, as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {**before, "state_after": timing.facts()["state"]}
    figures = {"facts": facts, "ceilings": ceilings, "errors": errors, "not_reached": left, "measured": measured}
    out.write_text(json.dumps(figures, indent=1) + "\n")


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--ops", default=",".join(OPS), show_default=True, help="Entries of the zoo, comma-separated.")
@click.option(
    "--tokens", default="", help="Lengths, comma-separated; 8192 if only --heads is given.  [default: seven shapes]"
)
@click.option("--heads", default="", help="Head counts, comma-separated; 64 if only --tokens is given.")
@click.option("--batch", default=1, show_default=True)
@click.option(
    "--modes", default="device", show_default=True, help=f"Some of {', '.join(timing.MODES)}, comma-separated."
)
@click.option("--calls", "rounds", default=30, show_default=True, help="Timed calls of each contender.")
@click.option("--quick", is_flag=True, help="Two shapes, ten calls.")
@click.option("--seconds", default=480.0, show_default=True, help="No case is begun after this time.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--dry-run", is_flag=True, help="Read the folders, print what would be measured; needs no GPU.")
def main(folders, ops, tokens, heads, batch, modes, rounds, quick, seconds, out, dry_run) -> None:
    """Check and time the ops that were built into FOLDERS."""
    import torch

    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    modes, rounds = modes.split(","), 10 if quick else rounds
    if unknown := set(modes) - set(timing.MODES):
        raise click.BadParameter(
            f"{', '.join(unknown)}: expected some of {', '.join(timing.MODES)}", param_hint="--modes"
        )
    todo = cases(list(folders), ops.split(","), batch, numbers(tokens), numbers(heads), quick)
    if dry_run:
        console.print(plan_table(todo, modes, rounds))
        console.print(f"\n{len(todo)} cases; installed: {timing.versions()}; would write {out}")
        return
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU here: --dry-run shows what would be measured")
    with torch.no_grad():
        measured, errors = run(todo, modes, rounds, seconds, out)
    console.print(table(measured))
    if off := wrong(todo, errors):
        raise click.ClickException(f"off against float64, so not timed: {', '.join(off)}")


if __name__ == "__main__":
    main()
