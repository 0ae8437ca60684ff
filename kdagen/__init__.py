"""kdagen: write a linear-attention recurrence as mathematics, get verified GPU kernels and a PyTorch op.

Names are imported when first used, so that `import kdagen` loads neither sympy, torch nor a compiler. The exception is
`recurrence`, which is also the name of the module it lives in: imported here, the name means the decorator everywhere.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from kdagen import errors
from kdagen.recurrence import Recurrence, load, recurrence

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "autotune").is_dir():  # a checkout: `autotune` and `templates` stand beside this package, not in it
    __path__.append(str(_here.parent))

_WHERE = {
    "compile": "kdagen.runtime.op",
    "sequence_parallel": "kdagen.runtime.sequence_parallel",
    "abs": ("kdagen.language.vocabulary", "abs_"),
    "sum": ("kdagen.language.vocabulary", "sum_"),
}
_MODULES = {
    "kdagen.language.vocabulary": (
        "exp log sqrt rsqrt sigmoid softplus logsigmoid silu tanh relu square maximum minimum clip diag eye outer dot "
        "l2norm shift"
    ),
    "kdagen.language.annotations": "Key Value Channel Scalar HeadParameter ChannelParameter ValueParameter",
}
_WHERE |= {name: "kdagen.errors" for name in vars(errors) if name.endswith("Error")}
_WHERE |= {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = ["Recurrence", "load", "recurrence", "zoo", *_WHERE]


def __getattr__(name):
    if name == "zoo":
        return importlib.import_module("kdagen.zoo")
    if name not in _WHERE:
        raise AttributeError(f"module 'kdagen' has no attribute '{name}'")
    where = _WHERE[name]
    module, attribute = where if isinstance(where, tuple) else (where, name)
    return globals().setdefault(name, getattr(importlib.import_module(module), attribute))


def __dir__():
    return sorted({*globals(), *__all__})
