"""Built ops for the tests of this folder, and memory that shows what a kernel reads or writes outside its tensors.

Kernels come from the folder that KDAGEN_BUILD_DIR names; those that it lacks are built just in time. What is needed of
kdagen is its runtime: no TileLang and no compiler where all ops were built elsewhere.
"""

from __future__ import annotations

from functools import cache

import torch

import kdagen as kg
from kdagen import debug, zoo
from kdagen.ir.canonical_json import from_json
from kdagen.reference import recurrence_reference
from kdagen.runtime.loader import LoadedOp, load_op
from kdagen.runtime.package import BuiltOp
from kdagen.target import TARGETS

TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}  # of the norm of the difference over the norm
POISON = 0xFF  # as bytes of any floating dtype: NaN
GUARD_BYTES = 1 << 14
DEVICE = "cuda"


def capability() -> str:
    """The compute capability of the GPU, "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(DEVICE)))


@cache
def variants(name: str) -> tuple[LoadedOp, ...]:
    """Kernels of an entry of the zoo for this GPU: all that the build folder has, or one set built just in time."""
    found = BuiltOp(debug.build_dir() / name).variants if (debug.build_dir() / name).is_dir() else []
    return tuple(v for v in found if capability() in v.manifest["target"]["runs_on"]) or (_build(name),)


def _build(name: str) -> LoadedOp:
    from kdagen.build.builder import build_cached
    from kdagen.pipeline import compile_op

    arch = next(t.name for t in TARGETS.values() if capability() in t.runs_on)
    return load_op(build_cached(compile_op(zoo.get(name), arch=arch)))


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
    memory, given = Guarded(), dict(tensors)
    if state is not None:
        given[kernels.by_role["initial_state"]] = state
    copies = {name: memory.copy(x) for name, x in given.items()}
    results = kernels.launch(copies, memory.allocate)
    torch.cuda.synchronize()
    assert memory.intact(), "a kernel wrote outside its tensors"
    assert all(same_bits(copies[name].cpu(), x.cpu()) for name, x in given.items()), "a kernel wrote to an argument"
    found = results[kernels.by_role["out"]], results[kernels.by_role["final_state"]]
    assert all(x.isfinite().all() for x in found), "NaN: not written, or computed from what no tensor holds"
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bits, NaN and signs of zero included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def errors(name: str, found, tensors: dict, state: torch.Tensor | None) -> tuple[float, ...]:
    """Relative errors of (output, final state) against the recurrence, token by token in float64."""
    expected = recurrence_reference(zoo.get(name), tensors, state)
    return tuple(float((f.double().cpu() - e).norm() / e.norm()) for f, e in zip(found, expected))
