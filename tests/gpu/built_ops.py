"""Built ops for the tests of this folder, launched in memory that shows what a kernel reads or writes outside of it.

Kernels come from the folder that KDAGEN_BUILD_DIR names, those that train or decode also from packages beside it; what
is in none of them is built just in time. What is needed of kdagen is its runtime: no TileLang and no compiler where all
ops were built elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from kdagen.autotune import launches
from kdagen.autotune.guarded import Guarded, same_bits

import kdagen as kg
from kdagen import debug, zoo
from kdagen.ir.canonical_json import from_json
from kdagen.reference import recurrence_reference
from kdagen.runtime.loader import LoadedOp, load_op
from kdagen.runtime.package import BuiltOp
from kdagen.target import TARGETS
from kdagen.tolerance import TOLERANCE, gradient_tolerance, reference_gradients, relative_error

DEVICE = "cuda"


def capability() -> str:
    """The compute capability of the GPU, "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(DEVICE)))


@cache
def variants(name: str) -> tuple[LoadedOp, ...]:
    """Kernels of an entry of the zoo for this GPU: all that the build folder has, or one set built just in time."""
    return _found(name, [debug.build_dir()], "inference") or (_build(name, "inference"),)


@cache
def trained(name: str) -> tuple[LoadedOp, ...]:
    """The same of those that train, whatever they keep."""
    return _found(name, _places(), "training") or (_build(name, "training", {}),)


@cache
def decoding(name: str) -> tuple[LoadedOp, ...]:
    """The same of those that decode, for every type of states."""
    return _found(name, _places(), "decode") or (_build(name, "decode"),)


@cache
def by_policy(name: str) -> dict[str, LoadedOp]:
    """Kernels that train by what they keep; policies that were not built are, just in time."""
    found = {kernels.plan["schedule"]["keep"]: kernels for kernels in reversed(trained(name))}
    return {keep: found.get(keep) or _build(name, "training", {"keep": keep}) for keep in ("inputs", "states", "all")}


def _places() -> list:
    """The build folder, and the packages beside it."""
    beside = sorted(p.parent for p in debug.build_dir().parent.glob("*/kdagen.json"))
    return list(dict.fromkeys([debug.build_dir(), *beside]))


def _found(name: str, places: list, purpose: str) -> tuple[LoadedOp, ...]:
    folders = [f for place in places for f in sorted((place / name).glob("[!.]*/manifest.json"))]
    built = [load_op(f.parent) for f in folders]
    return tuple(v for v in built if v.purpose == purpose and capability() in v.manifest["target"]["runs_on"])


def _build(name: str, purpose: str, schedule: dict | None = None) -> LoadedOp:
    """Built just in time, with the fields of a schedule in which it differs from the default."""
    from kdagen import pipeline
    from kdagen.build.builder import build_cached

    arch = next(t.name for t in TARGETS.values() if capability() in t.runs_on)
    make = {"inference": "op", "training": "training", "decode": "decode"}[purpose]
    source = getattr(pipeline, f"compile_{make}")(zoo.get(name), arch=arch, schedule=schedule)
    return load_op(build_cached(source))


@cache
def op(name: str):
    """The same as people call it, but untuned: bits are compared between calls of different sizes."""
    if (folder := debug.build_dir() / name).is_dir():
        return BuiltOp(folder, tuned=False)
    return kg.compile(name, schedule={}, training_schedule={}, decode_schedule={})


def draw(
    kernels: LoadedOp, shape: tuple[int, int, int], gate: str = "mild", seed: int = 0, group: int = 1
) -> tuple[dict, torch.Tensor]:
    """Arguments on the CPU for (B, T, HV), as the kernels take them, and an initial state of each of B sequences.

    A head of keys serves a `group` of value heads.
    """
    return launches.arguments(kernels, shape, gate, seed, group), draw_states(kernels, shape[0], shape[2], seed)


def draw_states(kernels: LoadedOp, count: int, heads: int, seed: int = 0) -> torch.Tensor:
    """States on the CPU, of the type that the kernels take."""
    dims = (kernels.plan["dims"][d] for d in kernels.state.dims)
    drawn = 0.1 * torch.randn(count, heads, *dims, generator=torch.Generator().manual_seed(seed))
    return drawn.to(getattr(torch, kernels.state.dtype))


def plain(kernels: LoadedOp, state: torch.Tensor | None) -> torch.Tensor | None:
    """A state as the recurrence has it: [N, HV, K, V] in float64."""
    return state if state is None else (state if kernels.state.layout == "KV" else state.mT).double()


