"""How a call's tensors lie in memory: what kernels see of them, what a launch must make, and what it returns.

An op has sequences [B, T, ..]; kernels see all tokens in a row [T, ..], and the first token of each sequence in
cu_seqlens (kdagen.codegen.source lists their symbols). All sizes follow from shapes, none from a value on the GPU.
Who launches is kdagen.runtime.loader.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass

from kdagen.errors import ArgumentError, ArtefactError
from kdagen.runtime.capacities import NEVER, PADDED, ZERO, capacities

# Roles of the tensors that a launch makes itself; those of capacities.ZERO are made where none is given.
ALLOCATED = ("workspace", "out", "final_state", "states", "gradient", "partial_gradient", "d_initial_state")
DEFAULTS = {"every": NEVER, "null_below": 0}  # integers: no state is wanted; negative indices alone are null
INT32 = (-(2**31), 2**31 - 1)
ALIGNED = 4  # integers in 16 bytes, the alignment that kernels rely on
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(size: int | str, dims: dict[str, int]) -> int:
    """A size of a plan, such as 64, "T" or "NC*H", in numbers."""

    def value(node) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return dims[name]
            case ast.BinOp(left, op, right):
                return _OPERATORS[type(op)](value(left), value(right))
        raise ArtefactError(f"cannot read the size '{size}' of a launch plan: expected names, integers, +, -, * and //")

    if isinstance(size, int) or size in dims:
        return size if isinstance(size, int) else dims[size]
    return value(ast.parse(size, mode="eval").body)


def sized(shape, dims: dict[str, int]) -> tuple[int, ...]:
    """A shape of a plan in numbers."""
    return tuple(evaluate(size, dims) for size in shape)


def per_token(spec: dict) -> bool:
    """Whether a tensor has an entry for each token."""
    return spec["shape"][:1] in (["T"], ("T",))


def as_called(spec: dict) -> tuple:
    """The shape that the op's caller knows."""
    return ("B", "T", *spec["shape"][1:]) if per_token(spec) else tuple(spec["shape"])


def formula(spec: dict) -> str:
    """That shape, for people: "[B, T, H, 128]"."""
    return f"[{', '.join(map(str, as_called(spec)))}]"


