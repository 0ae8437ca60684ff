"""Checks of what an op is given, before anything runs: shapes, dtypes, devices. Every message names the fix.

They run inside the torch op, so under torch.compile too, on symbolic shapes. Names and numbers of arguments are matched
in kdagen.runtime.signature; what particular built kernels take is checked in kdagen.runtime.loader.
"""

from __future__ import annotations

from kdagen.errors import ArgumentError
from kdagen.runtime.signature import Signature, brackets

STATE = ("B", "H", "K", "V")
OTHERS = {"initial_state": STATE, "d_out": ("B", "T", "H", "V"), "d_final_state": STATE}


def check(signature: Signature, tensors: dict, **others) -> dict:
    """The sizes B, T, H, K and V of legal arguments; an ArgumentError for others.

    `others` may hold initial_state and, of a backward, d_out and d_final_state; None stands for none.
    """
    others = {name: x for name, x in others.items() if x is not None}
    sizes = check_shapes(signature, tensors, others)
    check_dtypes(signature, tensors, others)
    device = tensors[signature.value].device
    for name, tensor in (tensors | others).items():
        if tensor.device != device:
            raise ArgumentError(
                f"{signature.name}: {name} is on {tensor.device}, {signature.value} on {device}; "
                f"expected one device: call {name}.to('{device}')"
            )
    return sizes


def check_shapes(signature: Signature, tensors: dict, others: dict) -> dict:
    """Sizes by dimension; each is set by the first tensor that has it."""
    sizes, setters = {}, {}
    for name, dims in signature.dims.items():
        _bind(signature, name, dims, tensors[name].shape, sizes, setters)
    for name, tensor in others.items():
        _bind(signature, name, OTHERS[name], tensor.shape, sizes, setters)
    return sizes


def _bind(signature: Signature, name: str, dims: tuple, shape, sizes: dict, setters: dict) -> None:
    if len(shape) != len(dims):
        raise ArgumentError(
            f"{signature.name}: {name} has shape {list(shape)} of {len(shape)} dimensions, "
            f"expected {len(dims)}, {brackets(dims)}"
        )
    for dim, size in zip(dims, shape):
        if sizes.setdefault(dim, size) != size:
            raise ArgumentError(_conflict(signature.name, name, dims, shape, sizes, setters))
        setters.setdefault(dim, name)


def _conflict(op: str, name: str, dims: tuple, shape, sizes: dict, setters: dict) -> str:
    expected = [sizes.get(d, n) for d, n in zip(dims, shape)]
    wrong = [(i, d) for i, (d, n) in enumerate(zip(dims, shape)) if sizes.get(d, n) != n]
    because = ", ".join(f"{d} = {sizes[d]} is set by {setters[d]}" for _, d in wrong)
    text = f"{op}: {name} has shape {list(shape)}, expected {brackets(dims)} = {expected}: {because}"
    (axis, dim), size = wrong[0], shape[wrong[0][0]]
    if len(wrong) == 1 and dim == "H" and name not in OTHERS and min(size, sizes["H"]) > 0:
        few, many, which = (size, sizes["H"], name) if size < sizes["H"] else (sizes["H"], size, setters["H"])
        if many % few == 0:
            text += f". For grouped heads pass {which}.repeat_interleave({many // few}, dim={axis})"
    return text


def check_dtypes(signature: Signature, tensors: dict, others: dict) -> None:
    """One floating dtype for all; beside half floats, arguments may also be float32."""
    import torch

    wide = {torch.float32: torch.float32, torch.float64: torch.float64}
    state_dtype = {torch.bfloat16: torch.float32, torch.float16: torch.float32, **wide}
    dtype = tensors[signature.value].dtype
    if dtype not in state_dtype:
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
        expected = state_dtype[dtype] if OTHERS[name] == STATE else dtype
        if tensor.dtype != expected:
            raise ArgumentError(
                f"{signature.name}: {name} is {short(tensor.dtype)}, expected {short(expected)}: "
                f"call {name}.to({expected})"
            )


def short(dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
