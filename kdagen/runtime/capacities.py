"""How much room a call's tensors need, from shapes alone: nothing waits for what lies on the GPU.

The symbols are those of kdagen.codegen.source.TensorSpec; why so many slots are enough is told in kdagen.lower.rows.
"""

from __future__ import annotations

NEVER = 2**30  # chunks from one returned state to the next, where none are asked for
# Roles of the tensors that are zero before a launch: what was not given, what is added up, slots that stay empty.
ZERO = ("initial_state", "d_out", "d_final_state", "partial_gradient", "states")
PADDED = ("out", "gradient")  # zero in a ragged batch alone, which may have tokens of no sequence


def capacities(tokens: int, sequences: int, chunk_size: int, schedule: dict, states_every: int = 0) -> dict[str, int]:
    """T, N, N1, NC, NS and, in training or where sequences are split, NG."""
    found = {
        "T": tokens,
        "N": sequences,
        "N1": sequences + 1,
        "NC": tokens // chunk_size + sequences,
        "NS": tokens // states_every if states_every else 0,
    }
    if segment := schedule.get("segment") or schedule.get("split"):
        found["NG"] = tokens // (chunk_size * segment) + sequences
    return found
