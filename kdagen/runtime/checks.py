"""Checks of what an op is given, before anything runs: shapes, dtypes, layouts, devices. Every message names the fix.

They run inside the torch op, so under torch.compile too, on symbolic shapes. Names and numbers of arguments are matched
in kdagen.runtime.signature; what tensors hold is checked in kdagen.runtime.values, and what particular built kernels
take in kdagen.runtime.loader.
"""

from __future__ import annotations

from kdagen.errors import ArgumentError
from kdagen.runtime.signature import Signature, brackets
from kdagen.state import LAYOUTS, StateType

STATES = ("initial_state", "d_final_state", "state_pool")
INTEGERS = ("cu_seqlens", "state_indices", "num_accepted_tokens")


def check(signature: Signature, tensors: dict, state: StateType, **others) -> dict:
    """The sizes B, T, H, HV, K, V and N (of sequences) of legal arguments; an ArgumentError for others.

    `others` may hold initial_state and cu_seqlens; of a backward d_out and d_final_state; in decoding state_pool (then
    also the size S), state_indices (W) and num_accepted_tokens. None stands for none.
    """
    others = {name: x for name, x in others.items() if x is not None}
    sizes = check_shapes(signature, tensors, state, others)
    check_dtypes(signature, tensors, state, others)
    device = tensors[signature.value].device
    for name, tensor in (tensors | others).items():
        if tensor.device != device:
            raise ArgumentError(
                f"{signature.name}: {name} is on {tensor.device}, {signature.value} on {device}; "
                f"expected one device: call {name}.to('{device}')"
            )
    if "state_pool" in others:
        check_pool(signature.name, others["state_pool"])
    return sizes


def check_shapes(signature: Signature, tensors: dict, state: StateType, others: dict) -> dict:
    """Sizes by dimension; each is set by the first tensor that has it."""
    shapes = Shapes(signature.name)
    for name, dims in signature.dims.items():
        shapes.bind(name, dims, tensors[name].shape)
    sizes = shapes.finish()
    shapes.sequences(others.get("cu_seqlens"))
    for name, tensor in others.items():
        if name != "cu_seqlens":
            if name in STATES:
                shapes.check_layout(name, tensor.shape, state)
            shapes.bind(name, _dims(name, tensor, state), tensor.shape)
    if "state_pool" in others:
        shapes.check_slots("state_indices" in others, "cu_seqlens" in others)
    return sizes


def _dims(name: str, tensor, state: StateType) -> tuple[str, ...]:
    if name in STATES:
        return ("S" if name == "state_pool" else "N", "HV", *state.dims)
    if name == "state_indices":
        return ("N", "W") if tensor.dim() == 2 else ("N",)
    return ("N",) if name == "num_accepted_tokens" else ("B", "T", "HV", "V")


