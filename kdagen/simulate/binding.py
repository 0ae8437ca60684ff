"""Binds arrays to a PrimFunc's parameters: checks them, and solves for the dynamic dimensions."""

from __future__ import annotations

import numpy as np

from kdagen.build import adapter
from kdagen.errors import ArgumentError
from kdagen.simulate.expressions import Expressions
from kdagen.simulate.memory import Frame, Statistics, dtype_of


def bind(prim_func, arrays, name: str) -> tuple[dict, dict]:
    """(values of variables, arrays by data variable)."""
    params = list(prim_func.params)
    if len(arrays) != len(params):
        raise ArgumentError(f"kernel '{name}': {len(arrays)} arguments given, expected {len(params)}")
    env, buffers, dims = {}, {}, []
    for param, array in zip(params, arrays, strict=True):
        buffer = prim_func.buffer_map.get(param)
        if buffer is None:
            env[param] = array
            continue
        _check(buffer, array, name)
        buffers[buffer.data] = array
        for axis, (dim, size) in enumerate(zip(buffer.shape, array.shape, strict=True)):
            dims.append((f"{buffer.name}.shape[{axis}]", dim, size))
        steps = [step // array.itemsize for step in array.strides]
        env.update((s, n) for s, n in zip(buffer.strides, steps, strict=False) if type(s).__name__ == "Var")
    _solve(dims, env, name)
    return env, buffers


def frame(env: dict) -> Frame:
    """A frame in which expressions of variables alone can be evaluated."""
    return Frame(env, {}, {}, 0, Statistics())


def _check(buffer, array, name: str):
    dtype = dtype_of(buffer.dtype)
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != len(buffer.shape):
        given = f"{array.dtype} array of {array.ndim} dims" if isinstance(array, np.ndarray) else type(array).__name__
        expected = f"{dtype} array of {len(buffer.shape)} dims"
        raise ArgumentError(f"kernel '{name}': '{buffer.name}' is a {given}, expected a {expected}")


def _solve(dims, env: dict, name: str):
    """Plain variables first; then expressions with one unknown, which are affine in it (N + 1)."""
    for _, dim, size in dims:
        if type(dim).__name__ == "Var":
            env.setdefault(dim, size)
    for _, dim, size in dims:
        unknown = [v for v in _variables(dim) if v not in env]
        if len(unknown) == 1:
            at = [_value(dim, {**env, unknown[0]: x}, name) for x in (0, 1)]
            env[unknown[0]] = (size - at[0]) // max(at[1] - at[0], 1)
    for where, dim, size in dims:
        if (expected := _value(dim, env, name)) != size:
            symbolic = "" if str(dim) == str(expected) else f"{dim} = "
            raise ArgumentError(f"kernel '{name}': {where} is {size}, expected {symbolic}{expected}")


def _value(expression, env: dict, name: str) -> int:
    return int(Expressions(name).expression(expression)(frame(env)))


def _variables(expression) -> list:
    return list(dict.fromkeys(adapter.nodes(expression, lambda n: type(n).__name__ == "Var")))
