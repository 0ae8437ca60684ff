"""How far kernels may be from their recurrence, and the recurrence's own gradients to measure that with.

The oracle is kdagen.reference, in float64; here are gradients through it, and the errors that a dtype allows. Needs
torch, but nothing that builds or executes kernels: a machine that only runs them has no more.
"""

from __future__ import annotations

import math

from kdagen.ir.canonical import Canonical
from kdagen.reference import recurrence_reference

# Relative error below which a program computes its recurrence, as far as its operands' dtype allows.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}
# The same of gradients: of keys, values and the state, and of what decays and scales.
GRADIENT_TOLERANCE = {"bfloat16": (8e-3, 2e-2), "float16": (1e-3, 2.5e-3), "float32": (1e-5, 1e-5)}


def loosely(canonical: Canonical) -> set[str]:
    """Arguments whose gradients are sums of terms that cancel: what decays, a token's scalars, a head's parameters."""
    return canonical.gates | {a.name for a in canonical.arguments if not a.axis or not a.per_token}


def gradient_tolerance(canonical: Canonical, dtype: str) -> dict[str, float]:
    """What the error of each gradient may be at most: by argument, and of "initial_state"."""
    loose, (tight, wide) = loosely(canonical), GRADIENT_TOLERANCE[dtype]
    names = (*(a.name for a in canonical.arguments), "initial_state")
    return {name: wide if name in loose else tight for name in names}


def reference_gradients(
    recurrence, tensors: dict, state, d_out, d_final_state, reference=recurrence_reference
) -> tuple:
    """(output, final state, gradients by argument and of "initial_state") in float64, token by token."""
    import torch

    leaves = {name: x.double().requires_grad_() for name, x in {**tensors, "initial_state": state}.items()}
    given = {name: x for name, x in leaves.items() if name != "initial_state"}
    o, final = reference(recurrence, given, leaves["initial_state"])
    made = torch.autograd.grad(
        (o, final), list(leaves.values()), (d_out.double(), d_final_state.double()), materialize_grads=True
    )
    return o.detach(), final.detach(), dict(zip(leaves, made))


def relative_error(found, expected) -> float:
    """Norm of the difference over norm; 0 where both are 0."""
    difference, norm = float((found.double() - expected).norm()), float(expected.norm())
    return difference / norm if norm else math.inf if difference else difference
