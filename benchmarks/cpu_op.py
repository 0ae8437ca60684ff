"""KDA on CPU: kdagen's op against transformers' torch fallback and the plain per-token recurrence, side by side.

    pip install transformers==5.23.0 && pip install -e . && python benchmarks/cpu_op.py
    python benchmarks/cpu_op.py --backward        forward and backward through autograd, against the fallback's

Every round times each contestant once, in turn, so that whatever else the machine does hits all alike; reported are the
best and the median of the rounds, and ratios of medians. Peak memory is that of one call in a fresh process: the
kernel's high-water mark of resident memory (VmHWM, reset just before the call) less what was resident then, inputs
included. Each run adds a line to benchmarks/results/cpu_op.jsonl, or cpu_backward.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from records import keep, machine

LENGTHS = (64, 128, 256, 512, 1024, 2048)
MIB = 1024


def inputs(t: int, h: int = 8, d: int = 128) -> dict:
    """Unit queries and keys, log decays as a softplus gate gives them."""
    import torch

    draw = torch.Generator().manual_seed(0)
    normal = [torch.randn(1, t, h, d, generator=draw) for _ in range(4)]
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in normal[:2])
    g = -torch.nn.functional.softplus(normal[3])
    return {"q": q, "k": k, "v": normal[2], "g": g, "beta": torch.rand(1, t, h, generator=draw)}


def kdagen():
    """The op that a user calls."""
    import kdagen as kg

    op = kg.compile(kg.zoo.get("kda"))
    return lambda q, k, v, g, beta: op(q, k, v, g, beta, output_final_state=True)


def transformers():
    """The torch fallback of its Kimi Linear model; it scales queries by K^-1/2, undone here."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention as chunk

    return lambda q, k, v, g, beta: chunk(q * q.shape[-1] ** 0.5, k, v, g, beta, output_final_state=True)


def recurrence():
    """One token after another, all heads at once."""
    import torch

    def run(q, k, v, g, beta):
        state, outputs, decay = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), [], g.exp().unsqueeze(-1)
        for t in range(q.shape[1]):
            state = state * decay[:, t]
            key, query = k[:, t].unsqueeze(-2), q[:, t].unsqueeze(-2)
            p = beta[:, t, :, None, None] * (v[:, t].unsqueeze(-2) - key @ state)
            state = state + key.mT @ p
            outputs.append((query @ state).squeeze(-2))
        return torch.stack(outputs, 1), state

    return run


CONTESTANTS = {"kdagen": kdagen, "transformers": transformers, "recurrence": recurrence}


def training(name: str):
    """Forward and backward of a contestant: the gradients of all inputs, from those of output and final state."""
    import torch

    run = CONTESTANTS[name]()

    def both(**given):
        leaves = [x.requires_grad_() for x in given.values()]
        with torch.enable_grad():
            results = run(**given)
        return torch.autograd.grad(results, leaves, [torch.full_like(x, 0.1) for x in results])

    return both


def contestant(name: str, backward: bool):
    return training(name) if backward else CONTESTANTS[name]()


def seconds(names: list[str], t: int, rounds: int, backward: bool = False) -> dict[str, list[float]]:
    """Times of each contestant in each round; all must agree first."""
    import torch

    given, runs = inputs(t), {name: contestant(name, backward) for name in names}
    results = {name: run(**given) for name, run in runs.items()}
    for name, found in results.items():
        for x, expected in zip(found, results[names[-1]], strict=True):
            error = float((x - expected).norm() / expected.norm())
            assert error < 1e-4, f"{name} differs from {names[-1]} by {error}"
    found = {name: [] for name in names}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run(**given)
                found[name].append(time.perf_counter() - start)
    return found


def resident(field: str) -> int:
    """A field of this process's memory, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_mib(name: str, t: int, backward: bool = False) -> float:
    """Peak memory of one call above what was resident before it; a call on a few tokens has loaded the libraries."""
    run, given = contestant(name, backward), inputs(t)
    run(**inputs(70))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(**given)
    return (resident("VmHWM") - before) / MIB


def fresh_peak_mib(name: str, t: int, backward: bool) -> float:
    """`peak_mib` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--tokens", str(t), *["--backward"] * backward]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Best and median milliseconds."""
    return {n: {"best_ms": 1e3 * min(t), "median_ms": 1e3 * statistics.median(t)} for n, t in times.items()}


def measure(tokens: int, rounds: int, backward: bool) -> dict:
    """The whole comparison as one record."""
    record = {**machine("transformers"), "shape": f"B=1 T={tokens} H=8 K=V=128 float32"}
    record["tokens"] = summary(seconds(["kdagen", "transformers"], tokens, rounds, backward))
    record["peak_mib"] = {name: fresh_peak_mib(name, tokens, backward) for name in ("kdagen", "transformers")}
    if not backward:
        record["by_length"] = {t: summary(seconds(["kdagen", "recurrence"], t, 3 * rounds)) for t in LENGTHS}
    return record


def report(record: dict) -> None:
    """The record as tables."""
    from rich.console import Console
    from rich.table import Table

    mine, theirs, peaks = record["tokens"]["kdagen"], record["tokens"]["transformers"], record["peak_mib"]
    fallback = Table("", "best ms", "median ms", "peak MiB", title=f"KDA, {record['shape']}, {record['cores']} cores")
    for name, t in record["tokens"].items():
        fallback.add_row(name, f"{t['best_ms']:.1f}", f"{t['median_ms']:.1f}", f"{peaks[name]:.0f}")
    ratios = [theirs[f] / mine[f] for f in ("best_ms", "median_ms")] + [peaks["transformers"] / peaks["kdagen"]]
    fallback.add_row("ratio", *(f"{r:.1f}x" for r in ratios))
    console = Console()
    console.print(fallback)
    if "by_length" in record:
        console.print(by_length(record["by_length"]))


def by_length(found: dict):
    """The table of medians against the per-token recurrence."""
    from rich.table import Table

    table = Table("T", "kdagen ms", "per-token recurrence ms", "ratio", title="medians by length")
    for t, times in found.items():
        a, b = (times[n]["median_ms"] for n in ("kdagen", "recurrence"))
        table.add_row(str(t), f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}x")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=CONTESTANTS, help="only print one contestant's peak memory in MiB")
    parser.add_argument("--backward", action="store_true", help="forward and backward, through autograd")
    options = parser.parse_args()
    if options.peak:
        print(peak_mib(options.peak, options.tokens, options.backward))
        return
    record = measure(options.tokens, options.rounds, options.backward)
    report(record)
    keep("cpu_backward" if options.backward else "cpu_op", record)


if __name__ == "__main__":
    main()
