"""Decode: tokens one after another on a pool of states, one block a (sequence and V tile, head).

The state tile is read into registers before anything else, as vectors of 16 bytes in the order in which it is stored,
goes through the sequence's tokens in fp32, and is written back. What a token's arguments alone tell is worked out by
every warp for itself. Unlike the scan, which takes chunks, nothing here is a matrix product: memory is the limit.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdagen.errors import ScheduleError
from kdagen.ir.step import Read, StepForm
from kdagen.ir.tensor import Load, RowSum, Value
from kdagen.ir.tensor import Map as TensorMap
from kdagen.ir.tensor import reads as read_by
from kdagen.ir.tile import BYTES, Buffer, ColSum, Copy, Kernel, Map, Statement, reads, verify, writes
from kdagen.ir.tile import RowSum as TileRowSum
from kdagen.lower import check_head_dims, said
from kdagen.lower.block import Access, Block, element
from kdagen.lower.expression import tile_text
from kdagen.lower.prepare import argument_buffers
from kdagen.lower.rows import CU_SEQLENS, KEY_HEAD, tile_of
from kdagen.schedule import DecodeSchedule
from kdagen.state import StateType

LANES = 32
INDICES = Buffer("state_indices", ("N", "W"), "int32", "global", "state_indices")
ACCEPTED = Buffer("num_accepted_tokens", ("N",), "int32", "global", "num_accepted_tokens")
NULL_BELOW = Buffer("null_below", (), "int32", "global", "scalar")
LETS = (
    KEY_HEAD,
    ("start", "T.max(T.min(cu_seqlens[n], tokens), 0)"),
    ("end", "T.max(T.min(cu_seqlens[n + 1], tokens), start)"),
    ("first", "T.max(T.min(num_accepted_tokens[n], W) - 1, 0)"),
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


class Tile:
    """How a tile of the state lies in threads: rows by columns, the columns being what is contiguous in memory.

    `lanes` threads stand beside one another on a row, with vectors of 16 bytes each; `rows` rows are held at a time.
    """

    def __init__(self, shape: tuple[int, int], dtype: str, threads: int):
        self.shape, self.vector = shape, 16 // BYTES[dtype]
        self.lanes = min(shape[1] // self.vector, LANES)
        self.rows = threads // max(self.lanes, 1)
        if not self.lanes or shape[0] % self.rows or self.rows * self.lanes != threads:
            raise ScheduleError(
                f"{threads} threads cannot share a tile of the state of {shape[0]} x {shape[1]} as {dtype} in vectors "
                f"of 16 bytes: choose another v_tile or threads, such as 32 and 128"
            )

    @property
    def whole(self) -> str:
        """Which thread holds element (i, j) of the tile, and where."""
        lane, at = self._column("j")
        index = f"i // {self.rows} * {self.shape[1] // self.lanes} + {at}"
        return _fragment(self.shape, "i, j", f"i % {self.rows} * {self.lanes} + {lane}", index)

    @property
    def of_columns(self) -> str:
        """The same of a vector along a row: each thread holds the columns that it has of the tile."""
        return along(self.shape[1], self.vector, self.lanes, self.rows)

    @property
    def of_rows(self) -> str:
        """The same of a vector down the columns."""
        thread = f"i % {self.rows} * {self.lanes} + rep"
        return _fragment(self.shape[:1], "i", thread, f"i // {self.rows}", self.lanes)

    def _column(self, j: str) -> tuple[str, str]:
        return _column(j, self.vector, self.lanes)


def along(extent: int, vector: int, lanes: int, copies: int) -> str:
    """The layout of a vector: vectors of some elements on so many lanes beside one another, and copies of it all."""
    lane, at = _column("j", vector, lanes)
    return _fragment((extent,), "j", f"rep * {lanes} + {lane}", at, copies)


def _column(j: str, vector: int, lanes: int) -> tuple[str, str]:
    """The lane that holds column j, and where."""
    return f"{j} // {vector} % {lanes}", f"{j} // {vector * lanes} * {vector} + {j} % {vector}"


def _fragment(shape: tuple[int, ...], names: str, thread: str, index: str, copies: int = 0) -> str:
    """A layout in TileLang's terms; with copies, `thread` holds the one numbered `rep`."""
    copied = (", rep", f", replicate={copies}") if copies else ("", "")
    holder = f"lambda {names}{copied[0]}: {thread}{copied[1]}"
    return f"T.Fragment({shape}, None, {holder}, forward_index_fn=lambda {names}: {index})"


