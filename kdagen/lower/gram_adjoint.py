"""Cotangents of the operands of secondary matrices, one method a decay form; and of the sums of a Decay.

As in gram.py no factor of a pair of tokens exceeds what its decay form allows, and entries of the matrices' cotangents
that the Gram leaves zero are selected away. A gate's cotangent at t is a sum over the pairs whose decay runs over t;
only a bounded gate takes it from differences, of sums whose common terms are equal to fp32's last bits.
"""

from __future__ import annotations

from collections.abc import Callable

from kdagen.ir.tensor import Span
from kdagen.ir.tile import Gemm, Map, RowSum
from kdagen.lower.block import Access, Block, element, shifted
from kdagen.lower.gram import ABOUT_THE_START, GramOperands, anchored, before, doubled, fill
from kdagen.schedule import DecayForm

TERMS = "bfloat16"  # dtype of the terms of a gate's cotangent, which no chunk scales: it needs the range of fp32
ROWS, COLS = "gram_rows_s", "gram_cols_s"

Table = tuple[tuple[Access | None, ...], ...]


def lower_gram_adjoint(
    block: Block,
    form: DecayForm,
    o: GramOperands,
    d_outs: Table,
    gate: Access | None,
    diagonal: tuple[tuple[bool, ...], ...],
    adds: Table = ((), (), ()),
) -> tuple[tuple[Access, ...], tuple[Access, ...], Access | None]:
    """Append what forms the cotangents of readers, of writers (fp32, [C, K] each) and of the gate; returns their reads.

    `lower_gram` has run for `o` and what it left is unchanged (and is so afterwards). `gate` gives a token's log2
    decay in a channel; only the tree reads it. The gate's cotangent is that of the natural logarithm. `adds` holds what
    else readers, writers and the gate are owed.
    """
    a = GramAdjoint(block, o, d_outs, diagonal, adds)
    a.tiles()
    {
        DecayForm.NONE: a.plain,
        DecayForm.SCALAR: a.scalar,
        DecayForm.FACTORED: a.factored,
        DecayForm.TREE: lambda: a.tree(gate),
    }[form]()
    readers, writers = (
        tuple(
            element(f"{name}_s") if lives else (add or _zero)
            for (name, lives), add in zip(side, added or (None,) * len(side))
        )
        for side, added in zip((a.reader_names, a.writer_names), adds)
    )
    return readers, writers, None if form == DecayForm.NONE else element("gate_cotangent_s")


def _zero(*index: str) -> str:
    return "0.0"


