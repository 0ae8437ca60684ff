"""What a candidate is checked on: adversarial inputs of its task, and what the recurrence makes of them in float64.

Lengths end inside, at and just past chunks and segments of every size, gates are of every class, heads are grouped,
slots of a pool are out of order. Inputs follow from the task alone and not from a schedule, so that all candidates of a
task share them. What is expected of them is kdagen.autotune.expected's, who compares is kdagen.autotune.check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from kdagen.autotune.sweep import Task

SHORT = (1, 0, 15, 16, 17, 31, 33, 0, 63, 64, 65, 1)  # about chunks
LONG = (128, 129, 512, 513)  # about segments of 8 chunks of 16 and 64
PADDING = 5  # tokens of no sequence, behind the last one
SLOTS = 11  # of a pool
GIVEN = ("initial_state", "cu_seqlens", "d_out", "d_final_state", "state_pool", "state_indices", "num_accepted_tokens")


@dataclass(frozen=True)
class Case:
    """The tensors of one call, of the shapes and dtypes that the op takes; `arguments` are by name."""

    name: str
    arguments: dict
    value_heads: int
    initial_state: object = None
    cu_seqlens: object = None
    d_out: object = None  # cotangents, in training
    d_final_state: object = None
    state_pool: object = None  # in decoding; replaced in place
    state_indices: object = None
    num_accepted_tokens: object = None
    null_below: int = 0
    allocate: Callable | None = None  # for LoadedOp.launch: of guarded memory, in a check

    @property
    def given(self) -> dict:
        """All that is there beside the arguments, by name."""
        return {name: x for name in GIVEN if (x := getattr(self, name)) is not None}

    def placed(self, memory) -> Case:
        """Copies in guarded memory."""
        arguments, given = ({n: memory.copy(x) for n, x in xs.items()} for xs in (self.arguments, self.given))
        return replace(self, arguments=arguments, allocate=memory.allocate, **given)

    @property
    def slots(self) -> list[list[int]]:
        """Of each sequence, a slot a column; -1 for none."""
        indices = self.state_indices
        rows = indices[:, None].tolist() if indices.dim() == 1 else indices.tolist()
        return [[slot if slot >= self.null_below else -1 for slot in row] for row in rows]


@dataclass(frozen=True)
class Form:
    """What a case is drawn by."""

    gate: str
    batch: int = 1
    tokens: int = 0
    lengths: tuple[int, ...] = ()  # of a ragged batch
    heads: int = 1
    value_heads: int = 2
    state: bool = True
    d_out: bool = True
    d_final_state: bool = True
    slots: tuple = ()  # in decoding
    accepted: tuple[int, ...] = ()
    null_below: int = 0

    def __str__(self) -> str:
        shape = "+".join(map(str, self.lengths)) or f"{self.batch} x {self.tokens}"
        left_out = [f"no {n}" for n in ("state", "d_out", "d_final_state") if not getattr(self, n)]
        columns = [f"slots {self.slots}"] if self.slots else []
        words = (f"{self.gate} gates", f"{shape} tokens", f"{self.heads}/{self.value_heads} heads", *columns, *left_out)
        return ", ".join(words)


def forms(purpose: str) -> tuple[Form, ...]:
    """The cases of a purpose, the quickest first."""
    from kdagen.zoo.inputs import GATES

    if purpose == "decode":
        return (
            *(Form(gate, 4, 1, slots=(7, -1, 10, 3)) for gate in GATES),
            Form("softplus", 3, 1, heads=3, value_heads=3, slots=(0, 5, 1), null_below=1),
            Form("reset", 2, 5, slots=(1, 0)),
            Form("mild", lengths=(1, 0, 5, 2), slots=(2, 9, 4, 6)),
            Form("bounded", 3, 2, slots=((0, 1, 2), (3, -1, 4), (7, 8, 9)), accepted=(1, 3, 2)),
        )
    return (
        Form("mild", 3, 1, heads=3, value_heads=3, state=False),
        *(Form(gate, lengths=SHORT) for gate in GATES),
        Form("bounded", 2, 75, heads=2, value_heads=4, state=False, d_final_state=False),
        Form("mild", 2, 32, d_out=False),
        Form("mild", lengths=LONG, value_heads=1),
    )


class Inputs:
    """Draws cases of a task; `dtypes` are those of its arguments."""

    def __init__(self, task: Task, canonical, dtypes: dict[str, str]):
        self.task, self.canonical, self.dtypes = task, canonical, dtypes

    def draw(self, form: Form, seed: int) -> Case:
        """Tensors on the CPU."""
        import torch

        ends, task = [0, *accumulate(form.lengths)], self.task
        batch, tokens = (1, ends[-1] + PADDING) if form.lengths else (form.batch, form.tokens)
        count, training, decode = len(form.lengths) or batch, task.purpose == "training", task.purpose == "decode"
        dims = (*(task.dims[d] for d in task.state.dims),)
        normal = Normal(seed)
        states = lambda n: normal(0.1, (n, form.value_heads, *dims), task.state.dtype)  # noqa: E731
        integers = lambda values: torch.tensor(values, dtype=torch.int32) if values else None  # noqa: E731
        return Case(
            f"{form}",
            self.arguments((batch, tokens, form.heads, form.value_heads), form.gate, seed),
            form.value_heads,
            initial_state=states(count) if form.state and not decode else None,
            cu_seqlens=integers(ends) if form.lengths else None,
            d_out=normal(1.0, (batch, tokens, form.value_heads, task.dims["V"]), task.dtype)
            if training and form.d_out
            else None,
            d_final_state=states(count) if training and form.d_final_state else None,
            state_pool=states(SLOTS) if decode else None,
            state_indices=integers(form.slots),
            num_accepted_tokens=integers(form.accepted),
            null_below=form.null_below,
        )

    def arguments(self, shape: tuple[int, int, int, int], gate: str, seed: int) -> dict:
        """Those of the recurrence for (B, T, H, HV), in their dtypes."""
        from kdagen import zoo

        batch, tokens, heads, value_heads = shape
        dims = (batch, tokens, value_heads, *self.task.head_dim)
        return taken(self.canonical, zoo.sample(self.canonical, dims, gate, seed), self.dtypes, value_heads // heads)


class Normal:
    """Draws tensors; the same ones for the same seed."""

    def __init__(self, seed: int):
        import torch

        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, scale: float, shape: tuple[int, ...], dtype: str):
        import torch

        return (scale * torch.randn(shape, generator=self.generator)).to(getattr(torch, dtype))


def taken(canonical, drawn: dict, dtypes: dict[str, str], group: int = 1) -> dict:
    """Drawn arguments as an op takes them: in these dtypes, a head of keys for each `group` of value heads."""
    import torch

    keys = {a.name for a in canonical.arguments if canonical.heads(a) == "H"}
    return {
        n: (x[:, :, ::group] if n in keys else x).to(getattr(torch, dtypes[n])).contiguous() for n, x in drawn.items()
    }
