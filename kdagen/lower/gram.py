"""Secondary matrices of a chunk, one function a decay form (design: numbers that do not break).

Each leaves in shared memory `gram`[(r, i), (s, j)] = sum_k reader_r[i, k] writer_s[j, k] exp(decay from j to i),
to be read only where j precedes i (or equals it): elsewhere it may hold anything, infinities included.
Decays are in log2 and are sums over the tokens between, never differences of sums: a gate of -inf is an exact reset.
The running sums left behind (`through`, in place of a vector gate, and `rest`) serve the decayed operands afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.ir.tile import Copy, Gemm, Map
from kdagen.lower.block import Access, Block, element, shifted
from kdagen.schedule import DecayForm

ABOUT_THE_START = "bounded gate: rows and columns about the chunk's start"


@dataclass(frozen=True)
class GramOperands:
    """What a Gram product is formed from; accesses take (row, channel) index texts."""

    readers: tuple[Access, ...]
    writers: tuple[Access, ...]
    after: tuple[bool, ...]
    diagonal: bool  # whether some reader keeps j = i
    g: str  # shared buffer of log2 decays, [C, K] (called through_s) or [C]; "" without decay
    chunk: int
    channels: int
    dtype: str
    own_before: bool = False  # whether a reader before its own decay keeps j = i


def lower_gram(block: Block, form: DecayForm, o: GramOperands) -> None:
    """Append the statements that form the Gram matrices in the given decay form."""
    {
        DecayForm.NONE: _plain,
        DecayForm.SCALAR: _scalar,
        DecayForm.FACTORED: _factored,
        DecayForm.TREE: _tree,
    }[form](block, o)


def _tiles(block: Block, o: GramOperands) -> tuple[str, str, str]:
    """Shared operand tiles and the accumulator."""
    height, width = len(o.readers) * o.chunk, len(o.writers) * o.chunk
    rows = block.shared("rows", height, o.channels, dtype=o.dtype)
    cols = block.shared("cols", width, o.channels, dtype=o.dtype)
    return rows, cols, block.fragment("acc", height, width)


def fill(
    o: GramOperands,
    row_factor: dict[bool, str],
    col_factor: str,
    eq: str,
    tiles: tuple[str, str] = ("rows_s", "cols_s"),
) -> tuple[Map, ...]:
    """Scaled operands, one loop a factor (fewer registers); `row_factor` by whether the reader sees its own decay."""
    row, col = tiles
    rows = [
        (f"{row}[{shifted(r * o.chunk, 'i')}, j]", x("i", "j"), a) for r, (x, a) in enumerate(zip(o.readers, o.after))
    ]
    cols = [(f"{col}[{shifted(s * o.chunk, 'i')}, j]", x("i", "j")) for s, x in enumerate(o.writers)]
    groups = [(row_factor[after], [(to, x) for to, x, a in rows if a == after]) for after in (True, False)]
    return tuple(_scaled(o, factor, operands, eq) for factor, operands in (*groups, (col_factor, cols)) if operands)


def _scaled(o: GramOperands, factor: str, operands: list[tuple[str, str]], eq: str) -> Map:
    lets = (("e", factor),) if factor else ()
    assign = tuple((to, f"{x} * e" if factor else x) for to, x in operands)
    return Map((("i", o.chunk), ("j", o.channels)), assign, lets, eq=eq)


def _product(block: Block, o: GramOperands, acc: str, eq: str) -> Gemm:
    m, n = block.buffers[acc].shape
    return Gemm(acc, "rows_s", "cols_s", (m, n, o.channels), trans_b=True, clear=True, eq=eq)


def _keep(block: Block, o: GramOperands, acc: str) -> None:
    m, n = block.buffers[acc].shape
    block.add(Copy(block.shared("gram", m, n), acc))


def _plain(block: Block, o: GramOperands) -> None:
    _, _, acc = _tiles(block, o)
    block.add(*fill(o, {True: "", False: ""}, "", "operands of the Gram product"))
    block.add(_product(block, o, acc, "G_ij = sum_k z_ik x_jk"))
    _keep(block, o, acc)


def _running_sums(block: Block, o: GramOperands) -> None:
    """through_i = g_0 + .. + g_i, rest_j = g_{j+1} + .. + g_{C-1}, serially."""
    c = o.chunk
    block.shared("rest", c, o.channels)
    channels = (("j", o.channels),)
    block.add(
        Map(channels, ((f"rest_s[{c - 1}, j]", "0.0"),), eq="running sums of log decay"),
        Map(
            channels, ((f"rest_s[{c - 1} - i, j]", f"rest_s[{c} - i, j] + through_s[{c} - i, j]"),), serial=("i", 1, c)
        ),
        Map(channels, (("through_s[i, j]", "through_s[i - 1, j] + through_s[i, j]"),), serial=("i", 1, c)),
    )


def before(row: str, channel: str, size: int, none: str = "0.0") -> str:
    """Text of what `through` is for the row above, in blocks of `size` rows; `none` for a block's first row."""
    return f"T.if_then_else({row} % {size} == 0, {none}, through_s[T.max({row} - 1, 0), {channel}])"


