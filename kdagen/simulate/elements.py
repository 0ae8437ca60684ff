"""Loads and stores of single elements, `buffer[i, j]`: one for each lane of the T.Parallel loops around.

Where each index is a lane's number plus an offset, the lanes form a box, which numpy slices without a copy;
any other index is gathered. memory.py holds the buffers and says what out of bounds means.
"""

from __future__ import annotations

import math

import numpy as np

from kdagen.build import adapter
from kdagen.simulate.memory import Frame, Handle, note_read, note_write, rounded


def is_lanes(value) -> bool:
    """Whether a value differs from lane to lane."""
    return isinstance(value, np.ndarray) and value.ndim > 0


class Element:
    """`buffer[indices]` in a program; `load` and `store` run it."""

    def __init__(self, compiler, buffer, indices):
        self.handle = Handle(buffer)
        self.indices = compiler.expressions(indices)
        split = [split_index(i, compiler.lane_axes) for i in indices]
        axes = [s[0] for s in split if s and s[0] is not None]
        self.is_box = bool(axes) and None not in split and len(set(axes)) == len(axes)
        if self.is_box:
            self.axes = [axis for axis, _ in split]
            self.offsets = compiler.expressions([offset for _, offset in split])
            self.order = np.argsort(axes)

    def load(self, f: Frame):
        array = self.handle.array(f)
        where = self._box(f, array)
        if where is None:
            return gather(f, self.handle, [i(f) for i in self.indices])
        shape = tuple(n if axis in self.axes else 1 for axis, n in enumerate(f.lanes))
        if self.handle.is_global:
            note_read(f, self.handle, where, reached(f, shape, True) * array.itemsize)
        return array[where].transpose(self.order).reshape(shape)

    def store(self, f: Frame, value):
        array = self.handle.array(f)
        where = self._box(f, array) if self.is_box and len(self.order) == len(f.lanes) else None
        if where is None:
            return scatter(f, self.handle, [i(f) for i in self.indices], value)
        np.copyto(array[where].transpose(self.order), rounded(value, array.dtype), where=_mask(f))
        if self.handle.is_global:
            note_write(f, self.handle, array, where, reached(f, f.lanes, True) * array.itemsize)

    def _box(self, f: Frame, array: np.ndarray) -> tuple | None:
        """The lanes as ints and slices of the array, if they are a box and within bounds."""
        if not self.is_box or self.handle.is_private:
            return None
        if f.ledger is not None and f.mask is not None and self.handle.is_global:
            return None  # only some of the box is touched, and the ledger asks which
        where = []
        for axis, offset, size in zip(self.axes, self.offsets, array.shape, strict=True):
            start = offset(f)
            if is_lanes(start):
                return None
            start = int(start)
            stop = start + 1
            if axis is not None:
                start += f.origin[axis]
                stop = start + f.lanes[axis]
            if start < 0 or stop > size:
                return None
            where.append(start if axis is None else slice(start, stop))
        return tuple(where)


def split_index(index, lane_axes: dict):
    """(axis, offset) of an index that is one lane number plus an offset; axis None: no lane number; else None."""
    kind = type(index).__name__
    if kind == "Var" and index in lane_axes:
        return lane_axes[index], 0
    if kind in ("Add", "Sub"):
        a, b = split_index(index.a, lane_axes), split_index(index.b, lane_axes)
        if a and b and b[0] is None:
            return a[0], a[1] + b[1] if kind == "Add" else a[1] - b[1]
        if a and b and a[0] is None and kind == "Add":
            return b[0], a[1] + b[1]
        return None
    varies = adapter.nodes(index, lambda n: type(n).__name__ == "Var" and n in lane_axes)
    return None if varies else (None, index)


def gather(f: Frame, h: Handle, index: list):
    """Elements at `index`: ints, or arrays over the lanes."""
    array = h.array(f)
    if h.is_private and array.ndim > h.ndim:  # one copy a lane: see _scatter_private
        return array[(*_lane_grid(f), *index)]
    inside = _inside(index, array.shape)
    shape = np.broadcast_shapes(*map(np.shape, index))
    if inside is True:
        where = tuple(index)
        values = array[where]
    else:
        where = tuple(np.where(inside, i, 0) for i in index)
        values = np.where(inside, array[where], np.zeros((), array.dtype))
        f.statistics.reads_out_of_bounds += reached(f, shape, True) - reached(f, shape, inside)
    if h.is_global:
        note_read(f, h, where, reached(f, shape, inside) * array.itemsize)
    return values


def scatter(f: Frame, h: Handle, index: list, value):
    """Stores `value` at `index` in every active lane."""
    array = h.array(f)
    value = rounded(value, array.dtype)
    if h.is_private and f.lanes:
        return _scatter_private(f, h, array, index, value)
    where = tuple(np.broadcast_to(i, f.lanes) for i in index) if f.lanes else tuple(index)
    inside = _inside(index, array.shape)
    if inside is not True or f.mask is not None:
        active = np.broadcast_to(_mask(f), f.lanes)
        stored = active & inside
        f.statistics.writes_out_of_bounds += int(active.sum() - stored.sum())
        where, value = tuple(np.asarray(i)[stored] for i in where), np.broadcast_to(value, f.lanes)[stored]
    array[where] = value
    if h.is_global:
        note_write(f, h, array, where, math.prod(np.shape(where[0])) * array.itemsize)


def _scatter_private(f: Frame, h: Handle, array: np.ndarray, index: list, value):
    """A thread's own variable inside T.Parallel: one copy a lane from its first store on."""
    if array.ndim == h.ndim:
        array = f.buffers[h.data] = np.broadcast_to(array, (*f.lanes, *array.shape)).copy()
        f.own.append(h)
    where = (*_lane_grid(f), *index)
    array[where] = np.where(_mask(f), value, array[where])


def _mask(f: Frame):
    return True if f.mask is None else f.mask


def _lane_grid(f: Frame):
    return np.ix_(*map(range, f.lanes))


def _inside(index, shape):
    """True where every lane is in bounds, else an array of booleans."""
    if all(np.min(i, initial=0) >= 0 and np.max(i, initial=0) < n for i, n in zip(index, shape, strict=True)):
        return True
    inside = np.asarray(True)
    for i, n in zip(index, shape, strict=True):
        inside = inside & (np.asarray(i) >= 0) & (np.asarray(i) < n)
    return inside


def reached(f: Frame, shape: tuple, inside) -> int:
    """Elements that lanes of this shape touch, in bounds and active; an axis of 1 is one element for all its lanes."""
    if f.mask is not None and shape:
        alike = tuple(axis for axis, n in enumerate(shape) if n == 1 and f.lanes[axis] > 1)
        inside = inside & np.broadcast_to(f.mask, f.lanes).any(axis=alike, keepdims=True)
    return math.prod(shape) if inside is True else int(np.broadcast_to(inside, shape).sum())
