"""Built ops for the tests of this folder, and memory that shows what a kernel reads or writes outside its tensors.

Kernels come from the folder that KDAGEN_BUILD_DIR names, those that train also from packages beside it; what is in
none of them is built just in time. What is needed of kdagen is its runtime: no TileLang and no compiler where all ops
were built elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

import kdagen as kg
from kdagen import debug, zoo
from kdagen.ir.canonical_json import from_json
from kdagen.reference import recurrence_reference
from kdagen.runtime.loader import LoadedOp, load_op
from kdagen.runtime.package import BuiltOp
from kdagen.target import TARGETS
from kdagen.tolerance import TOLERANCE, gradient_tolerance, reference_gradients, relative_error

POISON = 0xFF  # as bytes of any floating dtype: NaN
GUARD_BYTES = 1 << 14
DEVICE = "cuda"


def capability() -> str:
    """The compute capability of the GPU, "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(DEVICE)))


@cache
def variants(name: str) -> tuple[LoadedOp, ...]:
    """Kernels of an entry of the zoo for this GPU: all that the build folder has, or one set built just in time."""
    return _found(name, [debug.build_dir()], training=False) or (_build(name),)


@cache
def trained(name: str) -> tuple[LoadedOp, ...]:
    """The same of those that train, whatever they keep."""
    places = [debug.build_dir(), *sorted(p.parent for p in debug.build_dir().parent.glob("*/kdagen.json"))]
    return _found(name, list(dict.fromkeys(places)), training=True) or (_build(name, {}),)


@cache
def by_policy(name: str) -> dict[str, LoadedOp]:
    """Kernels that train by what they keep; policies that were not built are, just in time."""
    found = {kernels.plan["schedule"]["keep"]: kernels for kernels in reversed(trained(name))}
    return {keep: found.get(keep) or _build(name, {"keep": keep}) for keep in ("inputs", "states", "all")}


def _found(name: str, places: list, training: bool) -> tuple[LoadedOp, ...]:
    built = [v for place in places if (place / name).is_dir() for v in BuiltOp(place / name).variants]
    return tuple(v for v in built if v.training == training and capability() in v.manifest["target"]["runs_on"])


def _build(name: str, training: dict | None = None) -> LoadedOp:
    """Built just in time: for inference, or with the fields of a schedule in which training differs."""
    from kdagen.build.builder import build_cached
    from kdagen.pipeline import compile_op, compile_training

    arch = next(t.name for t in TARGETS.values() if capability() in t.runs_on)
    make = compile_op if training is None else compile_training
    return load_op(build_cached(make(zoo.get(name), arch=arch, schedule=training)))


@cache
def op(name: str):
    """The same as people call it."""
    return BuiltOp(debug.build_dir() / name) if (debug.build_dir() / name).is_dir() else kg.compile(name)


def draw(
    kernels: LoadedOp, shape: tuple[int, int, int], gate: str = "mild", seed: int = 0
) -> tuple[dict, torch.Tensor]:
    """Arguments on the CPU for (B, T, H), as the kernels take them, and an initial state."""
    plan = kernels.plan
    dims = (*shape, plan["dims"]["K"], plan["dims"]["V"])
    drawn = zoo.sample(from_json(plan["recurrence"]["canonical"]), dims, gate, seed)
    state = 0.1 * torch.randn(dims[0], *dims[2:], generator=torch.Generator().manual_seed(seed))
    return {n: x.to(getattr(torch, plan["tensors"][n]["dtype"])) for n, x in drawn.items()}, state


