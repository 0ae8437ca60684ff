"""What kdagen makes of a recurrence, in words and formulas: nothing here is written down, all of it is derived.

`explain` speaks of one recurrence, `compare` sets two side by side, `latex` gives the equations as a document.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from functools import cached_property

import sympy

from kdagen.ir.canonical import Argument, Canonical, Intra, Reader
from kdagen.ir.tensor import Adjoint, Gram, Load, MatMul, Program
from kdagen.ir.tensor_cost import C, K, V, cost
from kdagen.ir.tensor_equations import Latex, Plain
from kdagen.recurrence import Recurrence

CHUNKS = (16, 64)  # of the worked numbers, at K = V = HEAD_DIM
HEAD_DIM = 128
WIDTH = 110
T = sympy.Symbol("T", positive=True)


@dataclass(frozen=True)
class Derived:
    """A recurrence with all that is derived from it."""

    recurrence: Recurrence

    @cached_property
    def canonical(self) -> Canonical:
        from kdagen.derive.canonical import canonical

        return canonical(self.recurrence)

    @cached_property
    def program(self) -> Program:
        from kdagen.derive.chunk import chunk_form

        return chunk_form(self.canonical)

    @cached_property
    def adjoint(self) -> Adjoint:
        from kdagen.derive.adjoint import adjoint

        return adjoint(self.program)

    @cached_property
    def grams(self) -> list[Gram]:
        return [op for op in self.program.prepare if isinstance(op, Gram)]

    @cached_property
    def products(self) -> dict[str, list[str]]:
        """The matrix products of a chunk by the value that they make; secondary matrices under the name of each."""
        secondary = {"secondary": [v.name for op in self.grams for row in op.outs for v in row]}
        ops = self.program.prepare + self.program.scan + self.program.output
        return secondary | {op.out.name: Plain().products(op) for op in ops if isinstance(op, MatMul)}


def explain(recurrence: Recurrence) -> str:
    """The derivation of a recurrence from what was written to what it costs."""
    d = Derived(recurrence)
    sections = {
        "": f"{recurrence.name}: {recurrence.doc}" if recurrence.doc else recurrence.name,
        "Recurrence": str(recurrence),
        "Arguments": table(argument_row(a, d.canonical) for a in d.canonical.arguments),
        "Canonical form": canonical_text(d.canonical),
        "Chunk form": chunk_text(d),
        "Secondary matrices": secondary_text(d),
        "Cost": cost_text(d),
        "Decays": decay_text(d.canonical),
    }
    return joined(sections)


def latex(recurrence: Recurrence) -> str:
    """The chunk form's equations as a LaTeX document."""
    p = Derived(recurrence).program
    return Latex().document(
        f"{recurrence.name}: the form in chunks of C tokens",
        {"Before the state is known": p.prepare, "From state to state": p.scan, "Output": p.output},
    )


# -- layout


def joined(sections: dict[str, str]) -> str:
    """Texts under their headings."""
    return "\n".join(f"{heading}\n{indented(text)}" if heading else f"{text}\n" for heading, text in sections.items())


