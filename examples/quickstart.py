"""What `kdagen build` left, put to work on a machine without a GPU and checked against the recurrence.

    kdagen build --arch sm90 --out my_ops
    python examples/quickstart.py

The op runs on CPU tensors; the programs that were built for the GPU are executed in simulation, with the GPU's
rounding. Both are compared with the recurrence as it is written, token by token in float64.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import kdagen as kg
from kdagen.reference import recurrence_reference
from kdagen.simulate.verify import built_source, draw, relative_error, verify

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


def run_on_cpu(op, source, recurrence, shape) -> tuple[float, float, float, float]:
    """Errors of output and state, seconds of the op, seconds token by token."""
    drawn, _ = draw(source, shape)
    tensors = {name: x.float() for name, x in drawn.items()}
    op(**{name: x[:, :1] if x.dim() > 2 else x for name, x in tensors.items()})  # derives what the CPU runs, once
    started = time.perf_counter()
    o, state = op(**tensors, output_final_state=True)
    op_done = time.perf_counter()
    expected_o, expected_state = recurrence_reference(recurrence, tensors)
    reference_done = time.perf_counter()
    errors = relative_error(o, expected_o), relative_error(state, expected_state)
    return *errors, op_done - started, reference_done - op_done


def table(*titles: str) -> Table:
    """A plain table, numbers to the right."""
    made = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        made.add_column(title, justify="right" if i else "left")
    return made


def error_row(what: str, output: float, state: float, tolerance: float) -> list[str]:
    """A row of the table of errors."""
    good = output <= tolerance and state <= tolerance
    return [what, f"{output:.1e}", f"{state:.1e}", f"{tolerance:g}", "yes" if good else "NO"]


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
@click.option("--tokens", default=1024, show_default=True, help="Tokens of the run on the CPU.")
@click.option("--simulated-tokens", default=80, show_default=True, help="Tokens of the simulated run.")
def main(name: str, folder: Path, tokens: int, simulated_tokens: int) -> None:
    """Run a built op on CPU tensors, execute its GPU program in simulation, check both."""
    op, recurrence = import_op(folder, name), kg.load(name)
    built = op.variants[0]
    source = built_source(built.folder)

    console.print(f"{recurrence}\n")
    cpu_o, cpu_state, seconds, reference_seconds = run_on_cpu(op, source, recurrence, (1, tokens, HEADS))
    verdict = verify(source, recurrence, (1, simulated_tokens, HEADS))

    errors = table("what ran", "output error", "state error", "at most", "good")
    ran = f"op on CPU tensors: float32, T = {tokens}, H = {HEADS}"
    errors.add_row(*error_row(ran, cpu_o, cpu_state, CPU_TOLERANCE))
    ran = f"program for {source.target}, simulated: {source.dtype}, T = {simulated_tokens}, H = {HEADS}"
    errors.add_row(*error_row(ran, verdict.output, verdict.final_state, verdict.tolerance))
    console.print("Relative errors against the recurrence, token by token in float64:\n")
    console.print(errors)

    console.print(f"\nKernels in {built.folder}:\n")
    console.print(kernels(built.folder, built.manifest))
    moved = sum(map(verdict.bytes, verdict.statistics))
    console.print(f"\nmoved by the simulated program: {moved:,.0f} bytes a token a head")
    console.print(f"time on this CPU: op {seconds:.2f} s, token by token {reference_seconds:.2f} s")
    console.print(f"on a GPU machine:  from {folder.name} import {name}  (torch and apache-tvm-ffi, no compiler)")
    if not verdict.ok or max(cpu_o, cpu_state) > CPU_TOLERANCE:
        sys.exit("an error is larger than it may be")


if __name__ == "__main__":
    main()