class _Decode:
    """How each value of a token is read, and the block under construction."""

    def __init__(self, form: StepForm, dims: dict[str, int], dtypes: dict[str, str], schedule, state: StateType):
        self.dims, self.schedule, self.state = dims, schedule, state
        self.canonical = form.canonical
        self.arguments = argument_buffers(form.canonical, dims, dtypes)
        self.block = Block()
        self.access: dict[Value, Access] = {}  # by index of the channel; of V, within the tile
        self.anywhere: dict[Value, Access] = {}  # values of V from arguments alone, at any of all V channels
        self.in_tile = _closure(form)
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
        a, (axis,) = op.argument, op.out.dims or ("",)
        lead = ("t", "hk" if self.canonical.heads(a) == "H" else "h") if a.per_token else ("h",)
        self.define(op.out, axis, lambda *j: f"T.cast({a.name}_in[{', '.join((*lead, *j))}], 'float32')", op.eq)

    def map(self, op: TensorMap) -> None:
        (axis,) = op.out.dims or ("",)
        where = {v: self.anywhere.get(v, self.access.get(v)) for v, _ in op.operands} if axis == "V" else self.access

        def text(access: dict[Value, Access], *j: str) -> str:
            return tile_text(op.expr, {v.symbol: access[v](*j[: len(v.dims)]) for v, _ in op.operands})

        if axis == "V" and all(where.values()):
            self.anywhere[op.out] = lambda j: f"({text(where, j)})"
        if axis != "V" or op.out in self.in_tile:
            self.fill(op.out, axis, lambda *j: text(self.access, *j), op.eq)

    def define(self, value: Value, axis: str, read: Access, eq: str) -> None:
        """A value that `read` gives at any channel: into registers, of V only what the tile needs."""
        if axis == "V":
            self.anywhere[value] = read
        if axis != "V":
            self.fill(value, axis, read, eq)
        elif value in self.in_tile:
            self.fill(value, axis, lambda j: read(f"tile * {self.schedule.v_tile} + {j}"), eq)

    def fill(self, value: Value, axis: str, read: Access, eq: str) -> None:
        name, n = self.vector(value.name, axis)
        index = "j" if axis else "i"
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
        """Key vectors that meet the state's rows go to shared memory: each thread has other rows than channels."""
        decay = [form.decay] if form.decay and form.decay.dims else []
        self.met = dict.fromkeys([*(r.z for r in form.reads), *decay, *(w.x for w in form.writes)])
        if self.by_rows:
            names = {v: self.block.shared(v.name, self.dims["K"]) for v in self.met}
            copies = tuple((f"{name}[j]", self.access[v]("j")) for v, name in names.items())
            self.block.add(Map((("j", self.dims["K"]),), copies))
            self.met = {v: element(name) for v, name in names.items()}
        else:
            self.met = {v: self.access[v] for v in self.met}

    def read(self, read: Read) -> None:
        out, _ = self.vector(read.out.name, "V")
        product = f"{self.S}[i, j] * {self.met[read.z](self.k)}"
        batch = self.shape[1] // self.tile.lanes  # all that a thread gets
        total = ColSum(out, self.terms, read.eq, batch) if self.by_rows else TileRowSum(out, self.terms, read.eq)
        self.block.add(Map(self.loops, ((f"{self.terms}[i, j]", product),)), total)
        self.access[read.out] = element(out)

    def update(self, form: StepForm) -> None:
        kept = f"{self.S}[i, j]"
        if form.decay:
            factor = self.met[form.decay](self.k) if form.decay.dims else self.access[form.decay]()
            kept = f"{factor} * {kept}"
        writes = [f"{self.met[w.x](self.k)} * {self.access[w.p](self.v)}" for w in form.writes]
        eq = f"S' = {f'{form.decay.name} S' if form.decay else 'S'} + " + " + ".join(
            f"{w.x.name} {w.p.name}^T" for w in form.writes
        )
        self.block.add(Map(self.loops, ((f"{self.S}[i, j]", " + ".join([kept, *writes])),), eq=eq))


def _closure(form: StepForm) -> set[Value]:
    """The token's values along V that are read in the tile: all but those that only feed sums."""
    wanted = {v for op in form.values for v in read_by(op)} | {w.p for w in form.writes} | {form.out}
    wanted |= {op.out for op in form.values}
    for op in reversed(form.token):
        if isinstance(op, TensorMap) and op.out in wanted:
            wanted |= {v for v in read_by(op) if v.dims == ("V",)}
    return wanted
