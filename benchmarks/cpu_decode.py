"""KDA's decode step on CPU against the speed of memory, side by side.

    pip install -e . && python benchmarks/cpu_decode.py

A step must read each state and write it once. A round does so for the states of every layer of a model in turn (more
than caches hold, as in a model): by kdagen's op, with slots in order and not, and without its native loop ("on torch");
by `state.mul_(1)`, which does nothing else ("in place"); and by copying each state to one place ("copy", which is how
memory is commonly timed). Reported are the best and the median of rounds, for a layer, and ratios of the best, as other
work on the machine only ever adds. Each run adds a line to benchmarks/results/cpu_decode.jsonl unless --dry.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

from records import keep, machine

LAYERS = 12
TOKENS = 7  # of which each step takes another one, so that states stay as in use: numbers near 0 are slow
SHAPES = ((8, 32, 128), (1, 32, 128), (32, 32, 128), (8, 12, 128), (8, 32, 64))


def inputs(b: int, h: int, d: int, seed: int) -> list:
    """A token of each sequence: unit queries and keys, decays that leave states of the size of values."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    normal = [torch.randn(b, 1, h, d, generator=draw) for _ in range(4)]
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in normal[:2])
    return [q, k, normal[2], -0.01 * torch.nn.functional.softplus(normal[3]), torch.rand(b, 1, h, generator=draw)]


def contestants(shape: tuple[int, int, int]) -> dict:
    """What is timed, on one state [B, H, K, V]."""
    import torch

    import kdagen as kg
    from kdagen.runtime.cpu_decode import on_torch

    def without_compiler(state):
        with on_torch():
            op.decode(*next(tokens), state_pool=state)

    op, tokens = kg.compile("kda"), itertools.cycle([inputs(*shape, seed) for seed in range(TOKENS)])
    b, h, d = shape
    place, turned = torch.empty(b, h, d, d), torch.arange(b).flip(0).contiguous()
    return {
        "in place": lambda state: state.mul_(1.0),
        "copy": place.copy_,
        "kdagen": lambda state: op.decode(*next(tokens), state_pool=state),
        "kdagen, any slots": lambda state: op.decode(*next(tokens), state_pool=state, state_indices=turned),
        "kdagen, on torch": without_compiler,
    }


def measure(shape: tuple[int, int, int], rounds: int) -> dict:
    """Milliseconds for a layer of each contestant, one round of all layers after another."""
    import torch

    b, h, d = shape
    states, run = [torch.randn(b, h, d, d) * 0.1 for _ in range(LAYERS)], contestants(shape)
    times: dict[str, list[float]] = {name: [] for name in run}
    for i in range(rounds + 1):
        for name, step in run.items():
            start = time.perf_counter()
            for state in states:
                step(state)
            if i:
                times[name].append((time.perf_counter() - start) / LAYERS * 1e3)
    return {n: {"best_ms": min(x), "median_ms": statistics.median(x)} for n, x in times.items()}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of torch; as many as it takes unless given")
    parser.add_argument("--dry", action="store_true", help="leave the results file as it is")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    record = machine() | {"threads": torch.get_num_threads(), "layers": LAYERS, "rows": []}
    columns = f"{'in place ms':>12}{'copy ms':>9}{'kdagen ms':>11}{'any slots ms':>14}{'on torch ms':>13}"
    print(f"{'B':>3}{'H':>4}{'K=V':>5}  {columns}  ratios")
    for b, h, d in SHAPES:
        found = measure((b, h, d), asked.rounds)
        memory, copy, ours, any_slots, on_torch = (x["best_ms"] for x in found.values())
        gigabytes = 8e-6 * b * h * d * d / memory
        record["rows"].append({"B": b, "H": h, "D": d, **found, "ratio": ours / memory, "GB/s": gigabytes})
        times = f"{memory:>12.3f}{copy:>9.3f}{ours:>11.3f}{any_slots:>14.3f}{on_torch:>13.3f}"
        print(f"{b:>3}{h:>4}{d:>5}  {times}  {ours / memory:.2f} (of a copy: {ours / copy:.2f})")
    if not asked.dry:
        keep("cpu_decode", record)


if __name__ == "__main__":
    main()