def _scalar(block: Block, o: GramOperands) -> None:
    _plain(block, o)
    c, g = o.chunk, o.g
    span = block.shared("span", c, c)
    for name in ("through", "before", "rest"):
        block.shared(name, c)
    block.add(
        Map(
            (("j", c),),
            ((f"{span}[i, j]", f"T.if_then_else(i > j, {span}[T.max(i - 1, 0), j] + {g}[i], 0.0)"),),
            serial=("i", 0, c),
            eq="span_ij = sum of g over tokens j+1..i",
        ),
        Map(
            (("i", c),),
            (
                ("through_s[i]", f"{span}[i, 0] + {g}[0]"),
                ("before_s[i]", f"T.if_then_else(i > 0, {span}[T.max(i - 1, 0), 0] + {g}[0], 0.0)"),
                ("rest_s[i]", f"{span}[{c - 1}, i]"),
            ),
        ),
    )
    assign = []
    for r, after in enumerate(o.after):
        exponent = f"{span}[i, j]" if after else f"{span}[T.max(i - 1, 0), j]"
        factor = f"T.if_then_else(i > j, T.exp2({exponent}), 1.0)"
        entries = [f"gram_s[{shifted(r * c, 'i')}, {shifted(s * c, 'j')}]" for s in range(len(o.writers))]
        assign += [(entry, f"{entry} * {factor}") for entry in entries]
    block.add(Map((("i", c), ("j", c)), tuple(assign), eq="one rate a head: decays multiply the finished product"))


def _factored(block: Block, o: GramOperands) -> None:
    _, _, acc = _tiles(block, o)
    _running_sums(block, o)
    row, col = anchored(o)
    scaled = block.fragment("level", *block.buffers[acc].shape) if o.own_before else acc
    if o.own_before:  # by these factors such an entry would be e^(-g_i), where it is not decayed at all
        _diagonal(block, o, acc)
    block.add(
        *fill(o, row, col, ABOUT_THE_START),
        _product(block, o, scaled, "G_ij = sum_k (z_ik e^gc_i) (x_jk e^-gc_j)"),
    )
    if o.own_before:
        entries = tuple(zip("ij", block.buffers[acc].shape))
        own = f"T.if_then_else(i % {o.chunk} == j % {o.chunk}, {acc}[i, j], {scaled}[i, j])"
        block.add(Map(entries, ((f"{acc}[i, j]", own),)))
    _keep(block, o, acc)


def anchored(o: GramOperands) -> tuple[dict[bool, str], str]:
    """Texts of the factors of rows (by whether the reader sees its own decay) and of columns about the chunk's start.

    No row in the middle would do, though it allowed twice as many: rows before it would feel later gates' rounding.
    """
    row = {True: "T.exp2(through_s[i, j])", False: f"T.exp2({before('i', 'j', o.chunk)})"}
    return row, "T.exp2(-through_s[i, j])"


