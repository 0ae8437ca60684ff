"""Decode: tokens one after another on a pool of states, one block a (sequence and V tile, head).

The state tile is read into registers before anything else, as vectors of 16 bytes in the order in which it is stored,
goes through the sequence's tokens in fp32, and is written back. What a token's arguments alone tell is worked out by
every warp for itself. Unlike the scan, which takes chunks, nothing here is a matrix product: memory is the limit.
"""

from __future__ import annotations

from kdagen.errors import ScheduleError
from kdagen.ir.step import Read, StepForm
from kdagen.ir.tensor import Load, RowSum, Value
from kdagen.ir.tensor import Map as TensorMap
from kdagen.ir.tensor import reads as read_by
from kdagen.ir.tile import Buffer, ColSum, Copy, Kernel, Map, Statement, reads, verify, writes
from kdagen.ir.tile import RowSum as TileRowSum
from kdagen.lower import check_head_dims, said
from kdagen.lower.block import Access, Block, element
from kdagen.lower.expression import tile_text
from kdagen.lower.layouts import LANES, Tile, along
from kdagen.lower.prepare import argument_buffers
from kdagen.lower.rows import CU_SEQLENS, KEY_HEAD, tile_of
from kdagen.schedule import DecodeSchedule
from kdagen.state import StateType

INDICES = Buffer("state_indices", ("N", "W"), "int32", "global", "state_indices")
ACCEPTED = Buffer("num_accepted_tokens", ("N",), "int32", "global", "num_accepted_tokens")
NULL_BELOW = Buffer("null_below", (), "int32", "global", "scalar")
LETS = (
    KEY_HEAD,
    ("start", "T.max(T.min(cu_seqlens[n], tokens), 0)"),
    ("end", "T.max(T.min(cu_seqlens[n + 1], tokens), start)"),
    ("first", "T.min(T.max(num_accepted_tokens[n], 1), W) - 1"),
    ("slot", "state_indices[n, first]"),
)


