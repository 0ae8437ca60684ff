"""`kdagen.compile` and what it returns: an op that runs on CPU tensors at once and on CUDA tensors by built kernels.

An `Op` binds arguments (signature) and calls its torch op (torch_op), whose implementations check them (checks) and run
the CPU backend (cpu) or kernels (found by jit, or those of a built package). What would run, in words, is in explain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdagen.runtime import torch_op
from kdagen.runtime.checks import check, short
from kdagen.runtime.signature import Signature, describe, signature

if TYPE_CHECKING:
    from kdagen.recurrence import Recurrence
    from kdagen.schedule import Schedule

log = logging.getLogger("kdagen")
_ops: dict[str, Op] = {}  # by identity: what is compiled again unchanged, as notebooks do, is the same op


def compile(
    recurrence: Recurrence | str,
    head_dim: int | tuple[int, int] = (128, 128),
    dtype="bfloat16",
    arch: str | None = None,
    schedule: Schedule | dict | None = None,
    gate_dtype=None,
    templates: Sequence[str | Path] = (),
    build_dir: str | Path | None = None,
) -> Op:
    """The op of a recurrence. Nothing is compiled here; on CPU tensors only `recurrence` matters.

    Args:
        recurrence: what `@kg.recurrence` returns, a name of the zoo, or "file.py:name".
        head_dim: (K, V) of the GPU kernels, each 64, 128 or 256; one number stands for both.
        dtype: of keys, values and output on GPUs: "bfloat16" or "float16" (or torch's).
        arch: "sm90" and the like; that of the tensors' GPU unless given.
        schedule: a whole schedule, or the fields in which it differs from the default.
        gate_dtype: of gates and scalars a token on GPUs; `dtype` unless given.
        templates: folders of kernel skeletons that come before kdagen's own.
        build_dir: the folder that `kdagen build` wrote; KDAGEN_BUILD_DIR or ./kdagen_ops unless given.

    Raises:
        RecurrenceError: the recurrence is outside the family, or there is none of that name.
        ArgumentError, TargetError: a dtype or arch that there are no kernels for.
    """
    from kdagen.derive.canonical import canonical
    from kdagen.recurrence import load
    from kdagen.runtime import jit, options

    spec, recurrence = recurrence, load(recurrence)
    chosen = options.options(head_dim, dtype, arch, schedule, gate_dtype, templates, build_dir)
    form = canonical(recurrence)
    description = describe(recurrence, form)
    description["canonical"]["doc"] = ""
    kernels = jit.JustInTime(recurrence, chosen, spec if isinstance(spec, str) else options.spec_of(recurrence))
    identity = torch_op.identity(description, chosen.json())
    return shared(identity, lambda: Op(signature(description), identity, lambda: form, kernels))


def shared(identity: str, make: Callable[[], Op]) -> Op:
    """The op of this identity: a torch op is registered for good, so there is one Op behind it."""
    if identity not in _ops:
        _ops[identity] = make()
    return _ops[identity]


class Op:
    """A recurrence as a torch op: `o, final_state = op(q, k, v, ..., initial_state=None, output_final_state=False)`.

    Arguments go by place or by the recurrence's own names: keys and channels [B, T, H, K], values [B, T, H, V],
    scalars [B, T, H], parameters [H] or [H, K]. A sequence (kg.Key[n]) is a list of n tensors, or one stacked on the
    dimension before the heads. o is [B, T, H, V] in v's dtype; final_state is [B, H, K, V] in float32 (float64 for
    float64), None unless asked for. GPU kernels read contiguous tensors: others are copied first.
    """

    def __init__(self, signature: Signature, identity: str, form: Callable, kernels):
        """`form()` gives the canonical form; `kernels.fitting(tensors, capability)` gives a LoadedOp."""
        self.signature, self.kernels, self._form = signature, kernels, form
        self._last: tuple | None = None  # dtype, device and words of what ran last
        self._announced: set = set()
        self.torch_op = torch_op.register(signature, identity, self._cpu, self._cuda, self._fake)

    def __call__(self, *args, initial_state=None, output_final_state: bool = False, **named):
        """(output [B, T, H, V], final state [B, H, K, V] or None)."""
        given = self.signature.bind(args, named)
        if initial_state is not None:
            self.signature.check_tensor("initial_state", initial_state)
        o, state = self.torch_op(*given, initial_state, output_final_state)
        return o, state if output_final_state else None

    @property
    def name(self) -> str:
        """The recurrence's name."""
        return self.signature.name

    @cached_property
    def program(self):
        """The chunk form, which the CPU backend runs."""
        from kdagen.derive.chunk import chunk_form

        return chunk_form(self._form())

    # -- what torch calls

    def _arguments(self, given: tuple, initial_state=None, output_final_state: bool = False):
        """Tensors by name, initial state and flag; torch passes all by place, and drops defaults at the end."""
        names = self.signature.tensors
        options = given[len(names) :]
        return dict(zip(names, given)), *options, *(initial_state, output_final_state)[len(options) :]

    def _cpu(self, *given, **options):
        tensors, initial_state, output_final_state = self._arguments(given, **options)
        sizes, like = check(self.signature, tensors, initial_state), tensors[self.signature.value]
        if like.numel():
            from kdagen.runtime import cpu

            o, state = cpu.run(self.program, tensors, initial_state, like.dtype)
        else:
            o, state = _unchanged(sizes, like, initial_state)
        self._note(like, "CPU backend, batched matrix products on torch")
        return o, state if output_final_state else state.new_empty(0)

    def _cuda(self, *given, **options):
        tensors, initial_state, output_final_state = self._arguments(given, **options)
        sizes, like = check(self.signature, tensors, initial_state), tensors[self.signature.value]
        kernels = self.kernels.fitting(tensors, _capability(like.device))
        if like.numel():
            o, state = self._launch(kernels, tensors, initial_state)
        else:
            o, state = _unchanged(sizes, like, initial_state)
        self._note(like, "kernels in", kernels.folder)
        return o, state if output_final_state else state.new_empty(0)

    def _launch(self, kernels, tensors: dict, initial_state):
        if initial_state is not None:
            tensors = {**tensors, kernels.by_role["initial_state"]: initial_state}
        results = kernels.launch({name: self._contiguous(name, t) for name, t in tensors.items()})
        return results[kernels.by_role["out"]], results[kernels.by_role["final_state"]]

    def _contiguous(self, name: str, tensor):
        if not tensor.is_contiguous() and name not in self._announced:
            self._announced.add(name)
            log.debug("%s: %s is not contiguous and is copied at each call", self.name, name)
        return tensor.contiguous()

    def _fake(self, *given, **options):
        tensors, initial_state, output_final_state = self._arguments(given, **options)
        sizes, like = check(self.signature, tensors, initial_state), tensors[self.signature.value]
        o, state = (like.new_empty(shape, dtype=dtype) for shape, dtype in _results(sizes, like))
        return o, state if output_final_state else state.new_empty(0)

    def _note(self, like, *what) -> None:
        self._last = like.dtype, like.device, what
        if self._last[:2] not in self._announced:
            self._announced.add(self._last[:2])
            log.info("%s: %s", self.name, self.last)

    @property
    def last(self) -> str | None:
        """What ran last, and on what."""
        if self._last is None:
            return None
        dtype, device, what = self._last
        return f"{short(dtype)} tensors on {device}: {' '.join(map(str, what))}"

    # -- what people read

    def explain(self) -> str:
        """What would run on CPU and on CUDA tensors, and what ran last."""
        from kdagen.runtime.explain import explain

        return explain(self)

    def __deepcopy__(self, memo) -> Op:
        """A module that is copied shares its ops: they hold no parameters."""
        return self

    def __repr__(self) -> str:
        return f"<kdagen op {self.signature}: print(op.explain()) says what runs it>"


def _results(sizes: dict, like) -> tuple:
    """Shape and dtype of the output and of the final state."""
    import torch

    b, t, h, k, v = (sizes[dim] for dim in "BTHKV")
    return ((b, t, h, v), like.dtype), ((b, h, k, v), torch.promote_types(like.dtype, torch.float32))


def _unchanged(sizes: dict, like, initial_state) -> tuple:
    """With no token: no output, and the state as it was."""
    import torch

    (out, dtype), (shape, state_dtype) = _results(sizes, like)
    o = like.new_empty(out, dtype=dtype)
    if initial_state is not None:
        return o, initial_state.clone(memory_format=torch.contiguous_format)
    return o, like.new_zeros(shape, dtype=state_dtype)


def _capability(device) -> str:
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability(device)))
