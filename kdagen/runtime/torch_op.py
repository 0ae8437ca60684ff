"""Registers an op with torch: torch.ops.kdagen.<name>, with a fake implementation and an error for its backward.

The schema is flat: every tensor of the signature, then initial_state and output_final_state. Defined through
torch.library.Library rather than custom_op, which costs a third more at every call.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
import threading
from functools import cache

from kdagen.errors import GradientError
from kdagen.runtime.signature import Signature

NAMESPACE = "kdagen"
OPTIONS = "Tensor? initial_state=None, bool output_final_state=False"
_lock = threading.Lock()
_names: dict[str, str] = {}  # identity by name, of every op that is registered


@cache
def _library():
    import torch

    return torch.library.Library(NAMESPACE, "FRAGMENT")


def identity(*parts) -> str:
    """A hash of all that tells one op from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def register(signature: Signature, identity: str, cpu, cuda, fake):
    """The torch op of this identity, registered if it is new. The first op of a name has it; others get a suffix."""
    import torch

    with _lock:
        name = _free_name(signature.name, identity)
        if name not in _names:
            _define(name, signature, cpu, cuda, fake)
            _names[name] = identity
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _free_name(name: str, identity: str) -> str:
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    if plain[0].isdigit() or keyword.iskeyword(plain) or plain in ("name", "default"):
        plain = f"op_{plain}"
    return plain if _names.get(plain, identity) == identity else f"{plain}_{identity[:8]}"


def _define(name: str, signature: Signature, cpu, cuda, fake) -> None:
    import torch

    library, full = _library(), f"{NAMESPACE}::{name}"
    tensors = ", ".join(f"Tensor {_schema_name(i, t)}" for i, t in enumerate(signature.tensors))
    library.define(f"{name}({tensors}, {OPTIONS}) -> (Tensor, Tensor)")
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")
    torch.library.register_fake(full, fake, lib=library)
    torch.library.register_autograd(full, _no_backward(signature.name), lib=library)


def _schema_name(position: int, name: str) -> str:
    """A name that torch's schema language takes: the user's own, unless it is not plain ASCII or means something."""
    plain = re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII) and not keyword.iskeyword(name)
    return name if plain and name not in ("Tensor", "int", "float", "bool", "str", "out", "self") else f"t{position}"


def _no_backward(name: str):
    def backward(ctx, *gradients):
        raise GradientError(
            f"{name} has no backward: this version of kdagen derives forward kernels only. Call it under "
            f"torch.no_grad() or on detached tensors; to train, write the recurrence in torch for now"
        )

    return backward