def lower_decode(
    form: StepForm, dims: dict[str, int], dtypes: dict[str, str], dtype: str, schedule: DecodeSchedule, state: StateType
) -> Kernel:
    """The decode kernel of a step form under a schedule; `dtypes` gives each argument's dtype, `dtype` the output's."""
    check_head_dims(dims)
    lowering = _Decode(form, dims, dtypes, schedule, state)
    body = lowering.token(form)
    name, tile = form.canonical.name, schedule.v_tile
    out = Buffer("o_out", ("T", "HV", dims["V"]), dtype, "global", "out")
    pools = tuple(
        Buffer(role, ("S", "HV", *(dims[d] for d in state.dims)), state.dtype, "global", role)
        for role in ("state_pool", "new_state_pool")
    )
    used = {name for s in body for name in reads(s) | writes(s)}
    arguments = [b for b in lowering.arguments.values() if b.name in used]
    sequences, place = tile_of(dims["V"] // tile, ("n", "N"))
    return verify(Kernel(
        name=f"{name}_decode",
        family="decode",
        skeleton=schedule.skeleton,
        grid=(sequences, ("h", "HV")),
        threads=schedule.threads,
        stages=1,
        buffers=(
            *arguments, CU_SEQLENS, *pools, INDICES, ACCEPTED, NULL_BELOW, out, *lowering.block.buffers.values()
        ),
        lets=(*place, *LETS),
        before=(Map((("j", tile),), ((lowering.output("j"), "0.0"),), eq="no state: the output is zero"),),
        loads=tuple(lowering.loads),
        body=tuple(body),
        stores=tuple(lowering.stores),
        chunk_size=1,
        doc=_describe(form, dims, dtype, schedule, state),
    ))  # fmt: skip


def _describe(form: StepForm, dims: dict[str, int], dtype: str, schedule: DecodeSchedule, state: StateType):
    """What a generated module says of itself."""
    return (
        *said(form.canonical),
        f"Token by token, K = {dims['K']}, V = {dims['V']}, output in {dtype}; a state of {state.dtype}, "
        f"[{', '.join(state.dims)}], in tiles of {schedule.v_tile} value channels.",
        "Buffers: _in arguments, _s shared memory, _f registers. Tokens of all sequences lie in a row. "
        "n, h, hk, t: sequence, head of values, of keys, token.",
    )


class _Decode:
    """How each value of a token is read, and the block under construction."""

    def __init__(self, form: StepForm, dims: dict[str, int], dtypes: dict[str, str], schedule, state: StateType):
        self.dims, self.schedule, self.state = dims, schedule, state
        self.canonical = form.canonical
        self.arguments = argument_buffers(form.canonical, dims, dtypes)
        self.block = Block()
        self.access: dict[Value, Access] = {}  # by index of the channel; of V, within the tile
        self.anywhere: dict[Value, Access] = {}  # values of V from arguments alone, at any of all V channels
        self.met: dict[Value, Access] = {}  # key vectors, where they meet the state
        self.in_tile = _in_tile(form)
        self.by_rows = state.layout == "KV"  # rows of the tile are key channels
        if dims["V"] % schedule.v_tile:
            raise ScheduleError(f"v_tile {schedule.v_tile} does not divide V = {dims['V']}: expected 16, 32 or 64")
        shape = {"K": dims["K"], "V": schedule.v_tile}
        self.shape = tuple(shape[d] for d in state.dims)
        self.tile = Tile(self.shape, state.dtype, schedule.threads)
        self.loops = tuple(zip("ij", self.shape))
        self.k, self.v = "ij" if self.by_rows else "ji"
        self.loads, self.stores = self.load_state(), self.store_state()
        self.terms = self.fragment("terms", self.shape, self.tile.whole)  # of a sum down the state's key channels

    # -- buffers

    def fragment(self, name: str, shape: tuple[int, ...], layout: str = "", dtype: str = "float32") -> str:
        while f"{name}_f" in self.block.buffers:
            name += "_"
        return self.block.declare(Buffer(f"{name}_f", shape, dtype, "fragment", layout=layout))

    def vector(self, name: str, axis: str, tiled: bool = True) -> tuple[str, int]:
        """A fragment for a value along an axis, and its extent; of V a tile's unless told otherwise."""
        if not axis:
            return self.fragment(name, (1,)), 1
        n = self.schedule.v_tile if axis == "V" and tiled else self.dims[axis]
        return self.fragment(name, (n,), self.layout(axis, n)), n

    def layout(self, axis: str, n: int) -> str:
        """Along the tile's columns as the tile lies; of key channels that are its rows, whole in every warp."""
        rows, columns = self.state.dims
        if axis == columns and n == self.shape[1]:
            return self.tile.of_columns
        if axis == rows and axis == "V" and n == self.shape[0]:
            return self.tile.of_rows
        return along(n, max(n // LANES, 1), LANES, self.schedule.threads // LANES)

    # -- the state

    def region(self, pool: str, slot: str) -> str:
        tile = self.schedule.v_tile
        k, v = f"0:{self.dims['K']}", f"tile * {tile}:tile * {tile} + {tile}"
        return f"{pool}[{slot}, h, {self.state.index(k, v)}]"

    def load_state(self) -> list[Statement]:
        self.S = self.fragment("S", self.shape, self.tile.whole)
        self.stored = self.S
        if self.state.dtype != "float32":
            self.stored = self.fragment("S_stored", self.shape, self.tile.whole, self.state.dtype)
        load = Copy(self.stored, self.region("state_pool", "slot"), eq="S")
        if self.stored == self.S:
            return [load]
        return [load, Map(self.loops, ((f"{self.S}[i, j]", f"T.cast({self.stored}[i, j], 'float32')"),))]

    def store_state(self) -> list[Statement]:
        store = Copy(self.region("new_state_pool", "into"), self.stored, eq="S'")
        if self.stored == self.S:
            return [store]
        return [Map(self.loops, ((f"{self.stored}[i, j]", f"{self.S}[i, j]"),)), store]

    # -- a token

    def token(self, form: StepForm) -> list[Statement]:
        """From arguments to output and new state."""
        for op in form.token:
            {Load: self.load, TensorMap: self.map, RowSum: self.sum}[type(op)](op)
        self.share(form)
        for read in form.reads:
            self.read(read)
        for op in form.values:
            self.map(op)
        out = self.access[form.out]("j")
        self.block.add(Map((("j", self.schedule.v_tile),), ((self.output("j"), out),), eq="o"))
        self.update(form)
        return self.block.statements

    def output(self, j: str) -> str:
        return f"o_out[t, h, tile * {self.schedule.v_tile} + {j}]"

    def load(self, op: Load) -> None:
        a, tile = op.argument, self.schedule.v_tile
        lead = ("t", "hk" if self.canonical.heads(a) == "H" else "h") if a.per_token else ("h",)

        def read(*j: str) -> str:
            return f"T.cast({a.name}_in[{', '.join((*lead, *j))}], 'float32')"

        if a.axis == "V":
            self.anywhere[op.out] = read
            self.keep(op.out, lambda j: read(f"tile * {tile} + {j}"), op.eq)
        else:
            self.keep(op.out, read, op.eq)

    def map(self, op: TensorMap) -> None:
        operands = [v for v, _ in op.operands]

        def text(access: dict[Value, Access], *j: str) -> str:
            return tile_text(op.expr, {v.symbol: access[v](*j[: len(v.dims)]) for v in operands})

        everywhere = {**{v: self.access[v] for v in operands if not v.dims}, **self.anywhere}
        if op.out.dims == ("V",) and all(v in everywhere for v in operands):
            self.anywhere[op.out] = lambda j: f"({text(everywhere, j)})"
        self.keep(op.out, lambda *j: text(self.access, *j), op.eq)

    def keep(self, value: Value, read: Access, eq: str) -> None:
        """A value that `read` gives, into registers, unless nothing in the tile needs it."""
        if value.dims == ("V",) and value not in self.in_tile:
            return
        (axis,), index = value.dims or ("",), "j" if value.dims else "i"
        name, n = self.vector(value.name, axis)
        self.block.add(Map(((index, n),), ((f"{name}[{index}]", read(*([index] if axis else []))),), eq=eq))
        self.access[value] = element(name) if axis else lambda: f"{name}[0]"

    def sum(self, op: RowSum) -> None:
        (axis,) = op.a.dims
        if axis == "V":  # all of V, of which the block has a tile
            terms, n = self.vector(op.a.name, axis, tiled=False)
            self.block.add(Map((("j", n),), ((f"{terms}[j]", self.anywhere[op.a]("j")),)))
        else:
            terms = self.access[op.a]("j").removesuffix("[j]")
        total = self.fragment(op.out.name, (1,))
        self.block.add(ColSum(total, terms, eq=op.eq))
        self.access[op.out] = lambda: f"{total}[0]"

    def share(self, form: StepForm) -> None:
        """Key vectors that meet the state: through shared memory where key channels are its rows.

        A thread has few rows, and of a vector other channels than these; of the columns it has its own.
        """
        decay = [form.decay] if form.decay and form.decay.dims else []
        met = dict.fromkeys([*(r.z for r in form.reads), *decay, *(w.x for w in form.writes)])
        self.met = {v: self.access[v] for v in met}
        if self.by_rows:
            names = {v: self.block.shared(v.name, self.dims["K"]) for v in met}
            copies = tuple((f"{name}[j]", self.access[v]("j")) for v, name in names.items())
            self.block.add(Map((("j", self.dims["K"]),), copies))
            self.met = {v: element(name) for v, name in names.items()}

    def read(self, read: Read) -> None:
        out, _ = self.vector(read.out.name, "V")
        product = f"{self.S}[i, j] * {self.met[read.z](self.k)}"
        batch = self.shape[1] // self.tile.lanes  # all that a thread gets
        total = ColSum(out, self.terms, read.eq, batch) if self.by_rows else TileRowSum(out, self.terms, read.eq)
        self.block.add(Map(self.loops, ((f"{self.terms}[i, j]", product),)), total)
        self.access[read.out] = element(out)

    def update(self, form: StepForm) -> None:
        kept, said = f"{self.S}[i, j]", "S"
        if form.decay:
            factor = self.met[form.decay](self.k) if form.decay.dims else self.access[form.decay]()
            kept, said = f"{factor} * {kept}", f"{form.decay.name} S"
        writes = [f"{self.met[w.x](self.k)} * {self.access[w.p](self.v)}" for w in form.writes]
        eq = " + ".join([f"S' = {said}", *(f"{w.x.name} {w.p.name}^T" for w in form.writes)])
        self.block.add(Map(self.loops, ((f"{self.S}[i, j]", " + ".join([kept, *writes])),), eq=eq))


def _in_tile(form: StepForm) -> set[Value]:
    """The token's values along V that are read in the tile: all but those that only feed sums."""
    wanted = {v for op in form.values for v in read_by(op)} | {w.p for w in form.writes} | {form.out}
    wanted |= {op.out for op in form.values}
    for op in reversed(form.token):
        if isinstance(op, TensorMap) and op.out in wanted:
            wanted |= {v for v in read_by(op) if v.dims == ("V",)}
    return wanted
