"""Correct before fast: a candidate's results against the recurrence in float64, on whatever device.

Every case runs twice, on inputs between guard bytes, and what a launch makes is poison at first: results must be as
near to the oracle's as their dtype allows, in norm and in every element, written whole, free of NaN and the same bits
both times; guards, inputs and slots of a pool that no index names must be as they were. What cases there are is in
kdagen.autotune.cases, what is expected of them in kdagen.autotune.expected.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable

from kdagen.autotune.cases import Case, Inputs, forms
from kdagen.autotune.expected import SIZE, Oracle, oracle
from kdagen.autotune.guarded import Guarded, same_bits, unwritten
from kdagen.autotune.sweep import Task

from kdagen.runtime.cpu_schedule import at_most

ELEMENTS = ", an element"  # ends the name of such an error
ELEMENT = 8  # times the tolerance of the norm: what an element may be off, as a part of the largest one


class Wrong(Exception):
    """What is wrong with a run."""


def check(task: Task, run: Callable[[Case], dict], device="cpu", plan: dict | None = None) -> dict:
    """{"ok", "reason", "errors": {name: [found, most]}, "oracle"} of what runs a task's cases.

    `run` takes a Case whose tensors are on `device`, and returns, as the op does, "out" and, but in decoding,
    "final_state"; in training also "d_<argument>" of each, and "d_initial_state" where there is a state. A pool is
    replaced in place. What it makes by the case's `allocate`, as LoadedOp.launch does, is guarded too. `plan` is
    that of the manifest, where there are kernels. What `run` raises is raised.
    """
    drawn, source = cases(task, json.dumps(plan["recurrence"]["canonical"]) if plan else "", _dtypes(plan))
    errors: dict[str, list] = {}
    for case, expected in drawn:
        try:
            first, again = (_attempt(case, run, device) for _ in range(2))
            _compare(source, case, first, expected, errors)
            if moved := [name for name, x in first.items() if not same_bits(x, again[name])]:
                raise Wrong(f"two runs differ in {', '.join(moved)}")
        except Wrong as wrong:
            return {"ok": False, "reason": f"{wrong} ({case.name})", "errors": errors, "oracle": source.name}
    return {"ok": True, "reason": "", "errors": errors, "oracle": source.name}


def _dtypes(plan: dict | None) -> tuple:
    """Those of a plan's arguments."""
    specs = plan["tensors"].values() if plan else ()
    return tuple((spec["name"], spec["dtype"]) for spec in specs if spec["role"] == "argument")


@functools.lru_cache(maxsize=4)
def cases(task: Task, canonical: str, dtypes: tuple) -> tuple[list[tuple[Case, dict]], Oracle]:
    """All cases of a task with what is expected, the quickest first, and by which oracle; the last tasks' are kept."""
    source = oracle(task, json.loads(canonical) if canonical else None)
    chosen = source.canonical.dtypes(task.dtype, task.gate_dtype or task.dtype) | dict(dtypes)
    inputs = Inputs(task, source.canonical, chosen)
    drawn = [inputs.draw(form, seed) for seed, form in enumerate(forms(task.purpose))]
    with at_most(1):  # token by token, so that more threads would but wait for each other
        return [(case, source.expected(case)) for case in drawn], source


def _attempt(case: Case, run: Callable[[Case], dict], device) -> dict:
    """Results of one run, on the CPU."""
    memory = Guarded(device)
    placed = case.placed(memory)
    found = dict(run(placed))
    if case.state_pool is not None:
        found["state_pool"] = placed.state_pool
    found = {name: x.detach().cpu() for name, x in found.items()}  # waits for the device
    if what := memory.broken():
        raise Wrong(f"a kernel wrote outside a tensor, {what}")
    before, after = ({**c.arguments, **c.given} for c in (case, placed))
    changed = [n for n, x in before.items() if n != "state_pool" and not same_bits(after[n].cpu(), x)]
    if changed:
        raise Wrong(f"a kernel wrote to {', '.join(changed)}, which it was given")
    return found


def _compare(source: Oracle, case: Case, found: dict, expected: dict, errors: dict) -> None:
    """Raises Wrong, or adds to the largest errors so far."""
    names = [name for name in expected if not name.startswith(SIZE)]
    if absent := [name for name in names if name not in found]:
        raise Wrong(f"no {', '.join(absent)}")
    for name in names:
        if count := unwritten(found[name]):
            raise Wrong(f"{count} of {found[name].numel()} elements of {name} were not written")
        if not bool(found[name].isfinite().all()):
            raise Wrong(f"{name} holds NaN or infinity")
    _check_pool(case, found)
    most = tolerances(source)
    for name in names:
        result = source.plain(found[name]) if "state" in name else found[name].double()
        size = expected.get(f"{SIZE}{name}", expected[name])
        for label, error, limit in _errors(name, result - expected[name], size, most[name]):
            if math.isfinite(error):
                errors[label] = [max(error, errors.get(label, [0.0])[0]), limit]
            if not error <= limit:
                raise Wrong(f"{label} is off by {error:.1e}, expected at most {limit:.1e}")


def _check_pool(case: Case, found: dict) -> None:
    if case.state_pool is None:
        return
    named = {slot for row in case.slots for slot in row}
    others = [slot for slot in range(len(case.state_pool)) if slot not in named]
    changed = [slot for slot in others if not same_bits(found["state_pool"][slot], case.state_pool[slot])]
    if changed:
        raise Wrong(f"slots {changed} of the pool were written, which no index names")


def _errors(name: str, difference, size, most: float) -> list[tuple[str, float, float]]:
    """In norm, and of the element that is furthest off, against the largest one."""
    norms = float(difference.norm()), float(size.norm())
    largest = [float(x.abs().max()) if x.numel() else 0.0 for x in (difference, size)]
    return [(name, _part(*norms), most), (f"{name}{ELEMENTS}", _part(*largest), ELEMENT * most)]


def _part(error: float, size: float) -> float:
    return error / size if size else math.inf if error else 0.0


def tolerances(source: Oracle) -> dict[str, float]:
    """What each result may be off in norm; states may be stored in a dtype of their own."""
    from kdagen.tolerance import TOLERANCE, gradient_tolerance

    task = source.task
    gradients = {f"d_{n}": most for n, most in gradient_tolerance(source.canonical, task.dtype).items()}
    found = {"out": TOLERANCE[task.dtype], **gradients}
    stored = TOLERANCE[task.state.dtype]
    found |= {name: max(TOLERANCE[task.dtype], stored) for name in ("final_state", "state_pool")}
    return found | {"d_initial_state": max(found["d_initial_state"], stored)}
