"""TileLang's tile operations as closures of a Frame: copies, matrix products, fills, reductions, scans, atomics.

Each builder takes the compiler and the call and returns what runs. Products are exact, summed in float32; float32
operands lose their low bits first (tf32), as the tensor cores read them.
"""

from __future__ import annotations

import math

import numpy as np

from kdagen.errors import SimulationError
from kdagen.simulate.memory import Handle, read_box, rounded, tf32, widened, write_box


class Region:
    """A box of a buffer: T.region(buffer[start], access, *extents)."""

    def __init__(self, compiler, call):
        load, extents = call.args[0], list(call.args[2:])
        self.handle = Handle(load.buffer)
        self.start = compiler.indices(load.indices)
        self.extent = compiler.indices([1] * (len(load.indices) - len(extents)) + extents)

    def box(self, f) -> tuple[list[int], list[int]]:
        return self.start(f), self.extent(f)

    def read(self, f) -> np.ndarray:
        return read_box(f, self.handle, *self.box(f))

    def write(self, f, values: np.ndarray):
        """`values` may have other dims of size 1 than the region."""
        start, extent = self.box(f)
        if values.size != math.prod(extent):
            raise SimulationError(
                f"values of shape {list(values.shape)} stored in '{self.handle.name}', box {extent}: expected one shape"
            )
        write_box(f, self.handle, start, extent, rounded(values, self.handle.dtype).reshape(extent))


def matrix(values: np.ndarray, transpose: bool, truncate: bool) -> np.ndarray:
    """The last two dims as an operand of a product."""
    values = values.reshape(values.shape[-2:])
    if values.dtype == np.float32 and truncate:
        values = tf32(values)
    values = widened(values)
    return values.T if transpose else values


class Gemm:
    """out (+)= a @ b; call arguments: a, b, out, transpose_a, transpose_b, m, n, k, policy, clear, ..."""

    def __init__(self, compiler, call):
        self.a, self.b, self.out = (Region(compiler, c) for c in call.args[:3])
        self.transpose_a, self.transpose_b = (bool(t) for t in call.args[3:5])
        self.clear = compiler.expression(call.args[9])
        self.truncate = compiler.tf32

    def product(self, f, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = matrix(a, self.transpose_a, self.truncate), matrix(b, self.transpose_b, self.truncate)
        f.statistics.gemms += 1
        f.statistics.gemm_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    def __call__(self, f):
        product = self.product(f, self.a.read(f), self.b.read(f))
        if not self.clear(f):
            before = self.out.read(f)
            product = widened(before).reshape(product.shape) + product
        self.out.write(f, product)


def copy(compiler, call):
    source, target = (Region(compiler, c) for c in call.args[:2])

    def run(f):
        values = source.read(f)
        _same_box(source, target, values.shape, target.extent(f))
        target.write(f, values)

    return run


def _same_box(source: Region, target: Region, a, b):
    if [n for n in a if n != 1] != [n for n in b if n != 1]:
        boxes = f"'{source.handle.name}', box {list(a)}, to '{target.handle.name}', box {list(b)}"
        raise SimulationError(f"copy of {boxes}: expected one shape")


def transpose(compiler, call):
    source, target = (Region(compiler, c) for c in call.args[:2])
    return lambda f: target.write(f, source.read(f).T)


def fill(compiler, call):
    target, value = Region(compiler, call.args[0]), compiler.expression(call.args[1])
    if target.handle.is_private and compiler.lane_axes:
        raise compiler.unsupported("T.fill of a thread's own array inside T.Parallel", call)
    return lambda f: target.write(f, np.full(target.extent(f), value(f)))


REDUCTIONS = {
    "sum": (np.sum, np.add),
    "abssum": (lambda v, axis: np.sum(np.abs(v), axis), np.add),
    "max": (np.max, np.maximum),
    "absmax": (lambda v, axis: np.max(np.abs(v), axis), np.maximum),
    "min": (np.min, np.minimum),
}


def reduce(compiler, call):
    source, target = (Region(compiler, c) for c in call.args[:2])
    kind, axis, clear = str(call.args[2].value), int(call.args[3]), bool(call.args[4])
    if kind not in REDUCTIONS:
        raise compiler.unsupported(f"reduction {kind}", call)
    function, combine = REDUCTIONS[kind]

    def run(f):
        result = function(widened(source.read(f)), axis)
        if not clear:
            result = combine(widened(target.read(f)).reshape(result.shape), result)
        target.write(f, result)

    return run


def cumsum(compiler, call):
    source, target = (Region(compiler, c) for c in call.args[:2])
    axis, backwards = int(call.args[2]), bool(call.args[3])

    def run(f):
        values = widened(source.read(f))
        turned = np.flip(values, axis) if backwards else values
        sums = np.cumsum(turned, axis, dtype=values.dtype)
        target.write(f, np.flip(sums, axis) if backwards else sums)

    return run


def atomic_add(compiler, call):
    """T.atomic_add of one element, in any number of lanes; lanes may meet in one element."""
    load, value = call.args[0].args[0], compiler.expression(call.args[1])
    handle, parts = Handle(load.buffer), compiler.expressions(load.indices)

    def run(f):
        array = handle.array(f)
        where = tuple(np.broadcast_to(part(f), f.lanes) for part in parts)
        added = np.broadcast_to(rounded(value(f), array.dtype), f.lanes)
        keep = np.broadcast_to(True if f.mask is None else f.mask, f.lanes)
        for i, n in zip(where, array.shape, strict=True):
            keep = keep & (i >= 0) & (i < n)
        np.add.at(array, tuple(i[keep] for i in where), added[keep])
        if handle.is_global:
            moved = int(keep.sum()) * array.itemsize
            f.traffic(handle.name).read += moved
            f.traffic(handle.name).written += moved

    return run


def nothing(compiler, call):
    """What orders or hints but computes nothing, in a program run in program order."""
    return lambda f: None


OPERATIONS = {
    "copy": copy,
    "async_copy": copy,
    "tma_copy": copy,
    "transpose": transpose,
    "fill": fill,
    "gemm": Gemm,
    "wgmma_gemm": Gemm,
    "reduce": reduce,
    "cumsum": cumsum,
    "atomic_add_elem_op": atomic_add,
    **dict.fromkeys(
        (
            "wait_wgmma",
            "warpgroup_wait",
            "warpgroup_arrive",
            "warpgroup_commit_batch",
            "warpgroup_fence_operand",
            "fence_proxy_async",
            "ptx_commit_group",
            "ptx_wait_group",
            "tma_store_arrive",
            "tma_store_wait",
            "tvm_storage_sync",
            "sync_warp",
            "assume",
            "set_max_nreg",
            "no_set_max_nreg",
            "annotate_producer_reg_dealloc",
            "ws_op_id",
        ),
        nothing,
    ),
}
