"""How far the generated GPU programs are from the recurrence: every zoo entry, every gate class, K = V = 128.

    pip install -e '.[build]' && python benchmarks/accuracy.py

Each program is executed on the CPU with the GPU's rounding and compared with the recurrence, token by token in float64,
over the same rounded inputs: norm of the difference over norm, of the output and of the final state, the largest over
the seeds. Nothing is timed. Writes benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kdagen import zoo
from kdagen.pipeline import compile_op
from kdagen.simulate.verify import verify
from kdagen.zoo.inputs import GATES

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SHAPE = (1, 150, 2)  # B, T, H: a partial last chunk


def errors(name: str, dtype: str, seeds: int) -> dict[str, dict[str, float]]:
    """Largest errors of output and final state for each gate class."""
    recurrence = zoo.get(name)
    source = compile_op(recurrence, 128, dtype, "sm90")
    found = {gate: [verify(source, recurrence, SHAPE, gate, seed) for seed in range(seeds)] for gate in GATES}
    return {
        gate: {"output": max(v.output for v in verdicts), "final_state": max(v.final_state for v in verdicts)}
        for gate, verdicts in found.items()
    }


def table(measured: dict) -> Table:
    """Errors of the output, a row a recurrence."""
    made = Table(box=None, pad_edge=False)
    made.add_column("output error")
    for gate in GATES:
        made.add_column(gate, justify="right")
    for name, by_gate in measured.items():
        made.add_row(name, *(f"{by_gate[gate]['output']:.1e}" for gate in GATES))
    return made


@click.command()
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(dtype: str, seeds: int) -> None:
    """Measure, print a table, write the results."""
    measured = {name: errors(name, dtype, seeds) for name in zoo.names()}
    Console(width=120).print(table(measured))
    worst = max(e for by_gate in measured.values() for both in by_gate.values() for e in both.values())
    click.echo(f"largest error of output or state: {worst:.2e}")
    versions = {package: importlib.metadata.version(package) for package in ("kdagen", "tilelang", "torch", "numpy")}
    head = {"date": str(datetime.date.today()), "versions": versions, "dtype": dtype, "seeds": seeds, "B, T, H": SHAPE}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**head, "largest": worst, "errors": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
