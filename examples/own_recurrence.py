"""A recurrence of one's own in ten lines: run on the CPU, generated for a GPU, and both checked.

The gated delta rule with two changes: what is erased is found by a key of its own (`e`), and a learned share of the
value (`D`, one a head) goes past the state straight to the output. Neither is known to kdagen beforehand.

    python examples/own_recurrence.py
"""

from __future__ import annotations

import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op
from kdagen.reference import recurrence_reference
from kdagen.simulate.verify import relative_error, verify


@kg.recurrence
def erase(S, q, k, v, e: kg.Key, g: kg.Scalar, beta, D):
    """S_t = exp(g) S_{t-1} - beta e (S~^T e)^T + beta k v^T, o = S_t^T q + D v"""
    e = kg.l2norm(e)
    S = kg.exp(g) * S  # decay, one rate a head
    S = S - kg.outer(e, beta * (S.T @ e))  # erase what the state holds at e
    S = S + kg.outer(k, beta * v)  # write v at k
    return S, S.T @ q + D * v


def main(tokens: int = 512, simulated_tokens: int = 80) -> dict[str, float]:
    """Runs it three ways and prints how far each is from the recurrence; returns the errors."""
    print(f"What was written, as kdagen recorded it:\n\n{erase}\n")

    # On CPU tensors the op runs at once; head_dim is that of the GPU kernels.
    op = kg.compile(erase, head_dim=(64, 64))
    drawn = kg.zoo.sample(canonical(erase), (2, tokens, 4, 64, 64), gate="softplus")
    tensors = {name: x.float() for name, x in drawn.items()}
    with torch.no_grad():
        o, state = op(**tensors, output_final_state=True)
    o_ref, state_ref = recurrence_reference(erase, tensors)

    # The programs for an H100, executed here with its rounding.
    source = compile_op(erase, head_dim=(64, 64), dtype="bfloat16", arch="sm90")
    verdict = verify(source, erase, (1, simulated_tokens, 2), gate="softplus")

    errors = {
        "CPU op, output": relative_error(o, o_ref),
        "CPU op, final state": relative_error(state, state_ref),
        "simulated sm90 program, output": verdict.output,
        "simulated sm90 program, final state": verdict.final_state,
    }
    print("Relative errors against the recurrence, token by token in float64:\n")
    for what, error in errors.items():
        print(f"  {what:<38}{error:.1e}")
    print(f"\nWhat runs it:\n\n{op.explain()}\n")
    print("Build it:  kdagen build --arch sm90 --op examples/own_recurrence.py:erase --head-dim 64 --out my_ops")
    return errors


if __name__ == "__main__":
    main()
