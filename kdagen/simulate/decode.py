"""Decodes in simulation: an op's decode kernel on torch tensors and a pool of states, which it updates in place.

kdagen.simulate.run does the same for whole sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdagen.codegen.source import OpSource
from kdagen.errors import ArgumentError
from kdagen.simulate.memory import Statistics
from kdagen.simulate.run import Run

if TYPE_CHECKING:
    import torch


def simulate_decode(
    op_source: OpSource,
    tensors: dict[str, torch.Tensor],
    state_pool: torch.Tensor,
    state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    null_below: int = 0,
    *,
    new_state_pool: torch.Tensor | None = None,
    check_races: bool = False,
) -> tuple[torch.Tensor, Statistics]:
    """(output, statistics of the kernel): what `op.decode` does, nothing checked but dtypes and shapes.

    States are written to `state_pool` itself, or to `new_state_pool` if given. The output starts as NaN, or as zero
    with `cu_seqlens`. `check_races` refuses blocks that touch each other's results.
    """
    import torch

    if op_source.passes is None or "decode" not in op_source.passes:
        raise ArgumentError(
            f"{op_source.name}: has no kernel for decoding: expected what pipeline.compile_decode gives"
        )
    first = next(x for name, x in tensors.items() if _per_token(op_source, name))
    sequences = first.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    indices = torch.arange(sequences) if state_indices is None else state_indices
    accepted = torch.ones(sequences) if num_accepted_tokens is None else num_accepted_tokens
    given = {
        "cu_seqlens": cu_seqlens,
        "state_pool": state_pool,
        "new_state_pool": state_pool if new_state_pool is None else new_state_pool,
        "state_indices": indices.reshape(sequences, -1).int(),
        "num_accepted_tokens": accepted.int(),
    }
    run = _Decode(op_source, tensors, given, null_below, check_races)
    memory, statistics = run("decode")
    (kernel,) = statistics.values()
    return run.unpacked(memory[run.of_role("out")]), kernel


def _per_token(op: OpSource, name: str) -> bool:
    return any(p.name == name and p.shape[0] == "T" for kernel in op.kernels for p in kernel.params)


class _Decode(Run):
    """A run whose only scalar is the lowest index of a state."""

    def __init__(self, op: OpSource, tensors: dict, others: dict, null_below: int, check_races: bool):
        self.null_below = null_below
        super().__init__(op, tensors, others, False, check_races, ())

    def value(self, scalar: str, states_every: int) -> int:
        return {"null_below": self.null_below}[scalar]
