"""What `kdagen build` left, put to work on a machine without a GPU and checked against the recurrence.

    kdagen build --arch sm90 --out my_ops
    python examples/quickstart.py

The op runs on CPU tensors, forward and backward; the programs that were built for the GPU are executed in simulation,
with the GPU's rounding. Both are compared with the recurrence as it is written, token by token in float64, and its
gradients by torch's autograd.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

import kdagen as kg
from kdagen.reference import recurrence_reference
from kdagen.simulate.verify import built_source, draw, draw_cotangents, relative_error, verify, verify_training

HEADS = 2
CPU_TOLERANCE = 1e-5  # of float32
console = Console(width=110, highlight=False)


def import_op(folder: Path, name: str):
    """`from my_ops import kda`, wherever my_ops is."""
    sys.path.insert(0, str(folder.resolve().parent))
    try:
        return getattr(importlib.import_module(folder.name), name)
    except (ImportError, AttributeError):
        command = f"kdagen build --arch sm90 --op {name} --out {folder}"
        raise click.ClickException(f"{folder} has no op {name}: run `{command}` first") from None


def run_on_cpu(op, source, recurrence, shape) -> tuple[dict[str, float], float, float]:
    """Errors of results and gradients; seconds of the op, forward and backward, and of the same token by token."""
    drawn, _ = draw(source, shape)
    d_out, d_state = (x.float() for x in draw_cotangents(source, shape))

    def results(call, dtype):
        tensors = {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}
        started = time.perf_counter()
        o, state = call(tensors)
        gradients = torch.autograd.grad(
            (o, state), list(tensors.values()), (d_out.to(o.dtype), d_state.to(state.dtype))
        )
        seconds = time.perf_counter() - started
        return {"output": o, "final state": state, **{f"d_{n}": x for n, x in zip(tensors, gradients)}}, seconds

    results(lambda tensors: op(**tensors, output_final_state=True), torch.float32)  # derives what the CPU runs, once
    found, seconds = results(lambda tensors: op(**tensors, output_final_state=True), torch.float32)
    expected, reference_seconds = results(lambda tensors: recurrence_reference(recurrence, tensors), torch.float64)
    errors = {name: relative_error(x.detach(), expected[name].detach()) for name, x in found.items()}
    return errors, seconds, reference_seconds


def table(*titles: str) -> Table:
    """A plain table, numbers to the right."""
    made = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        made.add_column(title, justify="right" if i else "left")
    return made


def error_table(cpu: dict[str, float], verdict, tokens: tuple[int, int], source) -> Table:
    """A row a result: its error on the CPU, and that of the simulated GPU programs (inference: no gradients)."""
    on_cpu, simulated = (
        f"CPU op: float32, T = {tokens[0]}",
        f"{source.target} programs: {source.dtype}, T = {tokens[1]}",
    )
    made = table("", on_cpu, "at most", simulated, "at most", "good")
    for name, error in cpu.items():
        gpu, most = verdict.errors.get(name, (None, None))
        good = error <= CPU_TOLERANCE and (gpu is None or gpu <= most)
        cells = ["-", "-"] if gpu is None else [f"{gpu:.1e}", f"{most:g}"]
        made.add_row(name, f"{error:.1e}", f"{CPU_TOLERANCE:g}", *cells, "yes" if good else "NO")
    return made


def kernels(folder: Path, manifest: dict) -> Table:
    """What the compiler said of each kernel that was built."""
    made = table("kernel", "threads", "registers", "spilled bytes", "shared KiB", "file")
    for k in manifest["kernels"]:
        shared = (k["shared_bytes"] + (k["static_shared_bytes"] or 0)) / 1024
        spilled = (k["spill_stores"] or 0) + (k["spill_loads"] or 0)
        made.add_row(
            k["name"], str(k["block"][0]), str(k["registers"]), str(spilled), f"{shared:.1f}", k["library"] or k["code"]
        )
    return made


@click.command()
@click.option("--op", "name", default="kda", show_default=True, help="An op that was built.")
@click.option("--build", "folder", type=Path, default=Path("my_ops"), show_default=True, help="Where it was built.")
@click.option("--tokens", default=256, show_default=True, help="Tokens of the run on the CPU.")
@click.option("--simulated-tokens", default=80, show_default=True, help="Tokens of the simulated run.")
def main(name: str, folder: Path, tokens: int, simulated_tokens: int) -> None:
    """Run a built op on CPU tensors, execute its GPU programs in simulation, check both."""
    op, recurrence = import_op(folder, name), kg.load(name)
    built = max(op.variants, key=lambda variant: variant.training)  # that of training has the forward's kernels too
    source = built_source(built.folder)

    console.print(f"{recurrence}\n")
    cpu, seconds, reference_seconds = run_on_cpu(op, source, recurrence, (1, tokens, HEADS))
    check = verify_training if source.training else verify
    verdict = check(source, recurrence, (1, simulated_tokens, HEADS))

    console.print("Relative errors against the recurrence, token by token in float64 (d_x is the gradient of x):\n")
    console.print(error_table(cpu, verdict, (tokens, simulated_tokens), source))
    for variant in op.variants:
        console.print(f"\nKernels in {variant.folder}:\n")
        console.print(kernels(variant.folder, variant.manifest))
    moved = sum(map(verdict.bytes, verdict.statistics))
    passes = "forward and backward" if source.training else "forward"
    console.print(f"\nmoved by the simulated programs, {passes}: {moved:,.0f} bytes a token a head")
    console.print(f"time on this CPU, with gradients: op {seconds:.2f} s, token by token {reference_seconds:.2f} s")
    console.print(f"on a GPU machine:  from {folder.name} import {name}  (torch and apache-tvm-ffi, no compiler)")
    if not verdict.ok or max(cpu.values()) > CPU_TOLERANCE:
        sys.exit("an error is larger than it may be")


if __name__ == "__main__":
    main()
