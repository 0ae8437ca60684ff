"""Tensor programs as text: one line an op, with its equation beside it."""

from __future__ import annotations

import sympy

from kdagen.ir.tensor import (
    Adjoint,
    ColSum,
    Decay,
    Deinterleave,
    Gram,
    GramAdjoint,
    Interleave,
    Load,
    Map,
    MatMul,
    Op,
    Program,
    RowSum,
    SolveTril,
    Spread,
    Value,
    reads,
    writes,
)


def show(program: Program) -> str:
    """The program, section by section."""
    state, after, out = (typed(v) for v in (program.state, program.next_state, program.out))
    return _text(f"program {program.canonical.name}: {state} -> {after}, {out}", program, "prepare", "scan", "output")


def show_adjoint(adjoint: Adjoint) -> str:
    """The backward, section by section."""
    given = ", ".join(typed(v) for v in (adjoint.d_out, adjoint.d_next_state))
    made = {f"d {a.name}": v.name if v else "0" for a, v in adjoint.results}
    results = ", ".join(f"{name} = {value}" for name, value in made.items())
    head = f"adjoint {adjoint.forward.canonical.name}: {given} -> {typed(adjoint.d_state)}; {results}"
    return _text(head, adjoint, "recompute", "reverse", "gradients")


def _text(head: str, program, *sections: str) -> str:
    lines = [head]
    for section in sections:
        ops = [(_left(op), right(op), op.eq) for op in getattr(program, section)]
        lines += ["", f"{section}:"] + [line(*op) for op in ops]
    return "\n".join(lines) + "\n"


def line(left: str, right: str, eq: str) -> str:
    return f"  {left:16} = {right:44} # {eq}".rstrip(" #") if eq else f"  {left:16} = {right}"


def typed(value: Value) -> str:
    return f"{value.name}[{', '.join(value.dims)}]"


def _left(op: Op) -> str:
    return ", ".join(map(typed, writes(op)))


def right(op: Op) -> str:
    match op:
        case Load():
            return f"load {op.argument.name}"
        case Map():
            elements = {v.symbol: sympy.Symbol(f"{v.name}[{', '.join(i)}]" if i else v.name) for v, i in op.operands}
            return f"{op.expr.xreplace(elements)}" + (", zero past end" if op.zero_past_end else "")
        case Decay():
            return f"decay {op.span.value} of {op.g.name}"
        case Gram():
            seen = ", ".join(
                f"{z.name} {'after' if a else 'before'}" for z, a in zip(op.readers, op.after, strict=True)
            )
            kept = [
                v.name
                for row, flags in zip(op.outs, op.diagonal, strict=True)
                for v, f in zip(row, flags, strict=True)
                if f
            ]
            diagonal = f", diagonal kept in {', '.join(kept)}" if kept else ""
            decayed = f" decayed by {op.g.name}" if op.g else ""
            return f"gram ({seen}) x ({', '.join(v.name for v in op.writers)}){decayed}{diagonal}"
        case Interleave():
            return "interleave " + "; ".join(", ".join(v.name for v in row) for row in op.parts)
        case MatMul():
            products = [f"{a.name}{'^T' * ta} @ {b.name}{'^T' * tb}" for a, b, ta, tb in op.terms]
            return " + ".join([*([op.add.name] if op.add else []), *products])
        case GramAdjoint():
            given = ", ".join(v.name for row in op.d_outs for v in row if v)
            return f"adjoint of gram ({', '.join(v.name for v in reads(op.gram))}) from {given}"
        case Deinterleave():
            return f"parts of {op.a.name}"
        case Spread():
            return f"{f'{op.add.name} + ' if op.add else ''}{op.a.name} over the tokens {op.span.value} each row"
        case RowSum() | ColSum() | SolveTril():
            return f"{ {RowSum: 'row sums', ColSum: 'column sums', SolveTril: 'solve_tril'}[type(op)] } of {op.a.name}"
