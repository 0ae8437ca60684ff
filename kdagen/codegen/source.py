"""What code generation hands to the build: TileLang modules and how to launch them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from kdagen.state import DEFAULT, StateType

GRADIENTS = ("gradient", "partial_gradient")  # roles


@dataclass(frozen=True)
class TensorSpec:
    """A global tensor of a kernel, or (role "scalar", shape ()) an int32 passed by value.

    Kernels see all tokens in a row, whatever sequences they belong to: an argument [B, T, H, K] of the op has shape
    ("T", "H", K) here. `shape` holds ints and these symbols:

    T, N, N1     tokens of all sequences together; sequences; N + 1
    H, HV        heads of keys; of values, a multiple of H
    NC           slots of chunks: T // chunk_size + N. Sequence s has those from cu_seqlens[s] // chunk_size + s on
    NG           slots of segments, in training: T // (chunk_size * segment) + N, likewise; of a schedule that splits
                 sequences: T // (chunk_size * split) + N
    NS           slots of states that are returned: T // states_every, 0 where none are asked for
    S, W         slots of a state pool; columns of its indices
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str  # "bfloat16", "float16", "float32", "int32"
    # Given: "argument", "initial_state", "cu_seqlens" [N1], "scalar"; in training also "d_out", "d_final_state"; in
    # decoding "state_pool", "state_indices" [N, W], "num_accepted_tokens" [N].
    # Made: "workspace", "out", "final_state", "states"; in training also "d_initial_state", "gradient" (of the argument
    # of that name, but with HV heads), "partial_gradient" (a chunk's, to be summed); in decoding "new_state_pool".
    role: str

    @property
    def of(self) -> str:
        """The argument that this is the gradient of, or a part of it: d_q_out is q's."""
        return self.name.removeprefix("d_").removesuffix("_out") if self.role in GRADIENTS else ""


@dataclass(frozen=True)
class KernelSource:
    """A generated TileLang module: its function `name` returns the PrimFunc, which takes `params` in order."""

    name: str  # "kda_prepare"; also the entry's name
    # "index", "prepare", "scan", "output" or "decode"; also those of kdagen.lower.split and of kdagen.lower.training
    family: str
    text: str
    params: tuple[TensorSpec, ...]
    threads: int
    shared_bytes: int  # as the tile IR counts it; the lowered program's figure is the exact one
    bytes_a_token: float = 0.0  # modelled traffic a token and head, states left out; in decoding with them, at T = 1
    flops_a_token: float = 0.0  # of matrix products, a token and head


@dataclass(frozen=True)
class OpSource:
    """The kernels of one op, in launch order, and all that a runtime without a compiler must know.

    In training, `kernels` holds each kernel once, and `passes` says which of them the forward and the backward run; in
    decoding the only pass is "decode".
    """

    name: str  # op name, "kda"
    kernels: tuple[KernelSource, ...]
    chunk_size: int
    dims: dict  # {"K": 128, "V": 128}
    dtype: str
    schedule: dict
    target: str
    arguments: tuple[str, ...] = ()  # names in the order in which the op takes them; those of `kernels` if empty
    recurrence: dict | None = None  # what it computes, as kdagen.runtime.signature.describe writes it
    passes: dict | None = None  # names of the kernels of "forward" and "backward", or of "decode", in launch order
    kept: tuple[str, ...] = ()  # in training: the workspaces that the forward leaves for the backward
    state: StateType = DEFAULT  # how states are given and returned
    tuned: tuple[dict, ...] = ()  # lines of tables that chose this schedule: no part of the plan
    beside: bool = False  # whether its folder stands beside that of the default schedule

    @property
    def training(self) -> bool:
        """Whether these are the kernels of a forward that a backward follows, and that backward's."""
        return "backward" in (self.passes or {})

    def kernels_of(self, which: str) -> tuple[KernelSource, ...]:
        """The kernels of the "forward", the "backward" or the "decode", in launch order."""
        if self.passes is None:
            return self.kernels if which == "forward" else ()
        named = {k.name: k for k in self.kernels}
        return tuple(named[name] for name in self.passes[which])

    def plan(self) -> dict:
        """JSON-able launch plan: tensors once each, kernels with their parameter names."""
        specs = {p.name: p for k in self.kernels for p in k.params}
        tensors = {n: dataclasses.asdict(p) | ({"of": p.of} if p.of else {}) for n, p in specs.items()}
        arguments = self.arguments or [t["name"] for t in tensors.values() if t["role"] == "argument"]
        kernels = [
            {
                "name": k.name,
                "params": [p.name for p in k.params],
                "bytes_a_token": k.bytes_a_token,
                "flops_a_token": k.flops_a_token,
            }
            for k in self.kernels
        ]
        return json.loads(
            json.dumps(
                {
                    "name": self.name,
                    "chunk_size": self.chunk_size,
                    "dims": self.dims,
                    "dtype": self.dtype,
                    "schedule": self.schedule,
                    "target": self.target,
                    "arguments": arguments,
                    "recurrence": self.recurrence,
                    "passes": self.passes or {"forward": [k.name for k in self.kernels]},
                    "kept": self.kept,
                    "state": dataclasses.asdict(self.state),
                    "tensors": tensors,
                    "kernels": kernels,
                }
            )
        )
