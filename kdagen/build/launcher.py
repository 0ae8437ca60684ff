"""Generates the C host launcher of one lowered kernel: launcher.c.j2 filled in. What launchers share is launcher.h."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdagen.errors import ToolchainError
from kdagen.target import Target

TEMPLATE = Path(__file__).with_name("launcher.c.j2")


def launcher_source(name: str, lowered, target: Target, cubin: str, labels: Sequence[str] = ()) -> str:
    """C text that exports `name` through tvm-ffi and embeds the file `cubin`.

    `lowered` is an adapter.Lowered; `labels` are the names of its arguments for people, where they differ.
    """
    import jinja2

    template = jinja2.Template(
        TEMPLATE.read_text(), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return template.render(
        name=name,
        lowered=lowered,
        target=target,
        cubin=cubin,
        tensors=lowered.tensors,
        label=dict(zip((a.name for a in lowered.arguments), labels or (a.name for a in lowered.arguments))),
        bindings=_bindings(name, lowered),
        capabilities=[int(c.replace(".", "")) for c in target.runs_on],
        descriptors={d.name: d for d in lowered.descriptors},
    )


def _bindings(name: str, lowered) -> dict[str, dict]:
    """For each dynamic dimension, the first tensor dimension that is just that symbol."""
    found = {}
    for tensor in lowered.tensors:
        for dim, size in enumerate(tensor.shape):
            found.setdefault(size, {"tensor": tensor.name, "dim": dim})
    given = {a.name for a in lowered.arguments}
    scalars = [p.name for p in lowered.parameters if p.kind == "scalar" and p.name not in given]
    symbols = dict.fromkeys([*lowered.symbols, *scalars])
    if unbound := [s for s in symbols if s not in found]:
        raise ToolchainError(
            f"{name}: no tensor has a dimension that is just {', '.join(unbound)}, so the launcher cannot know it: "
            f"pass a tensor of such a shape to the kernel"
        )
    return {symbol: found[symbol] for symbol in symbols}
