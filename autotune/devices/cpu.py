"""This machine's CPU as a device: an op's calls by the CPU backend, each under its candidate's schedule.

Nothing is compiled. What is timed is the whole call of the op, checks included, as a user makes it; in training forward
and backward together, in decoding a step that replaces the states of a pool. Other work on the machine shares the cores
and is not kept away: the coordinator calls contenders in turn, so that it meets them alike.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path

from kdagen.autotune.cases import Case, Inputs, Normal
from kdagen.autotune.check import check
from kdagen.autotune.devices import Compiled, Contender, Sampler
from kdagen.autotune.sweep import CPU, Candidate, Policy, Task, Workload, source_hash

from kdagen.errors import ArgumentError
from kdagen.runtime.cpu_schedule import pinned
from kdagen.runtime.tuned import this_cpu

# Whose text decides what is computed, and how.
SOURCES = (
    "derive",
    "ir",
    "language",
    "zoo",
    "recurrence.py",
    "runtime/c*.py",
    "runtime/training.py",
    "runtime/decode.py",
)
SYSTEM = Path("/sys/devices/system/cpu/cpu0")
CACHE_BYTES = 64 << 20  # where the last cache's size cannot be read
EVICTED = 2  # times that size are written to clear it
STEPS = 4  # of a decode sampler's inputs, in turn
WARM = 2  # calls before the first that counts


class Device:
    """The CPU backend on the cores that this process may use."""

    def __init__(self, rest: str = ""):
        if rest:
            raise ArgumentError(
                f"device 'cpu:{rest}': expected cpu; which cores it has is the affinity's to say (taskset)"
            )
        self._drawn: tuple = (None, None)  # a task and workload, and the inputs of it

    def facts(self) -> dict:
        """What figures depend on."""
        name, cores = this_cpu()
        return {
            "device": name, "processors": cores, "versions": versions(), "target": CPU, "compiled": False,
            "kernels": kernels(),
        }  # fmt: skip

    def state(self) -> dict:
        """More load than there are cores is a reason for being slow: some of it is other work, and shares them."""
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo"), re.M)
        found = {"clocks": {"cpu": round(max(map(float, clocks)))}} if clocks else {}
        if hasattr(os, "getloadavg"):
            load, cores = os.getloadavg()[0], os.cpu_count() or 1
            others = [f"a load of {load:.0f} on {cores} cores"] if load > cores + 1 else []
            found |= {"load": round(load, 2), "throttling": others}
        return found

    def check(self, candidate: Candidate, compiled: Compiled | None = None) -> dict:
        """By kdagen.autotune.check, on what it is given."""
        call = CALLS[candidate.task.purpose]
        with pinned(candidate.schedule):
            return check(candidate.task, lambda case: call(op_of(candidate.task), case))

    def samplers(self, contenders: list[Contender], workload: Workload, policy: Policy) -> dict[str, Sampler]:
        """Calls of ops on one set of inputs, or on a few in turn."""
        if policy.mode != "eager":
            raise ArgumentError(f"timing policy '{policy}': expected 'eager cold' or 'eager warm' on the CPU")
        evict = evictor() if policy.cache == "cold" else None
        return {candidate.id: self._sampler(candidate, workload, evict) for candidate, _ in contenders}

    def _sampler(self, candidate: Candidate, workload: Workload, evict) -> Sampler:
        task = candidate.task
        op, call, cases = op_of(task), CALLS[task.purpose], cycle(self._inputs(task, workload))

        def sample() -> float:
            case = next(cases)
            if evict:
                evict()
            with pinned(candidate.schedule):
                start = time.perf_counter()
                call(op, case)
                return 1e3 * (time.perf_counter() - start)

        for _ in range(WARM):
            sample()
        return sample

    def _inputs(self, task: Task, workload: Workload) -> list[Case]:
        """Those of the last task and workload are kept, for the next contender."""
        if self._drawn[0] != (task, workload):
            self._drawn = (None, None)  # before new ones take memory
            self._drawn = (task, workload), inputs(task, workload)
        return self._drawn[1]


# -- what is called


@functools.cache
def op_of(task: Task):
    """The op that a user has."""
    import kdagen

    return kdagen.compile(task.op, state_layout=task.state.layout, state_dtype=task.state.dtype)


def infer(op, case: Case) -> dict:
    """Output and final state."""
    import torch

    with torch.no_grad():
        out, state = op(
            **case.arguments, initial_state=case.initial_state, cu_seqlens=case.cu_seqlens, output_final_state=True
        )
    return {"out": out, "final_state": state}


def train(op, case: Case) -> dict:
    """The same, and gradients of all that was given."""
    import torch

    leaves = {**case.arguments, **({} if case.initial_state is None else {"initial_state": case.initial_state})}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    with torch.enable_grad():
        out, state = op(**leaves, cu_seqlens=case.cu_seqlens, output_final_state=True)
    results, cotangents = zip(*((x, d) for x, d in ((out, case.d_out), (state, case.d_final_state)) if d is not None))
    gradients = torch.autograd.grad(results, list(leaves.values()), cotangents, materialize_grads=True)
    return {"out": out, "final_state": state, **{f"d_{n}": x for n, x in zip(leaves, gradients)}}


def decode(op, case: Case) -> dict:
    """Output; the states in the pool are replaced."""
    out = op.decode(
        **case.arguments, state_pool=case.state_pool, state_indices=case.state_indices,
        num_accepted_tokens=case.num_accepted_tokens, cu_seqlens=case.cu_seqlens, null_below=case.null_below,
    )  # fmt: skip
    return {"out": out}


CALLS: dict[str, Callable] = {"inference": infer, "training": train, "decode": decode}


def inputs(task: Task, workload: Workload) -> list[Case]:
    """What is called in turn: of decoding several steps on one pool, so that its states stay as in use."""
    import torch

    from kdagen.derive.canonical import canonical
    from kdagen.recurrence import load

    form, decoding, training = canonical(load(task.op)), task.purpose == "decode", task.purpose == "training"
    drawn = Inputs(task, form, form.dtypes(task.dtype, task.gate_dtype or task.dtype))
    shape = workload.batch, workload.tokens, workload.heads, workload.value_heads
    states = (workload.sequences, workload.value_heads, *(task.dims[d] for d in task.state.dims))
    normal, out = Normal(0), (*shape[:2], workload.value_heads, task.dims["V"])
    case = Case(
        str(workload),
        {},
        workload.value_heads,
        cu_seqlens=torch.tensor([0, *accumulate(workload.lengths)]) if workload.lengths else None,
        d_out=normal(1.0, out, task.dtype) if training else None,
        d_final_state=normal(0.1, states, task.state.dtype) if training else None,
        state_pool=normal(0.1, states, task.state.dtype) if decoding else None,
    )
    steps = STEPS if decoding else 1
    return [replace(case, arguments=drawn.arguments(shape, "mild", seed)) for seed in range(steps)]


# -- what figures depend on


def evictor() -> Callable[[], object]:
    """A function that writes more than the last cache holds."""
    import torch

    return torch.zeros(EVICTED * cache_bytes() // 4).neg_


def cache_bytes() -> int:
    """Of the last cache."""
    sizes = [_text(path).strip() for path in sorted(SYSTEM.glob("cache/index*/size"))]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=CACHE_BYTES)


def versions() -> dict:
    """Of what computes, with the instructions and the threads that torch takes by itself."""
    import torch

    import kdagen

    text = torch.__config__.show()
    found = {n: m[1] for n, p in LIBRARIES.items() if (m := re.search(p, text))}
    ours = {"kdagen": kdagen.__version__, "torch": torch.__version__}
    return ours | found | {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


LIBRARIES = {
    "blas": r"BLAS_INFO=(\w+)",
    "mkl": r"Math Kernel Library Version (\S+)",
    "onednn": r"MKL-DNN v(\S+)",
}


@functools.cache
def kernels() -> str:
    """A hash of what decides the computation: the text of what derives programs and of what runs them."""
    import kdagen

    root = Path(kdagen.__file__).parent
    return source_hash({p for name in SOURCES for p in root.glob(name if name.endswith(".py") else f"{name}/*.py")})


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