class GramAdjoint:
    """What all forms share. A product has a reader's (or writer's) C rows, so that the warps of any block share it."""

    def __init__(
        self, block: Block, o: GramOperands, d_outs: Table, diagonal: tuple[tuple[bool, ...], ...], adds: Table
    ):
        self.block, self.o, self.d_outs, self.diagonal = block, o, d_outs, diagonal
        self.adds = dict(zip(("reader", "writer", "gate"), adds))
        self.entries = (("i", o.chunk), ("j", o.chunk))
        self.tile = (("i", o.chunk), ("j", o.channels))
        self.pairs = [(r, s) for r, row in enumerate(d_outs) for s, d in enumerate(row) if d]
        self.readers, self.writers = (sorted(set(side)) for side in zip(*self.pairs))
        self.reader_names = [(f"reader{r}_cotangent", r in self.readers) for r in range(len(o.readers))]
        self.writer_names = [(f"writer{s}_cotangent", s in self.writers) for s in range(len(o.writers))]
        self.streams = [name for name, lives in (*self.reader_names, *self.writer_names) if lives]

    def tiles(self) -> None:
        """Declare the operands, the products' accumulator and where the cotangents will be."""
        o, block = self.o, self.block
        height, width = len(o.readers) * o.chunk, len(o.writers) * o.chunk
        block.shared("gram_rows", height, o.channels, dtype=o.dtype)
        block.shared("gram_cols", width, o.channels, dtype=o.dtype)
        for r in self.readers:
            block.shared(f"d_gram_reader{r}", o.chunk, width, dtype=o.dtype)
        for s in self.writers:
            block.shared(f"d_gram_writer{s}", height, o.chunk, dtype=o.dtype)
        block.fragment("gram_part", o.chunk, o.channels)
        for name in self.streams:
            block.shared(name, o.chunk, o.channels)

    def fill(self, row_factor: dict[bool, str], col_factor: str, eq: str) -> None:
        self.block.add(*fill(self.o, row_factor, col_factor, eq, (ROWS, COLS)))

    def select(self, keep: Callable[[int, int], str], factor: Callable[[int], str], eq: str) -> None:
        """The matrices' cotangents where `keep`, times a factor a reader: a reader's rows, and a writer's columns."""
        c, lets, assign = self.o.chunk, [], []
        for r, row in enumerate(self.d_outs):
            for s, d in enumerate(row):
                if d:
                    value = f"({d('i', 'j')}){factor(r)}"
                    lets.append((f"d_{r}_{s}", f"T.if_then_else({keep(r, s)}, {value}, 0.0)"))
                entry = f"d_{r}_{s}" if d else "0.0"
                if r in self.readers:
                    assign.append((f"d_gram_reader{r}_s[i, {shifted(s * c, 'j')}]", entry))
                if s in self.writers:
                    assign.append((f"d_gram_writer{s}_s[{shifted(r * c, 'i')}, j]", entry))
        self.block.add(Map(self.entries, tuple(assign), tuple(lets), eq=eq))

    def products(self, eq: str, use: Callable[[str, int], None]) -> None:
        """Each writer's and reader's product in turn, given to what `use(side, n)` appends."""
        c, k = self.o.chunk, self.o.channels
        for s in self.writers:
            inner = len(self.o.readers) * c
            self.block.add(
                Gemm("gram_part_f", f"d_gram_writer{s}_s", ROWS, (c, k, inner), trans_a=True, clear=True, eq=eq)
            )
            use("writer", s)
        for r in self.readers:
            inner = len(self.o.writers) * c
            self.block.add(Gemm("gram_part_f", f"d_gram_reader{r}_s", COLS, (c, k, inner), clear=True, eq=eq))
            use("reader", r)

    def kept(self) -> None:
        """The products of all pairs at once, on top of what else is owed."""
        self.products("d_z_i = sum_j d_ij x_j, d_x_j = sum_i d_ij z_i", lambda side, n: self.keep(side, n, ""))

    def keep(self, side: str, n: int, factor: str, own: str = "") -> None:
        value = f"gram_part_f[i, j]{f' * {factor}' if factor else ''}{self.plus(own, self.added(side, n))}"
        self.block.add(Map(self.tile, ((f"{side}{n}_cotangent_s[i, j]", value),)))

    def operand(self, side: str, n: int) -> str:
        """What a product's other side was multiplied by: a row of a reader's or a writer's scaled operand."""
        return f"T.cast({ROWS if side == 'reader' else COLS}[{shifted(n * self.o.chunk, 'i')}, j], 'float32')"

    def added(self, side: str, n: int, index: tuple[str, ...] = ("i", "j")) -> str:
        """What a reader (or writer, or the gate) is owed besides."""
        adds = self.adds[side]
        return adds[n](*index) if adds and adds[n] else ""

    @staticmethod
    def plus(*texts: str) -> str:
        return "".join(f" + {text}" for text in texts if text)

    def order(self, r: int, s: int) -> str:
        return "j <= i" if self.diagonal[r][s] else "j < i"

    # -- a token's own write is not decayed: no product

    def own(self, side: str, n: int) -> str:
        """What a reader's (or writer's) cotangent has from entries j = i."""
        terms = []
        for r, s in self.pairs:
            if self.diagonal[r][s] and (r if side == "reader" else s) == n:
                other = self.o.writers[s] if side == "reader" else self.o.readers[r]
                terms.append(f"({self.d_outs[r][s]('i', 'i')}) * ({other('i', 'j')})")
        return " + ".join(terms)

    # -- the forms

    def plain(self) -> None:
        self.fill({True: "", False: ""}, "", "operands of the Gram's adjoint")
        self.select(self.order, lambda r: "", "cotangents of the secondary matrices")
        self.kept()

    def scalar(self) -> None:
        """One rate a head: the matrices' cotangents are decayed as the matrices were."""

        def factor(r: int) -> str:
            exponent = "span_s[i, j]" if self.o.after[r] else "span_s[T.max(i - 1, 0), j]"
            return f" * T.if_then_else(i > j, T.exp2({exponent}), 1.0)"

        self.fill({True: "", False: ""}, "", "operands of the Gram's adjoint")
        self.select(self.order, factor, "cotangents of the secondary matrices, decayed")
        self.kept()
        self.scalar_gate()

    def scalar_gate(self) -> None:
        """d_g[t] = sum over i >= t > j of W_ij = d_ij G_ij; a reader before its own decay counts for row i - 1."""
        c, block = self.o.chunk, self.block
        terms, spans = block.shared("gram_terms", c, c), block.fragment("gram_spans", c, c)
        total = block.fragment("gate_cotangent", c)
        value = " + ".join(self.scalar_term(r, s) for r, s in self.pairs)
        block.add(
            Map(self.entries, ((f"{terms}[j, i]", value),), eq="W_ij = d_ij G_ij, transposed"),
            Map(
                (("i", c),),
                ((f"{terms}[j, i]", f"{terms}[j - 1, i] + {terms}[j, i]"),),
                serial=("j", 1, c),
                eq="W_i0 + .. + W_ij",
            ),
            Map(
                self.entries,
                ((f"{spans}[i, j]", f"T.if_then_else(T.And(i > 0, j >= i), {terms}[T.max(i - 1, 0), j], 0.0)"),),
                eq="of each row j >= t = i the pairs that begin before t",
            ),
            RowSum(total, spans, eq="d_g[t] = sum over the pairs whose decay runs over t"),
            Map(
                (("i", c),),
                ((f"{block.shared('gate_cotangent', c)}[i]", f"{total}[i]{self.plus(self.added('gate', 0, ('i',)))}"),),
            ),
        )

    def scalar_term(self, r: int, s: int) -> str:
        c, after = self.o.chunk, self.o.after[r]
        row = "i" if after else f"T.min(i + 1, {c - 1})"
        keep = "j < i" if after else f"T.And(j < i, i < {c - 1})"
        gram = f"gram_s[{shifted(r * c, row)}, {shifted(s * c, 'j')}]"
        return f"T.if_then_else({keep}, ({self.d_outs[r][s](row, 'j')}) * {gram}, 0.0)"

    def factored(self) -> None:
        """Rows and columns scaled about the chunk's start, as in the forward.

        d_g[t] = sum over rows i >= t of u_i - w_i, where u_i = z_i d_z_i and w_i = x_i d_x_i: of a pair on one side of
        t both are the same terms, of the same rounded operands, and cancel to fp32.
        """
        row, col = anchored(self.o)
        self.fill(row, col, ABOUT_THE_START)
        self.select(lambda r, s: "j < i", lambda r: "", "cotangents of the secondary matrices")
        terms = self.block.shared("gram_terms", self.o.chunk, self.o.channels)
        self.start_gate()

        def use(side: str, n: int) -> None:
            first = (side, n) == ("writer", self.writers[0])
            self.add_terms(terms, side, n, "-" if side == "writer" else "", first)
            self.keep(side, n, col if side == "writer" else row[self.o.after[n]], self.own(side, n))

        self.products("d_z_i = sum_j d_ij x_j, d_x_j = sum_i d_ij z_i", use)
        shape = (self.o.chunk, self.o.channels)
        lower_spread(self.block, "gate_cotangent", element(terms), Span.THROUGH, shape)

    def start_gate(self) -> None:
        tile = self.block.shared("gate_cotangent", self.o.chunk, self.o.channels)
        self.block.add(Map(self.tile, ((f"{tile}[i, j]", self.added("gate", 0) or "0.0"),), eq="what the state gave"))

    def add_terms(self, terms: str, side: str, n: int, sign: str, first: bool, where: str = "i > 0") -> None:
        """What a product gives the gate, by rows; that of a reader before its own decay belongs to the row above."""
        value = f"{sign}{self.operand(side, n)} * gram_part_f[i, j]"
        above = side == "reader" and not self.o.after[n]
        target = f"{terms}[{'i - 1' if above else 'i'}, j]"
        value = value if first else f"{target} + {value}"
        self.block.add(Map(self.tile, ((target, value),), where=where if above else ""))

    def tree(self, gate: Access) -> None:
        """Blocks of 1, 2, 4.. rows joined in pairs, as in the forward. `through` and `rest` hold decays, not their

        logarithms, while blocks grow: one exponential a token serves all levels.
        """
        c, block = self.o.chunk, self.block
        for side, n in (*(("reader", r) for r in self.readers), *(("writer", s) for s in self.writers)):
            terms = [t for t in (self.added(side, n), self.own(side, n)) if t]
            target, eq = f"{side}{n}_cotangent_s[i, j]", "what the state gave; a token's own write is not decayed"
            block.add(Map(self.tile, ((target, " + ".join(terms) or "0.0"),), eq=eq))
        self.start_gate()
        names, values = ("through_s", "rest_s"), (f"T.exp2({gate('i', 'j')})", "1.0")
        block.add(
            Map(
                self.tile,
                tuple((f"{name}[i, j]", value) for name, value in zip(names, values)),
                eq="decays within blocks of 1 token",
            )
        )
        half = 1
        while half < c:
            self.level(half)
            half *= 2
        block.add(Map(self.tile, tuple((f"{n}[i, j]", f"T.log2({n}[i, j])") for n in names), eq="sums of log decay"))

    def level(self, half: int) -> None:
        """Pairs of blocks: products of their cotangents, scaled as the operands are; what they give the gate."""
        pair, block = 2 * half, self.block
        factor = {True: "through_s[i, j]", False: before("i", "j", half, "1.0")}
        self.fill(factor, "rest_s[i, j]", f"pairs of {half}-token blocks, about the last row of the first")
        halves = f"T.And(i % {pair} >= {half}, j % {pair} < {half})"
        same = f"T.And(i // {pair} == j // {pair}, {halves})" if pair < self.o.chunk else halves
        self.select(lambda r, s: same, lambda r: "", "their part of the matrices' cotangents")
        self.spans(half)
        terms = block.shared("gram_terms", self.o.chunk, self.o.channels, dtype=TERMS)

        def use(side: str, n: int) -> None:
            scale = "rest_s[i, j]" if side == "writer" else factor[self.o.after[n]]
            target = f"{side}{n}_cotangent_s[i, j]"
            block.add(Map(self.tile, ((target, f"{target} + gram_part_f[i, j] * {scale}"),)))
            if half > 1 or side == "writer" or self.o.after[n]:  # a block's first row has no decay ahead of its own
                first = (side, n) == ("writer", self.writers[0])
                self.add_terms(terms, side, n, "", first, where=f"i % {half} > 0")

        self.products("d_z_i = sum_j d_ij x_j, d_x_j = sum_i d_ij z_i of these pairs", use)
        self.give_gate(terms)
        block.add(*doubled(self.o, half, "*", "1.0"))

    def spans(self, half: int) -> None:
        """Which rows' terms (j) a token (i) gets: in a second block those from it on, in a first those before it."""
        holds = f"T.if_then_else(i % {2 * half} >= {half}, j >= i, j < i)"
        name = self.block.shared("gram_span", self.o.chunk, self.o.chunk, dtype=TERMS)
        inside = f"T.if_then_else(T.And(i // {half} == j // {half}, {holds}), 1.0, 0.0)"
        self.block.add(Map(self.entries, ((f"{name}[i, j]", inside),), eq="1 where a row's decay runs over the token"))

    def give_gate(self, terms: str) -> None:
        c, k = self.o.chunk, self.o.channels
        gate, eq = "gate_cotangent_s[i, j]", "d_g[t] = sum over the pairs whose decay runs over t"
        self.block.add(
            Gemm("gram_part_f", "gram_span_s", terms, (c, k, c), clear=True, eq=eq),
            Map(self.tile, ((gate, f"{gate} + gram_part_f[i, j]"),)),
        )