class Shapes:
    """Sizes by dimension, and which argument each of them was read from."""

    def __init__(self, op: str):
        self.op, self.sizes, self.setters = op, {}, {}

    def bind(self, name: str, dims: tuple, shape) -> None:
        if len(shape) != len(dims):
            raise ArgumentError(
                f"{self.op}: {name} has shape {list(shape)} of {len(shape)} dimensions, "
                f"expected {len(dims)}, {brackets(dims)}"
            )
        for dim, size in zip(dims, shape):
            if self.sizes.setdefault(dim, size) != size:
                raise ArgumentError(self.conflict(name, dims, shape))
            self.setters.setdefault(dim, name)

    def conflict(self, name: str, dims: tuple, shape) -> str:
        sizes = self.sizes
        expected = [sizes.get(d, n) for d, n in zip(dims, shape)]
        wrong = [(i, d) for i, (d, n) in enumerate(zip(dims, shape)) if sizes.get(d, n) != n]
        because = ", ".join(f"{d} = {sizes[d]} is set by {self.setters[d]}" for _, d in wrong)
        text = f"{self.op}: {name} has shape {list(shape)}, expected {brackets(dims)} = {expected}: {because}"
        (axis, dim), size = wrong[0], shape[wrong[0][0]]
        if len(wrong) == 1 and dim in ("H", "HV") and name not in STATES and name != "d_out":
            few, many, which = (size, sizes[dim], name) if size < sizes[dim] else (sizes[dim], size, self.setters[dim])
            if few > 0 and many % few == 0:
                text += f". For grouped heads pass {which}.repeat_interleave({many // few}, dim={axis})"
        return text

    def finish(self) -> dict:
        """The arguments are done: there are as many heads of values as of keys, or so many times more."""
        sizes = self.sizes
        sizes |= {"H": sizes.get("H", sizes.get("HV")), "HV": sizes.get("HV", sizes.get("H"))}
        sizes |= {"K": sizes.get("K", 1), "V": sizes.get("V", 1)}
        h, hv = sizes["H"], sizes["HV"]
        if h != hv and (h == 0 or hv % h):
            raise ArgumentError(
                f"{self.op}: {self.setters['HV']} has {hv} heads, {self.setters['H']} has {h}: expected the number of "
                f"value heads (HV) to be a multiple of that of key heads (H), each of which serves HV // H of them"
            )
        return sizes

    def sequences(self, cu_seqlens) -> None:
        """N sequences: the batch, or those of which cu_seqlens holds the ends."""
        if cu_seqlens is None:
            self.sizes["N"], self.setters["N"] = self.sizes["B"], f"{self.setters['B']} (N = B without cu_seqlens)"
            return
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ArgumentError(
                f"{self.op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected [N + 1]: 0, then where each of "
                f"N sequences ends"
            )
        if self.sizes["B"] != 1:
            raise ArgumentError(
                f"{self.op}: B = {self.sizes['B']} beside cu_seqlens, expected B = 1: put all sequences behind each "
                f"other, such as {self.setters['B']}.flatten(0, 1).unsqueeze(0)"
            )
        self.sizes["N"], self.setters["N"] = cu_seqlens.shape[0] - 1, "cu_seqlens (of N + 1 numbers)"

    def check_layout(self, name: str, shape, state: StateType) -> None:
        """Refuses a state of the other layout, where its shape tells."""
        k, v = self.sizes["K"], self.sizes["V"]
        right, turned = ((k, v), (v, k)) if state.layout == "KV" else ((v, k), (k, v))
        if k != v and len(shape) == 4 and tuple(shape[2:]) == turned:
            raise ArgumentError(
                f"{self.op}: {name} has shape {list(shape)}, which is a state of layout "
                f"{'VK' if state.layout == 'KV' else 'KV'}; expected [.., {', '.join(state.dims)}] = "
                f"[.., {right[0]}, {right[1]}]: {other_layout(name, state)}"
            )

    def check_slots(self, indexed: bool, ragged: bool) -> None:
        """Each sequence has a slot of the pool; a speculative one no more tokens than slots."""
        sizes = self.sizes
        if sizes.get("W") == 0:
            raise ArgumentError(
                f"{self.op}: state_indices has shape [{sizes['N']}, 0], expected [N, W], W columns of at least one slot"
            )
        if not indexed and sizes["N"] > sizes["S"]:
            raise ArgumentError(
                f"{self.op}: state_pool has {sizes['S']} slots for {sizes['N']} sequences, expected at least as many, "
                f"or state_indices [N] that say which slot is whose"
            )
        if not ragged and sizes.get("W", 1) > 1 and sizes["T"] > sizes["W"]:
            raise ArgumentError(
                f"{self.op}: {sizes['T']} tokens a sequence and state_indices of {sizes['W']} columns, expected one "
                f"column for each token: the state after token t goes to the slot in column t"
            )


def other_layout(name: str, state: StateType) -> str:
    """What to do with a state of the other layout."""
    other = next(layout for layout in LAYOUTS if layout != state.layout)
    return f"pass {name}.mT.contiguous(), or compile with state_layout='{other}'"


def check_tag(op: str, name: str, tensor, state: StateType) -> None:
    """Refuses a state that an op of the other layout returned, whatever its shape."""
    if getattr(tensor, "kdagen_layout", state.layout) != state.layout:
        raise ArgumentError(
            f"{op}: {name} was returned by an op of state_layout='{tensor.kdagen_layout}', this one has "
            f"'{state.layout}': {other_layout(name, state)}"
        )


def check_pool(op: str, pool) -> None:
    """A pool is updated in place, by kernels that read contiguous tensors."""
    if not pool.is_contiguous():
        raise ArgumentError(
            f"{op}: state_pool has strides {list(pool.stride())}, expected a contiguous tensor, for it is updated in "
            f"place: keep one such tensor, and say which slots to use by state_indices"
        )


def check_dtypes(signature: Signature, tensors: dict, state: StateType, others: dict) -> None:
    """One floating dtype for all; beside half floats, arguments may also be float32."""
    import torch

    wide = (torch.float32, torch.float64)
    dtype = tensors[signature.value].dtype
    if dtype not in (torch.bfloat16, torch.float16, *wide):
        raise ArgumentError(
            f"{signature.name}: {signature.value} is {short(dtype)}, expected bfloat16, float16, float32 or float64: "
            f"call {signature.value}.float()"
        )
    allowed = (dtype,) if dtype in wide else (dtype, torch.float32)
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise ArgumentError(
                f"{signature.name}: {name} is {short(tensor.dtype)} beside {signature.value} in {short(dtype)}, "
                f"expected {' or '.join(map(short, allowed))}: call {name}.to({dtype})"
            )
    for name, tensor in others.items():
        expected = (dtype,)
        if name in STATES:
            expected = (state_dtype(dtype, state),)
        elif name in INTEGERS:
            expected = (torch.int32, torch.int64)
        if tensor.dtype not in expected:
            raise ArgumentError(
                f"{signature.name}: {name} is {short(tensor.dtype)}, expected {' or '.join(map(short, expected))}: "
                f"call {name}.to({expected[0]})"
            )


def state_dtype(dtype, state: StateType):
    """That of states beside arguments of a dtype: float64 beside float64, unless the op's is bfloat16."""
    import torch

    if state.dtype == "bfloat16":
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)


def short(dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