def indented(text: str) -> str:
    return textwrap.indent(text, "  ") + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(rows) -> str:
    """Columns aligned; the last one may run on."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# -- sections


def argument_row(a: Argument, c: Canonical) -> tuple[str, ...]:
    dims = [*(["B", "T"] if a.per_token else []), "H", *([a.axis] if a.axis else [])]
    role = {"K": "key channels", "V": "value channels", "": "scalar"}[a.axis]
    bounds = "" if a.lower is a.upper is None else f", between {a.lower} and {a.upper}"
    parts = ", ".join(name for name, e in parts_of(c).items() if a.symbol in e.free_symbols)
    what = f"{role}{'' if a.per_token else ', the same for all tokens'}{bounds}"
    return a.name, f"[{', '.join(dims)}]", what, f"in {parts}" if parts else "not used"


def parts_of(c: Canonical) -> dict[str, sympy.Expr]:
    """The expressions of the canonical form by the part that they play."""
    readers = [s.reader for s in c.streams]
    return {
        "decay": sympy.sympify(c.decay),
        "x": sympy.Tuple(*(s.x for s in c.streams)),
        "y": sympy.Tuple(*(r.y for r in readers)),
        "z": sympy.Tuple(*(r.z for r in readers)),
        "scale": sympy.Tuple(*(r.scale for r in readers)),
        "output": sympy.Tuple(c.output.y, c.output.z, c.output.scale),
        "own token": sympy.Tuple(*(i for r in (*readers, c.output) for i in r.intra if not isinstance(i, Intra))),
    }


def canonical_text(c: Canonical) -> str:
    decays = c.decay != 0
    law = [
        "each stream writes x p^T, where p = scale (y + S^T z):",
        f"  S' = {'diag(exp(g)) S' if decays else 'S'} + sum of x p^T",
    ]
    if decays:
        rate = "a key channel" if c.decay_axis else "a head"
        law += [
            f"with the log decay g{'' if str(c.decay) == 'g' else f' = {c.decay}'}, one rate {rate}, {bound_text(c)}"
        ]
    rows = [("", "x", "y", "z", "scale", "reads the state", "own token's p of")]
    readers = [(f"stream {i + 1}", s.x, s.reader) for i, s in enumerate(c.streams)] + [("output", "", c.output)]
    rows += [(name, x, *reader_row(r, decays)) for name, x, r in readers]
    return "\n".join(law) + "\n\n" + table(rows)


def bound_text(c: Canonical) -> str:
    return "with no lower bound" if c.decay_lower == -math.inf else f"never below {c.decay_lower:g} a token"


def reader_row(r: Reader, decays: bool) -> tuple:
    seen = [
        f"stream {i + 1}" + ("" if isinstance(own, Intra) else f" times {own}")
        for i, own in enumerate(r.intra)
        if own != Intra.NONE
    ]
    when = ("after its decay" if r.after else "before its decay") if decays else "yes"
    return r.y, r.z, r.scale, when if r.reads else "no", ", ".join(seen) or "-"


def chunk_text(d: Derived) -> str:
    p, plain = d.program, Plain()
    legend = (
        f"tokens i, j of a chunk of C; key channels d, value channels e; {p.state.name} is the state before the chunk, "
        f"{p.next_state.name} the one after it"
    )
    groups = {
        "for all chunks at once:": plain.equations(op for op in p.prepare if not isinstance(op, Load)),
        "chunk after chunk:": plain.equations(p.scan),
        "output:": plain.equations(p.output),
    }
    return "\n".join(
        [wrapped(legend), *(f"\n{title}\n" + "\n".join(f"  {e}" for e in lines) for title, lines in groups.items())]
    )


def secondary_text(d: Derived) -> str:
    c = d.canonical
    head = f"{c.secondary_matrices} = {len(c.readers)} readers x {len(c.streams)} streams"
    if not d.grams:
        return head
    op = d.grams[0]
    rows = [("", *(f"writes {x.name}" for x in op.writers))]
    rows += [(f"reads with {z.name}", *(v.name for v in outs)) for z, outs in zip(op.readers, op.outs, strict=True)]
    return f"{head}\n\n{table(rows)}"


def cost_text(d: Derived) -> str:
    note = "formulas are for T tokens of one head, numbers for one token; bytes with 2-byte tensors and fp32 states"
    return f"{cost_table(cost_rows(d))}\n\n{note}"


def cost_table(labelled: list[tuple[str, sympy.Expr]]) -> str:
    """Formulas, and numbers for two sizes of chunks."""
    rows = [("", "formula", *(f"C={n}, K=V={HEAD_DIM}" for n in CHUNKS))]
    return table(rows + [(label, T * f, *(number(f, n) for n in CHUNKS)) for label, f in labelled])


def cost_rows(d: Derived) -> list[tuple[str, sympy.Expr]]:
    it = cost(d.program)
    return [
        ("FLOPs in products", it.products),
        ("FLOPs in solves", it.solve),
        ("FLOPs by element", it.elementwise),
        ("FLOPs", it.flops),
        ("bytes, inputs and output", it.least_bytes),
        ("bytes, prepare + scan", it.stored_bytes),
    ]


def number(formula: sympy.Expr, chunk: int) -> str:
    return f"{float(formula.subs({C: chunk, K: HEAD_DIM, V: HEAD_DIM})):,.0f}"


def decay_text(c: Canonical) -> str:
    from kdagen.lower.decay import decay_form

    chosen: dict = {}
    for n in (16, 32, 64):
        chosen.setdefault(decay_form(c, n), []).append(n)
    return "\n".join(
        wrapped(f"C = {', '.join(map(str, sizes))}: {form.value}. {why[0].upper()}{why[1:]}.")
        for (form, why), sizes in chosen.items()
    )


# -- two recurrences side by side


def compare(recurrence: Recurrence, other: Recurrence) -> str:
    """What the first recurrence saves over the second: secondary matrices, products, FLOPs, bytes."""
    a, b = Derived(recurrence), Derived(other)
    rows = [("", recurrence.name, other.name)]
    rows += [("streams", *(len(d.canonical.streams) for d in (a, b)))]
    rows += [("secondary matrices", *(d.canonical.secondary_matrices for d in (a, b)))]
    made = list(dict.fromkeys([*b.products, *a.products]))
    rows += [(f"products: {name}", *(", ".join(d.products.get(name, ["-"])) for d in (a, b))) for name in made]
    numbers = [("a token a head, K=V=128", recurrence.name, other.name, "ratio")]
    for (label, mine), (_, theirs) in zip(cost_rows(a), cost_rows(b), strict=True):
        numbers += [(f"{label}, C={n}", number(mine, n), number(theirs, n), ratio(mine, theirs, n)) for n in CHUNKS]
    formulas = [("T tokens of a head", "", "")]
    for (label, mine), (_, theirs) in zip(cost_rows(a), cost_rows(b), strict=True):
        formulas += [(label, recurrence.name, T * mine), ("", other.name, T * theirs)]
    return "\n\n".join([saving_text(a, b), table(rows), table(formulas), table(numbers)]) + "\n"


def ratio(mine: sympy.Expr, theirs: sympy.Expr, chunk: int) -> str:
    at = {C: chunk, K: HEAD_DIM, V: HEAD_DIM}
    return f"{float(mine.subs(at) / theirs.subs(at)):.2f}" if theirs != 0 else "-"


def saving_text(a: Derived, b: Derived) -> str:
    """One sentence: the secondary matrices and the further products that the first does without."""
    matrices = [d.canonical.secondary_matrices for d in (a, b)]
    further = [p for name, ps in b.products.items() if name != "secondary" for p in ps[len(a.products.get(name, [])) :]]
    names = (a.recurrence.name, b.recurrence.name)
    text = f"{names[0]} has {matrices[0]} secondary matrices a chunk where {names[1]} has {matrices[1]}"
    if further:
        text += f", and does without {len(further)} of its other products: {', '.join(further)}"
    return wrapped(text + ".")
