"""Tile IR of a task's candidates, before any compiler: what makes each legal, and all that the model knows of it.

Kernels are lowered by kdagen.lower, each once: a schedule's fields are told apart by the kernels that they shape.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property

from kdagen.autotune.defaults import default_decode_schedule, default_schedule, default_training_schedule
from kdagen.autotune.sweep import Task

from kdagen.derive.adjoint import adjoint
from kdagen.derive.step import step_form
from kdagen.ir import step as step_ir
from kdagen.ir.tensor_verify import verify_adjoint
from kdagen.ir.tile import Buffer, Copy, Kernel, reads, writes
from kdagen.ir.tile_cost import bytes_a_token
from kdagen.lower import check_head_dims, lower
from kdagen.lower.decode import lower_decode
from kdagen.lower.scan import SPECIALISED
from kdagen.lower.training import lower_training
from kdagen.pipeline import Call
from kdagen.recurrence import load
from kdagen.schedule import Choices

DEFAULTS = {
    "inference": default_schedule,
    "training": default_training_schedule,
    "decode": default_decode_schedule,
}
# The fields that shape each family's kernels; those of a family that is not here are in REST.
SHAPED_BY = {
    "index": ("chunk_size", "segment", "split"),
    "prepare": ("chunk_size", "decay", "prepare_threads"),
    "reverse": ("chunk_size", "stages", "scan_skeleton", "reverse_v_tile", "segment"),
    "gradients": ("chunk_size", "decay", "segment", "gradient_threads"),
}
REST = ("chunk_size", "v_tile", "scan_threads", "stages", "scan_skeleton", "output", "split", "keep", "threads")


class Tile:
    """A kernel, and what can be read off its tile IR without any hardware."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    @cached_property
    def specialised(self) -> bool:
        return self.kernel.skeleton == SPECIALISED

    @cached_property
    def shared_bytes(self) -> int:
        """Shared memory that a block cannot do without: tiles whose uses do not meet may share a place, but in a loop
        whose next copies are on their way."""
        if any(isinstance(s, Copy) for s in self.kernel.loads) and self.kernel.stages > 1:
            return self.kernel.shared_bytes
        return max((sum(b.bytes for b in tiles) for tiles in self.kernel.in_use()), default=0)

    @cached_property
    def registers(self) -> int:
        """Registers that a thread cannot do without: of the fragments that are in use at once, each thread's part."""
        body = self.kernel.loads + self.kernel.body + self.kernel.stores
        touched = [reads(s) | writes(s) for s in body]
        throughout = {n for s in self.kernel.before + self.kernel.after for n in reads(s) | writes(s)}
        most = 0
        fragments = [b for b in self.kernel.buffers if b.scope == "fragment"]
        where = {b.name: [i for i, names in enumerate(touched) if b.name in names] for b in fragments}
        for i in range(len(body)):
            alive = [b for b in fragments if b.name in throughout or (w := where[b.name]) and w[0] <= i <= w[-1]]
            most = max(most, sum(b.bytes for b in alive))
        return most // (4 * self.kernel.threads)

    @cached_property
    def workspaces(self) -> tuple[Buffer, ...]:
        """What it reads of other kernels, or leaves for them."""
        return tuple(b for b in self.kernel.buffers if b.role == "workspace")

    @cached_property
    def tiles(self) -> int:
        """Blocks that share a chunk of a head: the V tiles."""
        return next((int(e.split()[0]) for name, e in self.kernel.grid if name.startswith("tile")), 1)

    @cached_property
    def bytes_a_token(self) -> float:
        """Bytes between memory and chip a token and head, what V tiles fetch alike being fetched once."""
        return bytes_a_token(self.kernel) - self._bytes_alike(self.kernel)

    @cached_property
    def cold_bytes_a_token(self) -> float:
        """The same where what other kernels left is still in the cache."""
        others = tuple(b for b in self.kernel.buffers if b.role != "workspace")
        kernel = replace(self.kernel, buffers=others)
        return bytes_a_token(kernel) - self._bytes_alike(kernel)

    @cached_property
    def block_bytes(self) -> float:
        """What a block fetches for an iteration."""
        kernel = replace(self.kernel, body=(), stores=(), before=(), after=())
        return bytes_a_token(kernel) * kernel.chunk_size / self.tiles

    def _bytes_alike(self, kernel: Kernel) -> float:
        """What a V tile fetches although another one does, too."""
        alike = tuple(s for s in kernel.loads if isinstance(s, Copy) and "tile" not in s.src)
        fetched = replace(kernel, loads=alike, body=(), stores=(), before=(), after=())
        return bytes_a_token(fetched) * (1 - 1 / self.tiles)


class Lowering(Call):
    """What the candidates of a task share: all that is derived before any schedule."""

    def __init__(self, task: Task):
        check_head_dims(task.dims)
        super().__init__(load(task.op), task.head_dim, task.dtype, task.target, task.gate_dtype, task.state)
        self.task = task
        self._lowered: dict = {}  # passes by what was asked for, and by the schedule that it makes

    def complete(self, **choices) -> Choices:
        """The default schedule, some fields being given."""
        return DEFAULTS[self.task.purpose](self.canonical, self.dims, self.task.dtype, self.target, **choices)

    def passes(self, schedule: Choices) -> dict[str, tuple[Tile, ...]]:
        """The kernels of each pass in launch order; ScheduleError where there are none.

        Those that do not depend on a field in which two schedules differ are the same objects for both.
        """
        fields = vars(schedule)
        rest = self.lowered(**{f: fields[f] for f in REST if f in fields})
        return {name: tuple(self._own(tile, fields) for tile in tiles) for name, tiles in rest.items()}

    def _own(self, tile: Tile, fields: dict) -> Tile:
        """The kernel of that name under all fields of a schedule that shape it."""
        shaped_by = SHAPED_BY.get(tile.kernel.family)
        if not shaped_by:
            return tile
        passes = self.lowered(**{f: fields[f] for f in shaped_by if f in fields})
        return next(t for tiles in passes.values() for t in tiles if t.kernel.name == tile.kernel.name)

    def lowered(self, **choices) -> dict[str, tuple[Tile, ...]]:
        """The passes of the default schedule under these choices."""
        asked = tuple(choices.items())
        if asked not in self._lowered:
            schedule = self.complete(**choices)
            if schedule not in self._lowered:
                made = {}  # a kernel that is in both passes is one
                self._lowered[schedule] = {
                    name: tuple(made.setdefault(k.name, Tile(k)) for k in kernels)
                    for name, kernels in self._lower(schedule).items()
                }
            self._lowered[asked] = self._lowered[schedule]
        return self._lowered[asked]

    def _lower(self, schedule: Choices) -> dict[str, tuple[Kernel, ...]]:
        task, state = self.task, self.task.state
        if task.purpose == "decode":
            return {"decode": (lower_decode(self.step, self.dims, self.dtypes, task.dtype, schedule, state),)}
        if task.purpose == "training":
            found = lower_training(self.adjoint, self.dims, self.dtypes, task.dtype, schedule, self.target, state)
            return {"forward": found.forward, "backward": found.backward}
        return {"forward": lower(self.program, self.dims, self.dtypes, task.dtype, schedule, self.target, state)}

    @cached_property
    def adjoint(self):
        return verify_adjoint(adjoint(self.program))

    @cached_property
    def step(self):
        return step_ir.verify(step_form(self.canonical))


@cache
def lowering(task: Task) -> Lowering:
    """The lowering of a task, whose kernels are kept."""
    return Lowering(task)