def lower_spread(block: Block, name: str, a: Access, span: Span, shape: tuple[int, ...]) -> None:
    """Append to the fp32 tile name_s[t] the sum of a[i] over i >= t (THROUGH), i > t (BEFORE) or i < t (REST)."""
    (_spread_channels if len(shape) == 2 else _spread_rows)(block, f"{name}_s", a, span, *shape)


def _spread_channels(block: Block, out: str, a: Access, span: Span, c: int, channels: int) -> None:
    """A running sum a channel, from the last token to the first, or for REST from the first to the last."""
    total, t = block.shared("spread_total", channels), "i" if span == Span.REST else f"{c - 1} - i"
    add, give = (f"{total}[j]", f"{total}[j] + {a(t, 'j')}"), (f"{out}[{t}, j]", f"{out}[{t}, j] + {total}[j]")
    block.add(
        Map((("j", channels),), ((f"{total}[j]", "0.0"),)),
        Map(
            (("j", channels),),
            (add, give) if span == Span.THROUGH else (give, add),
            serial=("i", 0, c),
            eq=f"sums over the rows whose span '{span.value}' holds the token",
        ),
    )


def _spread_rows(block: Block, out: str, a: Access, span: Span, c: int) -> None:
    holds = {Span.THROUGH: "j >= i", Span.BEFORE: "j > i", Span.REST: "j < i"}[span]
    terms, total = block.fragment("spread_terms", c, c), block.fragment("spread_total", c)
    block.add(
        Map((("i", c), ("j", c)), ((f"{terms}[i, j]", f"T.if_then_else({holds}, {a('j')}, 0.0)"),)),
        RowSum(total, terms, eq=f"sums over the rows whose span '{span.value}' holds the token"),
        Map((("i", c),), ((f"{out}[i]", f"{out}[i] + {total}[i]"),)),
    )
