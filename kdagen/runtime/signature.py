"""What an op takes: its parameters as they are written, the tensors behind them, and the dimensions of these.

A parameter is one tensor, or (kg.Key[n]) a sequence of n. Plain data, also read from a build's manifest: nothing here
needs sympy, and torch only once tensors are given. Shapes and dtypes are checked in kdagen.runtime.checks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from kdagen.errors import ArgumentError, RecurrenceError
from kdagen.runtime import manifest as manifests

CALL = ("initial_state", "output_final_state", "cu_seqlens", "states_every", "check")  # beside its own arguments
DECODE = ("state_pool", "state_indices", "num_accepted_tokens", "cu_seqlens", "null_below", "check")
RECURRENT = ("initial_state", "output_final_state", "cu_seqlens", "check")
OPTIONS = tuple(dict.fromkeys(CALL + DECODE))  # what no argument of a recurrence may be called


@dataclass(frozen=True)
class Signature:
    """An op's name, its parameters (name, tensors) and the dimensions of each tensor, such as ("B", "T", "H", "K").

    H is the number of heads of keys, HV that of all else. Of the tensors `gates` may hold -inf.
    """

    name: str
    parameters: tuple[tuple[str, tuple[str, ...]], ...]
    dims: dict[str, tuple[str, ...]]
    gates: frozenset[str] = frozenset()
    recurrence: str = ""  # what it computes, whatever it is called: recurrence_hash

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors, in order."""
        return tuple(self.dims)

    @cached_property
    def gating(self) -> tuple[str, ...]:
        """The tensors that only gate or scale: GPU kernels take them in gate_dtype."""
        return tuple(n for n, dims in self.dims.items() if dims[0] == "B" and (len(dims) == 3 or n in self.gates))

    @cached_property
    def value(self) -> str:
        """The tensor whose dtype is the output's: v, or the first with value channels, or the first."""
        values = [name for name, dims in self.dims.items() if dims == ("B", "T", "HV", "V")]
        return "v" if "v" in values else next(iter(values), self.tensors[0])

    def bind(self, args: tuple, named: dict, options: tuple[str, ...] = CALL) -> list:
        """The tensors in order, from arguments by place or by name; a sequence's may also be named k_1, k_2 ..

        `options` are those that the call takes, for its error messages.
        """
        given = dict(zip((name for name, _ in self.parameters), args))
        if len(args) > len(self.parameters) or given.keys() & named.keys():
            raise self._misfit(given, named, args, options)
        given.update(named)
        flat: dict = {}
        for name, tensors in self.parameters:
            if name in given and tensors != (name,):
                flat.update(zip(tensors, self._sequence(name, tensors, given.pop(name))))
            flat.update((t, given.pop(t)) for t in tensors if t in given)
        if given or len(flat) < len(self.dims):
            raise self._misfit(flat, given, args, options)
        for name in self.tensors:
            self.check_tensor(name, flat[name])
        return [flat[name] for name in self.tensors]

    def _sequence(self, name: str, tensors: tuple[str, ...], value):
        """The n tensors of a sequence: a list, or one tensor stacked on the dimension before the heads."""
        dims = self.dims[tensors[0]]
        axis = next(i for i, dim in enumerate(dims) if dim in ("H", "HV"))
        stacked = [*dims[:axis], len(tensors), *dims[axis:]]
        expected = f"a list of {len(tensors)}, or one tensor {brackets(stacked)}"
        if isinstance(value, (list, tuple)):
            if len(value) != len(tensors):
                raise ArgumentError(f"{self.name}: {name} is a list of {len(value)} tensors, expected {expected}")
            return value
        self.check_tensor(name, value, expected)
        if value.dim() != len(stacked) or value.shape[axis] != len(tensors):
            raise ArgumentError(f"{self.name}: {name} has shape {list(value.shape)}, expected {expected}")
        return value.unbind(axis)

    def check_tensor(self, name: str, value, expected: str = "a tensor") -> None:
        """Refuses what is not a dense torch tensor."""
        import torch

        if not isinstance(value, torch.Tensor):
            fix = " (call torch.as_tensor)" if hasattr(value, "__array__") or isinstance(value, float) else ""
            raise ArgumentError(f"{self.name}: {name} is a {type(value).__name__}, expected {expected}{fix}")
        if value.layout != torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise ArgumentError(
                f"{self.name}: {name} has layout {layout}, expected a dense tensor: call {name}.to_dense()"
            )

    def _misfit(self, given: dict, named: dict, args: tuple, options: tuple) -> ArgumentError:
        names = [name for name, _ in self.parameters]
        known = {*names, *self.dims}
        missing = [t for t in self.dims if not {t, self._parameter(t)} & {*given, *named}]
        problems = {
            "missing": missing,
            "given twice:": [name for name in given if name in named],
            "unknown": [name for name in named if name not in known],
        }
        found = [f"{what} {', '.join(which)}" for what, which in problems.items() if which]
        if len(args) > len(names):
            found.append(f"got {len(args)} by place")
        return ArgumentError(f"{self.name} takes {', '.join(names)} ({', '.join(options)}): {'; '.join(found)}")

    def _parameter(self, tensor: str) -> str:
        return next(name for name, tensors in self.parameters if tensor in tensors)

    def __str__(self):
        return f"{self.name}({', '.join(name for name, _ in self.parameters)})"


def brackets(dims) -> str:
    """Dimensions as people write them: [B, T, H, K]."""
    return f"[{', '.join(map(str, dims))}]"


def describe(recurrence, canonical) -> dict:
    """A recurrence as a manifest stores it, as plain JSON: parameters, canonical form, and what follows from it."""
    from kdagen.ir.canonical_json import to_json

    return {
        "parameters": parameters(recurrence),
        "heads": {a.name: canonical.heads(a) for a in canonical.arguments},
        "gates": sorted(canonical.gates),
        "canonical": to_json(canonical),
    }


def signature(description: dict) -> Signature:
    """The signature of what `describe` gave."""
    canonical, heads = description["canonical"], description["heads"]
    dims = {
        a["name"]: (("B", "T") if a["per_token"] else ()) + (heads[a["name"]], *a["axis"])
        for a in canonical["arguments"]
    }
    parameters = tuple((name, tuple(tensors)) for name, tensors in description["parameters"])
    return Signature(canonical["name"], parameters, dims, frozenset(description["gates"]), recurrence_hash(canonical))


def recurrence_hash(canonical: dict) -> str:
    """Names what a canonical form, as kdagen.ir.canonical_json has it, computes: its own name and words do not count.

    Schedules are tuned for this, so that a recurrence of a user's that equals one of the zoo shares them.
    """
    said = {name: part for name, part in canonical.items() if name not in ("name", "doc")}
    said["arguments"] = sorted(said["arguments"], key=lambda argument: argument["name"])
    return hashlib.sha256(manifests.canonical(said).encode()).hexdigest()[:12]


def parameters(recurrence) -> list[list]:
    """[name, [its tensors]] of each parameter, in order: kg.Key[2] stands for two."""
    flat, found = [n.value for n in recurrence.inputs], []
    while flat:
        role = recurrence.roles.get(flat[0])
        count = role.count if role else None
        name = flat[0].rpartition("_")[0] if count else flat[0]
        found.append([name, flat[: count or 1]])
        flat = flat[count or 1 :]
    if taken := [name for name, _ in found if name in OPTIONS]:
        raise RecurrenceError(
            f"recurrence '{recurrence.name}': every op has an option {' and '.join(taken)}: rename this argument"
        )
    return found