def _tree(block: Block, o: GramOperands) -> None:
    """Blocks of 1, 2, 4.. rows are joined in pairs; a pair's reference is the last row of its first block."""
    _, _, acc = _tiles(block, o)
    height, width = block.buffers[acc].shape
    level = block.fragment("level", height, width)
    tile = (("i", o.chunk), ("j", o.channels))
    rest = block.shared("rest", o.chunk, o.channels)
    block.add(Map(tile, ((f"{rest}[i, j]", "0.0"),), eq="sums within blocks of 1 token"))
    _diagonal(block, o, acc)
    half = 1
    while half < o.chunk:
        _join(block, o, acc, level, half)
        half *= 2
    _keep(block, o, acc)


def _diagonal(block: Block, o: GramOperands, acc: str) -> None:
    entries = (("i", block.buffers[acc].shape[0]), ("j", block.buffers[acc].shape[1]))
    if not o.diagonal:
        block.add(Map(entries, ((f"{acc}[i, j]", "0.0"),)))
        return
    block.add(
        *fill(o, {True: "", False: ""}, "", "a token's own write is not decayed"),
        _product(block, o, acc, "G_ii = sum_k z_ik x_ik"),
        Map(entries, ((f"{acc}[i, j]", f"T.if_then_else(i % {o.chunk} == j % {o.chunk}, {acc}[i, j], 0.0)"),)),
    )


def _join(block: Block, o: GramOperands, acc: str, level: str, half: int) -> None:
    c, pair = o.chunk, 2 * half
    entries = (("i", block.buffers[acc].shape[0]), ("j", block.buffers[acc].shape[1]))
    row = {True: "T.exp2(through_s[i, j])", False: f"T.exp2({before('i', 'j', half)})"}
    same = f"i % {c} // {pair} == j % {c} // {pair}" if pair < c else ""
    halves = f"i % {pair} >= {half} and j % {pair} < {half}"
    keep = " and ".join(t for t in (same, halves) if t)
    block.add(
        *fill(o, row, "T.exp2(rest_s[i, j])", f"pairs of {half}-token blocks, about the last row of the first"),
        _product(block, o, level, "G_ij = sum_k (z_ik e^(g_ref+1 + .. + g_i)) (x_jk e^(g_j+1 + .. + g_ref))"),
        Map(entries, ((f"{acc}[i, j]", f"{acc}[i, j] + T.if_then_else({_tile_and(keep)}, {level}[i, j], 0.0)"),)),
    )
    block.add(*doubled(o, half))


def doubled(o: GramOperands, half: int, join: str = "+", unit: str = "0.0") -> tuple[Map, ...]:
    """Sums within blocks of `half` tokens become those of blocks twice as long (or products, of decays themselves)."""
    pair = 2 * half
    tile = (("i", o.chunk), ("j", o.channels))
    second, start = f"i % {pair} >= {half}", f"(i // {pair}) * {pair}"
    first_sum, second_sum = f"through_s[{start} + {half - 1}, j]", f"through_s[{start} + {pair - 1}, j]"
    return (
        Map(
            tile,
            (("rest_s[i, j]", f"rest_s[i, j] {join} T.if_then_else({second}, {unit}, {second_sum})"),),
            eq=f"sums within blocks of {pair} tokens",
        ),
        Map(tile, (("through_s[i, j]", f"through_s[i, j] {join} {first_sum}"),), where=second),
    )


def _tile_and(condition: str) -> str:
    """Python's `and` as TileLang's."""
    parts = condition.split(" and ")
    return parts[0] if len(parts) == 1 else f"T.And({_tile_and(' and '.join(parts[:-1]))}, {parts[-1]})"


def decayed(span: str, scalar: bool, chunk: int) -> Access:
    """Text of exp(running sum) for a row (and channel), after `lower_gram` has left the sums."""
    if span == "before" and not scalar:
        return lambda row, channel: f"T.exp2({before(row, channel, chunk)})"
    read = element(f"{span}_s")
    return (lambda *index: f"T.exp2({read(index[0])})") if scalar else (lambda *index: f"T.exp2({read(*index)})")