def draw_cotangents(
    kernels: LoadedOp, shape: tuple[int, int, int], seed: int = 0, sequences: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the output and of the final states, on the CPU."""
    (b, t, h), dims = shape, kernels.plan["dims"]
    generator = torch.Generator().manual_seed(seed + 1)
    d_out = torch.randn(b, t, h, dims["V"], generator=generator).to(getattr(torch, kernels.plan["dtype"]))
    d_final = torch.randn(sequences or b, h, *(dims[d] for d in kernels.state.dims), generator=generator)
    return d_out, d_final.to(getattr(torch, kernels.state.dtype))


def launch(
    kernels: LoadedOp, tensors: dict, state: torch.Tensor | None = None, every: int = 0
) -> tuple[torch.Tensor, ...]:
    """(output, final states), and states after each `every` chunks if asked for, of one launch.

    Nothing but workspaces and results was written, and all of the results. `tensors` may hold cu_seqlens.
    """
    memory = Guarded(DEVICE)
    copies = _copies(kernels, memory, tensors, {"initial_state": state})
    made = _launch(kernels, copies, "forward", memory, {"every": every} if every else {})
    return _results(kernels, made, "out", "final_state", *(["states"] if every else []))


def decode(
    kernels: LoadedOp, tensors: dict, pool: torch.Tensor, may_be_unwritten: bool = False, **more
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, the pool afterwards) of one launch in place on a copy; `more` may hold integers by name, null_below.

    Nothing but these two was written, and all of the output, unless integers are wrong.
    """
    memory, null_below = Guarded(), more.pop("null_below", 0)
    given = {n: memory.copy(x) for n, x in {**tensors, **more}.items() if x is not None}
    copy = memory.copy(pool)
    before = {n: x.clone() for n, x in given.items()}
    made = kernels.launch({**given, "state_pool": copy}, "decode", memory.allocate, {"null_below": null_below})
    torch.cuda.synchronize()
    assert not memory.broken(), f"a kernel wrote outside its tensors: {memory.broken()}"
    assert all(same_bits(given[n], x) for n, x in before.items()), "a kernel wrote to what it was given"
    return *((made[kernels.by_role["out"]],) if may_be_unwritten else _results(kernels, made, "out")), copy


@dataclass(frozen=True)
class Trained:
    """What a forward and its backward give; `gradients` are by argument and of "initial_state"."""

    out: torch.Tensor
    final_state: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def results(self) -> dict[str, torch.Tensor]:
        """All of it, on the CPU."""
        gradients = {f"d_{name}": x for name, x in self.gradients.items()}
        return {n: x.cpu() for n, x in {"out": self.out, "final_state": self.final_state, **gradients}.items()}


def train(kernels: LoadedOp, tensors: dict, state=None, d_out=None, d_final_state=None) -> Trained:
    """One launch of both passes; of the forward's workspaces only those that it keeps outlive it.

    As for `launch`, nothing is written but workspaces and results: the backward leaves what was kept as it was.
    """
    memory = Guarded(DEVICE)
    arguments = _copies(kernels, memory, tensors, {"initial_state": state})
    forward = _launch(kernels, arguments, "forward", memory)
    kept = {name: forward[name] for name in kernels.kept}
    cotangents = _copies(kernels, memory, {}, {"d_out": d_out, "d_final_state": d_final_state})
    backward = _launch(kernels, arguments | kept | cotangents, "backward", memory)
    (d_initial,) = _results(kernels, backward, "d_initial_state")
    gradients = {**kernels.gradients(backward), "initial_state": d_initial}
    assert all(x.isfinite().all() for x in gradients.values()), "a gradient that is NaN: not written, or of no tensor"
    return Trained(*_results(kernels, forward, "out", "final_state"), gradients)


def _copies(kernels: LoadedOp, memory: Guarded, tensors: dict, of_roles: dict) -> dict:
    """Guarded copies on the GPU, by name."""
    named = {kernels.by_role[role]: x for role, x in of_roles.items() if x is not None}
    return {name: memory.copy(x) for name, x in {**tensors, **named}.items()}


def _launch(kernels: LoadedOp, given: dict, which: str, memory: Guarded, scalars: dict | None = None) -> dict:
    before = {name: x.clone() for name, x in given.items()}
    made = kernels.launch(given, which, memory.allocate, scalars)
    torch.cuda.synchronize()
    assert not memory.broken(), f"a kernel wrote outside its tensors: {memory.broken()}"
    changed = [name for name, x in before.items() if not same_bits(given[name], x)]
    assert not changed, f"a kernel wrote to {', '.join(changed)}, which it was given"
    return made


def _results(kernels: LoadedOp, made: dict, *roles: str) -> tuple:
    found = tuple(made[kernels.by_role[role]] for role in roles)
    assert all(x.isfinite().all() for x in found), "NaN: not written, or computed from what no tensor holds"
    return found


def sequences(kernels: LoadedOp, tensors: dict, ends: list[int] | None = None) -> list[dict]:
    """The arguments of each sequence alone, [1, T, ..]: of a batch, or of a ragged one with these ends."""
    count = next(x.shape[0] for n, x in tensors.items() if per_token(kernels, n)) if ends is None else len(ends) - 1
    cut = lambda x, s: x[s : s + 1] if ends is None else x[:, ends[s] : ends[s + 1]]  # noqa: E731
    return [{n: cut(x, s) if per_token(kernels, n) else x for n, x in tensors.items()} for s in range(count)]


def per_token(kernels: LoadedOp, name: str) -> bool:
    """Whether an argument has an entry for each token."""
    return "T" in kernels.plan["tensors"][name]["shape"]


def reference(name: str, kernels: LoadedOp, tensors: dict, state, ends: list[int] | None = None) -> tuple:
    """(output, final states) by the recurrence, token by token in float64; padding is zero."""
    states, outs, finals = plain(kernels, state), [], []
    for s, alone in enumerate(sequences(kernels, tensors, ends)):
        first = None if states is None else states[s : s + 1]
        if next(x.shape[1] for n, x in alone.items() if per_token(kernels, n)):
            out, final = recurrence_reference(zoo.get(name), alone, first)
            outs, finals = [*outs, out], [*finals, final]
        else:
            finals.append(first)
    if ends is None:
        return torch.cat(outs), torch.cat(finals)
    padding = next(x.shape[1] for n, x in tensors.items() if per_token(kernels, n)) - ends[-1]
    out = torch.nn.functional.pad(torch.cat(outs, 1), (0, 0, 0, 0, 0, padding))
    zero = torch.zeros_like(next(f for f in finals if f is not None))
    return out, torch.cat([zero if f is None else f for f in finals])


def errors(
    name: str, kernels: LoadedOp, found, tensors: dict, state: torch.Tensor | None, ends: list[int] | None = None
) -> tuple[float, ...]:
    """Relative errors of (output, final states) against the recurrence."""
    expected = reference(name, kernels, tensors, state, ends)
    out, final = found[0].cpu(), plain(kernels, found[1].cpu())
    return tuple(relative_error(f, e) for f, e in zip((out, final), expected))


def tolerance(kernels: LoadedOp) -> float:
    """What errors of outputs and states may be at most."""
    return TOLERANCE[kernels.plan["dtype"]]


def training_errors(name: str, kernels: LoadedOp, tensors: dict, state, d_out, d_final_state) -> dict[str, tuple]:
    """Error of each result and gradient against the recurrence in float64, and what it may be at most.

    The oracle runs where the kernels do: with float64 states of every token, a CPU takes long.
    """
    found = train(kernels, tensors, state, d_out, d_final_state)
    final_state = plain(kernels, found.final_state)
    moved = {n: x.to(DEVICE) for n, x in tensors.items()}
    states = [plain(kernels, x) for x in (state, d_final_state)]
    state, d_final = (torch.zeros_like(final_state) if x is None else x.to(DEVICE) for x in states)
    d_out = torch.zeros(found.out.shape, dtype=torch.float64) if d_out is None else d_out
    with torch.device(DEVICE):
        out, final, gradients = reference_gradients(zoo.get(name), moved, state, d_out.to(DEVICE), d_final)
    dtype, canonical = kernels.plan["dtype"], from_json(kernels.plan["recurrence"]["canonical"])
    most = gradient_tolerance(canonical, dtype)
    made = {**found.gradients, "initial_state": plain(kernels, found.gradients["initial_state"])}
    wrong = {f"d_{n}": (relative_error(made[n], e), most[n]) for n, e in gradients.items()}
    return {
        "out": (relative_error(found.out, out), TOLERANCE[dtype]),
        "final_state": (relative_error(final_state, final), TOLERANCE[dtype]),
        **wrong,
    }
