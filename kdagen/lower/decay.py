"""How exp(sum of log decays) between two tokens of a chunk is kept finite: chosen from what is known of the gate."""

from __future__ import annotations

import math

from kdagen.ir.canonical import Canonical
from kdagen.schedule import DecayForm

# largest |exponent| in base 2 that an operand may carry: bf16 and fp32 share 8 exponent bits, fp16 has 5
EXPONENT_RANGE = {"bfloat16": 126, "float32": 126, "float16": 14}


def factored_rows(decay_lower: float, dtype: str = "bfloat16", training: bool = False) -> int:
    """Rows of a chunk that one factored product covers: about the chunk's start, n * |bound| * log2(e) < range.

    In training the factors meet cotangents, which may be large themselves: half of the range is left to these.
    """
    if decay_lower in (0, -math.inf):
        return 1 << 30 if decay_lower == 0 else 0
    return math.floor(EXPONENT_RANGE[dtype] / (1 + training) / (abs(decay_lower) * math.log2(math.e)))


def decay_form(
    canonical: Canonical, chunk_size: int, dtype: str = "bfloat16", training: bool = False
) -> tuple[DecayForm, str]:
    """The decay form for chunks of `chunk_size` tokens, and the reason in a sentence."""
    if canonical.decay == 0:
        return DecayForm.NONE, "the state does not decay, so no exponent is formed"
    if canonical.decay_axis == "":
        return DecayForm.SCALAR, (
            "one rate a head: the product is formed undecayed and multiplied by a C x C matrix of exp(sum g) <= 1"
        )
    lower = canonical.decay_lower
    rows = factored_rows(lower, dtype, training)
    if chunk_size <= rows:
        return DecayForm.FACTORED, (
            f"the gate is bounded by {lower:g} a token: about the chunk's start, factors stay below "
            f"2^{EXPONENT_RANGE[dtype] // (1 + training)} for up to {rows} rows, so one product covers {chunk_size}"
        )
    why = (
        "the gate has no lower bound"
        if lower == -math.inf
        else f"the bound of {lower:g} a token allows {rows} rows only"
    )
    return DecayForm.TREE, (
        f"{why}: midpoint tree, where each level scales rows by exp(sum after its reference) and columns by "
        "exp(sum up to it), both <= 1 for any gate"
    )
