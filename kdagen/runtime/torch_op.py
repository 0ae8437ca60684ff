"""Registers an op with torch: torch.ops.kdagen.<name>, and the same with _training, _backward, _recurrent, _decode.

Schemas are flat: every tensor of the signature, then options. Defined through torch.library.Library rather than
custom_op, which costs a third more at every call.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from kdagen.runtime.signature import Signature

NAMESPACE = "kdagen"
# What follows an op's tensors; the names of options are those of the call.
OPTIONS = {
    "": "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None, int states_every=0, "
    "bool check=False",
    "_training": "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None, bool check=False",
    "_backward": "Tensor? initial_state, Tensor? cu_seqlens, Tensor[] kept, Tensor? d_out, Tensor? d_final_state",
    "_recurrent": "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None, "
    "bool check=False",
    "_decode": "Tensor(a!) state_pool, Tensor? state_indices=None, Tensor? num_accepted_tokens=None, "
    "Tensor? cu_seqlens=None, int null_below=0, bool check=False",
}
RESULTS = {
    "": "(Tensor, Tensor, Tensor)",
    "_training": "(Tensor, Tensor, Tensor[])",
    "_recurrent": "(Tensor, Tensor)",
    "_decode": "Tensor",
}
NAMES = {
    suffix: tuple(option.split()[1].partition("=")[0] for option in text.split(", "))
    for suffix, text in OPTIONS.items()
}  # of the options
RESERVED = {"Tensor", "int", "float", "bool", "str", "out", "self", *(n for names in NAMES.values() for n in names)}
_lock = threading.Lock()
_names: dict[str, str] = {}  # identity by name, of every torch op that is registered


class Implementation(NamedTuple):
    """What torch calls for one of an op's torch ops."""

    cpu: Callable
    cuda: Callable
    fake: Callable
    backward: Callable | None = None  # None: it changes an argument, and has no derivative
    setup_context: Callable | None = None


@cache
def _library():
    import torch

    return torch.library.Library(NAMESPACE, "FRAGMENT")


def identity(*parts) -> str:
    """A hash of all that tells one op from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def register(signature: Signature, identity: str, implementations: dict[str, Implementation]) -> list:
    """The torch ops of this identity, one for each suffix of `implementations`, registered if they are new.

    The first op of a name has it; others get a suffix of their own.
    """
    import torch

    tensors = ", ".join(f"Tensor {_schema_name(i, t)}" for i, t in enumerate(signature.tensors))
    gradients = f"({', '.join(['Tensor'] * (len(signature.tensors) + 1))})"
    with _lock:
        names = _free_names(signature.name, identity)
        for name, (suffix, implementation) in zip(names, implementations.items(), strict=True):
            if name not in _names:
                schema = f"({tensors}, {OPTIONS[suffix]}) -> {RESULTS.get(suffix, gradients)}"
                _define(name, schema, implementation)
                _names[name] = identity
    return [getattr(getattr(torch.ops, NAMESPACE), name).default for name in names]


def _free_names(name: str, identity: str) -> list[str]:
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    if plain[0].isdigit() or keyword.iskeyword(plain) or plain in ("name", "default"):
        plain = f"op_{plain}"
    names = [plain + suffix for suffix in OPTIONS]
    if any(_names.get(n, identity) != identity for n in names):
        names = [f"{plain}_{identity[:8]}{suffix}" for suffix in OPTIONS]
    return names


def _define(name: str, schema: str, implementation: Implementation) -> None:
    import torch

    library, full = _library(), f"{NAMESPACE}::{name}"
    library.define(name + schema)
    library.impl(name, implementation.cpu, "CPU")
    library.impl(name, implementation.cuda, "CUDA")
    torch.library.register_fake(full, implementation.fake, lib=library)
    if implementation.backward:
        torch.library.register_autograd(
            full, implementation.backward, setup_context=implementation.setup_context, lib=library
        )
    torch.library.register_vmap(full, partial(_one_by_one, name), lib=library)


def _one_by_one(name: str, info, in_dims: tuple, *given):
    """vmap, as a call for each entry of the mapped dimension: the batch B of one call does the same faster."""
    import torch
    from torch.utils._pytree import tree_map

    op = getattr(getattr(torch.ops, NAMESPACE), name)
    calls = [
        op(*tree_map(lambda x, dim: x if dim is None else x.select(dim, i), given, in_dims))  # noqa: B023
        for i in range(info.batch_size)
    ]
    stacked = tree_map(lambda *entries: torch.stack(entries), *calls)
    return stacked, tree_map(lambda _: 0, stacked)


def _schema_name(position: int, name: str) -> str:
    """A name that torch's schema language takes: the user's own, unless it is not plain ASCII or means something."""
    plain = re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII) and not keyword.iskeyword(name)
    return name if plain and name not in RESERVED else f"t{position}"
