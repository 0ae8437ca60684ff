"""Sequences split over processes, compared with one process: outputs, final state and all gradients.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

Each rank holds consecutive tokens of every sequence and calls the same op on them. On GPUs the calls are the same, with
init_process_group("nccl") and tensors there.
"""

from __future__ import annotations

import click
import torch
import torch.distributed as dist

import kdagen as kg

RATES = ("A_log", "dt_bias")  # parameters of the head, which every rank has


def inputs(batch: int, tokens: int, heads: int, channels: int) -> dict[str, torch.Tensor]:
    """The same on every rank, drawn by one seed."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    q, k, v, g = (normal(batch, tokens, heads, channels) for _ in range(4))
    beta, A_log, dt_bias = normal(batch, tokens, heads), normal(heads), normal(heads, channels)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}


def gradients(op, given: dict, state, d_out, d_state) -> tuple:
    """Output, final state, and the gradient of each argument and of the initial state."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()} | {"initial_state": state.requires_grad_()}
    o, final = op(**leaves, output_final_state=True)
    torch.autograd.backward([o, final], [d_out, d_state])
    return o.detach(), final.detach(), {name: x.grad for name, x in leaves.items()}


def compare(name: str, batch: int, tokens: int, heads: int, channels: int) -> float:
    """The largest difference of this rank's part from what one process gives, relative to it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    op, whole = kg.compile(name), inputs(batch, tokens, heads, channels)
    cuts = [tokens * (n + 1) // ranks - n % 2 for n in range(ranks - 1)]  # not of one length
    here = slice(*[0, *cuts, tokens][rank : rank + 2])
    mine = {name: x if name in RATES else x[:, here] for name, x in whole.items()}
    state, d_state = torch.randn(2, batch, heads, channels, channels, dtype=torch.float64)
    d_out = torch.randn(batch, tokens, heads, channels, dtype=torch.float64)

    split = kg.sequence_parallel(op)  # all that is needed
    asked = d_state if rank == 0 else torch.zeros_like(d_state)  # the final state is on all ranks: one loss has it
    o, final, found = gradients(split, mine, state.clone(), d_out[:, here], asked)
    for parameter in RATES:
        dist.all_reduce(found[parameter])  # as in data parallelism
    found["initial_state"] = found["initial_state"] if rank == 0 else None  # of which the first rank has all

    expected_o, expected_final, expected = gradients(op, whole, state.clone(), d_out, d_state)
    pairs = {"output": (o, expected_o[:, here]), "final state": (final, expected_final)}
    for argument, x in expected.items():
        shared = argument in (*RATES, "initial_state")
        pairs[f"d_{argument}"] = found[argument], x if shared else x[:, here]
    errors = {what: off(*pair) for what, pair in pairs.items() if pair[0] is not None}
    every: list = [None] * ranks
    dist.all_gather_object(every, (here, errors))
    if rank == 0:
        show(every)
    return max(max(errors.values()) for _, errors in every)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def show(every: list) -> None:
    """A column a rank."""
    print(f"{'':16}" + "".join(f"{f'rank {n}':>12}" for n in range(len(every))))
    print(f"{'tokens':16}" + "".join(f"{f'{here.start}..{here.stop - 1}':>12}" for here, _ in every))
    for what in every[0][1]:
        print(
            f"{what:16}" + "".join(f"{errors[what]:12.1e}" if what in errors else f"{'-':>12}" for _, errors in every)
        )


@click.command()
@click.option(
    "--op", "name", default="kda_softplus", show_default=True, help="A recurrence of q, k, v, g, beta, A_log, dt_bias."
)
@click.option("--shape", default="2x301x2x32", show_default=True, help="B x T x heads x channels.")
def main(name: str, shape: str) -> None:
    """Compare an op over ranks with the same op in one process, in float64."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    if dist.get_rank() == 0:
        print(f"{name}, {shape} in float64 over {dist.get_world_size()} ranks: differences from one process\n")
    worst = compare(name, *map(int, shape.split("x")))
    if dist.get_rank() == 0:
        print(f"\nlargest {worst:.1e}: {'equal to rounding' if worst < 1e-12 else 'NOT EQUAL'}")
    dist.destroy_process_group()
    if worst >= 1e-12:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