def draw_cotangents(kernels: LoadedOp, shape: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the output and of the final state, on the CPU."""
    (b, t, h), dims = shape, kernels.plan["dims"]
    generator = torch.Generator().manual_seed(seed + 1)
    d_out = torch.randn(b, t, h, dims["V"], generator=generator).to(getattr(torch, kernels.plan["dtype"]))
    return d_out, torch.randn(b, h, dims["K"], dims["V"], generator=generator)


class Guarded:
    """Allocates tensors of NaN between guard regions."""

    def __init__(self):
        self.buffers: list[torch.Tensor] = []

    def allocate(self, shape, dtype: str, device, zero: bool = False) -> torch.Tensor:
        """As LoadedOp.launch asks for it."""
        like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        size = like.numel() * like.element_size()
        buffer = torch.full((size + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8, device=device)
        self.buffers.append(buffer)
        tensor = buffer[GUARD_BYTES : GUARD_BYTES + size].view(like.dtype).view(shape)
        return tensor.zero_() if zero else tensor

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A guarded copy on the GPU."""
        made = self.allocate(tensor.shape, str(tensor.dtype).removeprefix("torch."), DEVICE)
        return made.copy_(tensor)

    def intact(self) -> bool:
        """Whether all guard regions are as they were made."""
        edges = [edge for b in self.buffers for edge in (b[:GUARD_BYTES], b[-GUARD_BYTES:])]
        return all(bool((edge == POISON).all()) for edge in edges)


def launch(kernels: LoadedOp, tensors: dict, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, final state) of one launch; nothing but workspaces and results was written, and all of the results."""
    memory = Guarded()
    copies = _copies(kernels, memory, tensors, {"initial_state": state})
    made = _launch(kernels, copies, "forward", memory)
    return _results(kernels, made, "out", "final_state")


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
    memory = Guarded()
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


def _launch(kernels: LoadedOp, given: dict, which: str, memory: Guarded) -> dict:
    before = {name: x.clone() for name, x in given.items()}
    made = kernels.launch(given, which, memory.allocate)
    torch.cuda.synchronize()
    assert memory.intact(), "a kernel wrote outside its tensors"
    changed = [name for name, x in before.items() if not same_bits(given[name], x)]
    assert not changed, f"a kernel wrote to {', '.join(changed)}, which it was given"
    return made


def _results(kernels: LoadedOp, made: dict, *roles: str) -> tuple:
    found = tuple(made[kernels.by_role[role]] for role in roles)
    assert all(x.isfinite().all() for x in found), "NaN: not written, or computed from what no tensor holds"
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bits, NaN and signs of zero included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def errors(name: str, found, tensors: dict, state: torch.Tensor | None) -> tuple[float, ...]:
    """Relative errors of (output, final state) against the recurrence, token by token in float64."""
    expected = recurrence_reference(zoo.get(name), tensors, state)
    return tuple(float((f.double().cpu() - e).norm() / e.norm()) for f, e in zip(found, expected))


def training_errors(name: str, kernels: LoadedOp, tensors: dict, state, d_out, d_final_state) -> dict[str, tuple]:
    """Error of each result and gradient against the recurrence in float64, and what it may be at most.

    The oracle runs where the kernels do: with float64 states of every token, a CPU takes long.
    """
    found = train(kernels, tensors, state, d_out, d_final_state)
    zeros = torch.zeros(found.final_state.shape, dtype=torch.float64, device=DEVICE)
    moved = {n: x.to(DEVICE) for n, x in tensors.items()}
    given = [zeros if x is None else x.to(DEVICE) for x in (state, d_out, d_final_state)]
    given[1] = torch.zeros(found.out.shape, dtype=torch.float64, device=DEVICE) if d_out is None else given[1]
    with torch.device(DEVICE):
        out, final, gradients = reference_gradients(zoo.get(name), moved, *given)
    dtype, canonical = kernels.plan["dtype"], from_json(kernels.plan["recurrence"]["canonical"])
    most = gradient_tolerance(canonical, dtype)
    wrong = {f"d_{n}": (relative_error(found.gradients[n], e), most[n]) for n, e in gradients.items()}
    return {
        "out": (relative_error(found.out, out), TOLERANCE[dtype]),
        "final_state": (relative_error(found.final_state, final), TOLERANCE[dtype]),
        **wrong,
    }
