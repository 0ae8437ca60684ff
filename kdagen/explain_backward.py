"""What kdagen makes of a recurrence's backward, in words and formulas; the forward's are in kdagen.explain.

Equations and FLOPs are those of the derived adjoint; memory is that of the kernels that it is lowered to.
"""

from __future__ import annotations

from kdagen.explain import HEAD_DIM, Derived, cost_table, joined, table, wrapped
from kdagen.ir.canonical import Argument
from kdagen.ir.tensor import Load, Value, writes
from kdagen.ir.tensor_cost import backward_cost, cost
from kdagen.ir.tensor_equations import Latex, Plain
from kdagen.recurrence import Recurrence
from kdagen.runtime.manifest import memory
from kdagen.schedule import Keep

KEPT = {
    Keep.INPUTS: "nothing: the backward computes all of the forward again",
    Keep.STATES: "the state before each chunk",
    Keep.ALL: "these states, and all that is prepared before them",
}


def explain(recurrence: Recurrence) -> str:
    """The backward of a recurrence: what is computed again, from chunk to chunk, in parallel; what that costs."""
    d = Derived(recurrence)
    sections = {
        "": f"{recurrence.name}, backward: d_x is the cotangent of x, the loss differentiated by it",
        "Computed again, for all chunks at once": recompute_text(d),
        "Chunk after chunk, from the last to the first": reverse_text(d),
        "For all chunks at once": "\n".join(Plain().equations(d.adjoint.gradients)),
        "Gradients": table(gradient_row(argument, value) for argument, value in d.adjoint.results),
        "Cost": cost_text(d),
        "Memory": memory_text(recurrence),
    }
    return joined(sections)


def latex(recurrence: Recurrence) -> str:
    """The backward's equations as a LaTeX document."""
    a = Derived(recurrence).adjoint
    return Latex().document(
        f"{recurrence.name}: the backward in chunks of C tokens (bars: cotangents)",
        {
            "Computed again": a.recompute,
            "From chunk to chunk, from the last to the first": a.reverse,
            "For all chunks at once": a.gradients,
        },
    )


# -- sections


def recompute_text(d: Derived) -> str:
    a = d.adjoint
    names = [v.name for op in a.recompute if not isinstance(op, Load) for v in writes(op)]
    return wrapped(f"{', '.join(names)}: as in the forward, from its arguments and the state {a.forward.state.name}")


def reverse_text(d: Derived) -> str:
    a = d.adjoint
    given = f"{a.d_next_state.name} is the cotangent of the state after the chunk, {a.d_state.name} of that before it"
    return "\n".join([wrapped(given), "", *Plain().equations(a.reverse)])


def gradient_row(argument: Argument, value: Value | None) -> tuple[str, str]:
    if value is None:
        return argument.name, "0: nothing depends on it"
    return argument.name, value.name if argument.per_token else f"sum of {value.name} over chunks and sequences"


def cost_text(d: Derived) -> str:
    it, forward = backward_cost(d.adjoint), cost(d.program)
    rows = [
        ("FLOPs computed again", it.recompute),
        ("FLOPs from chunk to chunk", it.reverse),
        ("FLOPs in parallel", it.gradients),
        ("FLOPs", it.flops),
        ("of these in products", it.products),
        ("the forward's FLOPs", forward.flops),
        ("bytes, inputs and gradients", it.least_bytes),
    ]
    return cost_table(rows)


def memory_text(recurrence: Recurrence) -> str:
    """What each memory policy keeps and moves: read off the kernels of the default schedule."""
    rows = [("keep", "beside its arguments the forward leaves", "kept", "forward moves", "backward moves")]
    rows += [(keep.value, what, *map("{:,.0f}".format, figures(recurrence, keep))) for keep, what in KEPT.items()]
    note = f"bytes a token a head, of the kernels for sm90 with their default schedule, bfloat16, K=V={HEAD_DIM}"
    return f"{table(rows)}\n\n{note}"


def figures(recurrence: Recurrence, keep: Keep) -> tuple[float, float, float]:
    """Bytes a token a head: kept from forward to backward, moved by the forward, moved by the backward."""
    from kdagen.pipeline import compile_training

    return memory(compile_training(recurrence, HEAD_DIM, schedule={"keep": keep}).plan())
