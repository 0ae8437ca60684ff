"""How far the generated GPU programs are from the recurrence: every zoo entry, every gate class, K = V = 128.

    pip install -e '.[build]' && python benchmarks/accuracy.py

Each program is executed on the CPU with the GPU's rounding and compared with the recurrence, token by token in float64,
over the same rounded inputs: norm of the difference over norm, of the output, of the final state and, from the program
for training, of every gradient (against torch's autograd of the recurrence), the largest over the seeds. Nothing is
timed. Writes benchmarks/results/accuracy.json.
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
from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate.verify import verify, verify_training
from kdagen.zoo.inputs import GATES

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SHAPE = (1, 150, 2)  # B, T, H: a partial last chunk
TRAINED = (1, 75, 8)  # the same; a parameter's gradient is one number a head, whose terms may cancel in one head or two


def errors(name: str, dtype: str, seeds: int) -> dict[str, dict]:
    """Largest errors of output, final state and gradients for each gate class; a gradient's tolerance beside it."""
    recurrence = zoo.get(name)
    inference, training = (make(recurrence, 128, dtype, "sm90") for make in (compile_op, compile_training))
    found = {}
    for gate in GATES:
        verdicts = [verify(inference, recurrence, SHAPE, gate, seed) for seed in range(seeds)]
        trained = [verify_training(training, recurrence, TRAINED, gate, seed) for seed in range(seeds)]
        found[gate] = {
            "output": max(v.output for v in verdicts),
            "final_state": max(v.final_state for v in verdicts),
            "training_output": max(v.output for v in trained),
            "gradients": {
                n: {"error": max(v.gradients[n][0] for v in trained), "at_most": most}
                for n, (_, most) in trained[0].gradients.items()
            },
        }
    return found


def table(title: str, measured: dict, figure) -> Table:
    """A figure of every gate class, a row a recurrence."""
    made = Table(box=None, pad_edge=False)
    made.add_column(title)
    for gate in GATES:
        made.add_column(gate, justify="right")
    for name, by_gate in measured.items():
        made.add_row(name, *(figure(by_gate[gate]) for gate in GATES))
    return made


def worst_gradient(found: dict) -> str:
    """The gradient that comes nearest to what it may be off by."""
    name, it = max(found["gradients"].items(), key=lambda item: item[1]["error"] / item[1]["at_most"])
    return f"d_{name} {it['error']:.1e}{'' if it['error'] <= it['at_most'] else ' (!)'}"


def limits(gradients: list[dict]) -> list[float]:
    """The tolerances in use."""
    return sorted({g["at_most"] for g in gradients})


@click.command()
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(dtype: str, seeds: int) -> None:
    """Measure, print a table, write the results."""
    measured = {name: errors(name, dtype, seeds) for name in zoo.names()}
    console = Console(width=160)
    console.print(table("output error", measured, lambda found: f"{found['output']:.1e}"))
    console.print(table("gradients: worst", measured, worst_gradient))
    every = [both for by_gate in measured.values() for both in by_gate.values()]
    worst = max(both[what] for both in every for what in ("output", "final_state"))
    gradients = [g for both in every for g in both["gradients"].values()]
    largest = {f"{most:g}": max(g["error"] for g in gradients if g["at_most"] == most) for most in limits(gradients)}
    console.print(f"largest error of output or state: {worst:.2e}")
    for most, error in largest.items():
        console.print(f"largest error of gradients that may be off by {most}: {error:.2e}")
    versions = {package: importlib.metadata.version(package) for package in ("kdagen", "tilelang", "torch", "numpy")}
    head = {"date": str(datetime.date.today()), "versions": versions, "dtype": dtype, "seeds": seeds}
    head |= {"B, T, H": SHAPE, "B, T, H in training": TRAINED}
    RESULTS.parent.mkdir(exist_ok=True)
    found = {**head, "largest": worst, "largest_gradients": largest, "errors": measured}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