def dims_of(plan: dict, tensors: dict, every: int = 0) -> dict[str, int]:
    """The values of the symbols in a plan's shapes, for a call; also B and "tokens", those of each sequence."""
    dims = dict(plan["dims"])
    for spec in plan["tensors"].values():
        if spec["role"] == "argument":
            dims = {**_bound(spec, tensors[spec["name"]].shape), **dims}
    if dims.get("HV", 0) % (dims.get("H") or 1):
        raise ArgumentError(
            f"{plan['name']}: {dims['HV']} value heads are no multiple of {dims['H']} key heads: "
            f"expected HV = n H, for any n"
        )
    total = dims["B"] * dims["tokens"]
    sequences = tensors["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in tensors else dims["B"]
    chunk = plan["chunk_size"] or 1  # decoding has none
    return dims | _pool_dims(tensors) | capacities(total, sequences, chunk, plan["schedule"], every * chunk)


def _bound(spec: dict, shape) -> dict[str, int]:
    """What an argument's shape says of the symbols in it."""
    written = ("B", "tokens", *spec["shape"][1:]) if per_token(spec) else spec["shape"]
    if len(shape) != len(written):
        raise ArgumentError(f"{spec['name']} has {len(shape)} dimensions, expected {formula(spec)}")
    return {symbol: n for symbol, n in zip(written, shape) if isinstance(symbol, str)}


def _pool_dims(tensors: dict) -> dict[str, int]:
    if "state_pool" not in tensors:
        return {}
    indices = tensors.get("state_indices")
    columns = indices.shape[1] if indices is not None and len(indices.shape) == 2 else 1
    return {"S": tensors["state_pool"].shape[0], "W": columns}


@dataclass(frozen=True)
class Made:
    """A tensor that a launch makes, as kernels see it, and whether it is zero at first."""

    shape: tuple[int, ...]
    dtype: str
    zero: bool
    returned: str = ""  # how its shape becomes the op's: "tokens", "groups" (then "tokens"), "states", or not at all


@dataclass(frozen=True)
class Layout:
    """The sizes of a call, and what a pass makes for it."""

    dims: dict[str, int]
    made: dict[str, Made]
    tokens_a_state: int

    @property
    def empty(self) -> bool:
        """Whether no token belongs to any sequence."""
        return not (self.dims["T"] and self.dims["N"])

    def returned(self, name: str, tensor):
        """A result at the op's shape: [B, T, ..]; a key's gradient is the sum over the value heads of its group."""
        how, dims = self.made[name].returned, self.dims
        if how == "states":
            return self._states(tensor)
        if how == "groups":
            tensor = tensor.unflatten(1, (dims["H"], dims["HV"] // dims["H"])).sum(2)
        return tensor.unflatten(0, (dims["B"], dims["tokens"])) if how else tensor

    def _states(self, tensor):
        """[B, states of a sequence, ..]: those of a sequence follow slot tokens * s // tokens_a_state."""
        import torch

        batch, tokens, every = self.dims["B"], self.dims["tokens"], self.tokens_a_state
        count = tokens // every if every else 0
        if batch * count == self.dims["NS"]:
            return tensor.unflatten(0, (batch, count))
        first = torch.arange(batch, device=tensor.device) * tokens // every
        return tensor[first[:, None] + torch.arange(count, device=tensor.device)]


def layout(plan: dict, names: list[str], tensors: dict, every: int) -> Layout:
    """The layout of a call of a pass that takes these tensors of a plan."""
    dims, specs = dims_of(plan, tensors, every), [plan["tensors"][name] for name in names]
    zero = (*ZERO, *(PADDED if "cu_seqlens" in tensors else ()))
    made = {
        spec["name"]: Made(
            sized(spec["shape"], dims), spec["dtype"], spec["role"] in zero, _returned(spec, plan["tensors"], dims)
        )
        for spec in specs
        if spec["role"] in (*ALLOCATED, *ZERO)
    }
    return Layout(dims, made, every * plan["chunk_size"])


def _returned(spec: dict, specs: dict, dims: dict[str, int]) -> str:
    if spec["role"] == "states":
        return "states"
    if spec["role"] not in ("out", "gradient"):
        return ""
    grouped = spec.get("of") and "H" in specs[spec["of"]]["shape"] and dims["HV"] != dims["H"]
    return "groups" if grouped else "tokens"


def packed(plan: dict, names: list[str], tensors: dict, dims: dict[str, int], scalars: dict) -> dict:
    """What the kernels of a pass take, by name: these tensors as kernels see them, and integers."""
    memory = {}
    for name in names:
        spec = plan["tensors"][name]
        match spec["role"]:
            case "scalar":
                memory[name] = scalars.get(name) or DEFAULTS[name]
            case "cu_seqlens" | "state_indices" | "num_accepted_tokens" as role:
                memory[name] = _integers(role, tensors, dims)
            case "new_state_pool":
                memory[name] = tensors.get(name, tensors["state_pool"])
            case _:
                x = tensors[name]
                memory[name] = x.flatten(0, 1) if per_token(spec) and x.dim() > len(spec["shape"]) else x
    return memory


def _integers(name: str, tensors: dict, dims: dict[str, int]):
    """int32 and aligned, on the arguments' device, without a look at any value; what is not given is as by default."""
    import torch

    device = next(iter(tensors.values())).device
    if (given := tensors.get(name)) is None:
        n, tokens, int32 = dims["N"], dims["tokens"], {"dtype": torch.int32, "device": device}
        if name == "cu_seqlens":
            return torch.arange(0, n * tokens + 1, tokens, **int32)
        return torch.ones(n, **int32) if name == "num_accepted_tokens" else torch.arange(n, **int32)[:, None]
    if given.dtype != torch.int32:  # values that do not fit stay as far out of range as can be
        given = given.clamp(*INT32).to(torch.int32)
    given = given.contiguous()
    given = given if given.storage_offset() % ALIGNED == 0 else given.clone()
    return given[:, None] if name == "state_indices" and given.dim() == 1 else given
