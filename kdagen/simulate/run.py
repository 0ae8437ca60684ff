"""Runs a whole op in simulation: its kernels in launch order on torch tensors, workspaces between them.

program.py and schedule.py run one kernel on arrays; here an OpSource says which tensors there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from kdagen import target as targets
from kdagen.build import adapter
from kdagen.codegen.source import KernelSource, OpSource, TensorSpec
from kdagen.errors import ArgumentError, SimulationError
from kdagen.simulate.memory import Statistics
from kdagen.simulate.program import Simulator
from kdagen.simulate.schedule import check_schedule
from kdagen.simulate.torch_arrays import to_numpy

if TYPE_CHECKING:
    import torch


def simulate(
    op_source: OpSource,
    tensors: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None = None,
    *,
    check_schedules: bool = False,
    check_races: bool = False,
    seeds=range(6),
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Statistics]]:
    """(output, final state [B, H, K, V], statistics of each kernel by name).

    Workspaces and results start as NaN. `check_schedules` also runs each kernel as its target specialises it, once
    a seed, and refuses one whose synchronisation fails; `check_races` refuses blocks that touch each other's results.
    """
    specs = {spec.name: spec for kernel in op_source.kernels for spec in kernel.params}
    memory = _given(op_source, specs, tensors, initial_state)
    sizes = _sizes(op_source, specs, memory)
    for name, spec in specs.items():
        if name not in memory:
            memory[name] = _new(spec, sizes)
    statistics = {}
    for kernel in op_source.kernels:
        arrays = [to_numpy(memory[spec.name]) for spec in kernel.params]
        checked = _check_schedule(kernel, op_source.target, arrays, seeds) if check_schedules else None
        simulator = _simulator(kernel, check_races)
        simulator(*arrays)
        statistics[kernel.name] = simulator.statistics
        statistics[kernel.name].schedule = checked
    (out,), (final,) = _of_role(specs, "out"), _of_role(specs, "final_state")
    return memory[out], memory[final], statistics


def traffic_per_token_head(statistics: dict[str, Statistics], tokens: int, heads: int) -> float:
    """Bytes that the kernels of an op move between memory and chip, a token a head; `tokens` is B T."""
    return sum(s.bytes_moved for s in statistics.values()) / (tokens * heads)


@lru_cache(maxsize=256)
def _prim_func(kernel: KernelSource):
    return adapter.trace(kernel.text, kernel.name, f"<{kernel.name}.py>")


@lru_cache(maxsize=256)
def _simulator(kernel: KernelSource, check_races: bool) -> Simulator:
    return Simulator(_prim_func(kernel), check_races=check_races)


def _check_schedule(kernel: KernelSource, target: str, arrays, seeds):
    report = check_schedule(_prim_func(kernel), targets.target(target), arrays, seeds)
    if not report.ok:
        raise SimulationError(str(report))
    return report


def _of_role(specs: dict[str, TensorSpec], role: str) -> list[str]:
    return [name for name, spec in specs.items() if spec.role == role]


def _given(op: OpSource, specs, tensors: dict, initial_state) -> dict:
    """The caller's tensors by name, checked for presence and dtype."""
    expected = _of_role(specs, "argument")
    if sorted(expected) != sorted(tensors):
        names = ", ".join(sorted(tensors)), ", ".join(sorted(expected))
        raise ArgumentError(f"{op.name}: got tensors {names[0]}; expected {names[1]}")
    given = dict(tensors)
    if initial_state is not None:
        if not (states := _of_role(specs, "initial_state")):
            raise ArgumentError(f"{op.name}: takes no initial_state")
        given[states[0]] = initial_state
    for name, tensor in given.items():
        dtype = _torch_dtype(specs[name])
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            what = f"'{name}' is {tensor.dtype} on {tensor.device}, expected {dtype} on cpu"
            raise ArgumentError(f"{op.name}: {what}: convert it with {name}.to('cpu', {dtype})")
    return {name: tensor.contiguous() for name, tensor in given.items()}


def _sizes(op: OpSource, specs, memory: dict) -> dict[str, int]:
    """Values of the symbols in shapes, from the given tensors, which must agree."""
    sizes = {}
    for name, tensor in memory.items():
        shape, written = list(tensor.shape), specs[name].shape
        if len(shape) == len(written):
            for symbol, n in zip(written, shape, strict=True):
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, n)
        expected = [n if isinstance(n, int) else sizes.get(n, n) for n in written]
        if shape != expected:
            raise ArgumentError(f"{op.name}: '{name}' has shape {shape}, expected {list(written)} = {expected}")
    return {**sizes, "NC": -(-sizes["T"] // op.chunk_size)}


def _new(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    """NaN where a kernel is to write; a state that was not given is zero."""
    import torch

    value = 0.0 if spec.role == "initial_state" else float("nan")
    shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
    return torch.full(shape, value, dtype=_torch_dtype(spec))


def _torch_dtype(spec: TensorSpec):
    import torch

    return getattr(torch, spec.dtype)
