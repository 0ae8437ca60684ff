"""`kdagen.compile` and what it returns: an op that runs on CPU tensors at once and on CUDA tensors by built kernels.

An `Op` binds arguments (signature) and calls one of its torch ops (torch_op), whose implementations check them (call,
checks) and run the CPU backend (cpu) or kernels (found by jit, or those of a built package). This module holds the op
in inference; where gradients are wanted, training. What would run, in words, is in explain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdagen.runtime import call as calls
from kdagen.runtime import torch_op
from kdagen.runtime.checks import short
from kdagen.runtime.signature import Signature, describe, signature
from kdagen.runtime.torch_op import Implementation
from kdagen.runtime.training import Training, needs_gradient, transformed
from kdagen.schedule import Keep

if TYPE_CHECKING:
    from kdagen.recurrence import Recurrence
    from kdagen.schedule import Schedule, TrainingSchedule

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
    keep: str = "states",
    training_schedule: TrainingSchedule | dict | None = None,
) -> Op:
    """The op of a recurrence. Nothing is compiled here; on CPU tensors only `recurrence` matters.

    Args:
        recurrence: what `@kg.recurrence` returns, a name of the zoo, or "file.py:name".
        head_dim: (K, V) of the GPU kernels, each 64, 128 or 256; one number stands for both.
        dtype: of keys, values and output on GPUs: "bfloat16" or "float16" (or torch's).
        arch: "sm90" and the like; that of the tensors' GPU unless given.
        schedule: of inference: a whole schedule, or the fields in which it differs from the default.
        gate_dtype: of gates and scalars a token on GPUs; `dtype` unless given.
        templates: folders of kernel skeletons that come before kdagen's own.
        build_dir: the folder that `kdagen build` wrote; KDAGEN_BUILD_DIR or ./kdagen_ops unless given.
        keep: what a forward leaves for its backward beside its arguments: "inputs" (nothing: all is computed again),
            "states" (the state before each chunk) or "all" (what prepare made too).
        training_schedule: as `schedule`, of the kernels that train; a `keep` of its own counts.

    Raises:
        RecurrenceError: the recurrence is outside the family, or there is none of that name.
        ArgumentError, TargetError: a dtype or arch that there are no kernels for.
    """
    from kdagen.derive.canonical import canonical
    from kdagen.recurrence import load
    from kdagen.runtime import jit, options

    spec, recurrence = recurrence, load(recurrence)
    chosen = options.options(head_dim, dtype, arch, schedule, gate_dtype, templates, build_dir, keep, training_schedule)
    form = canonical(recurrence)
    description = describe(recurrence, form)
    description["canonical"]["doc"] = ""
    kernels = jit.JustInTime(recurrence, chosen, spec if isinstance(spec, str) else options.spec_of(recurrence))
    identity = torch_op.identity(description, chosen.json())
    wide = options.wide_arguments(form, chosen)
    return shared(identity, lambda: Op(signature(description), identity, lambda: form, kernels, chosen.keep, wide))


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

    Gradients flow to all of them, in the dtype of each. Under torch.autocast, arguments a token in float32 are cast to
    its dtype, but for those that the kernels take in float32 (gate_dtype); states and parameters of the head stay.
    """

    def __init__(self, signature: Signature, identity: str, form: Callable, kernels, keep=Keep.STATES, wide=()):
        """`form()` gives the canonical form; `kernels.fitting(tensors, capability, training)` gives a LoadedOp.

        `keep` is what a forward in training leaves for its backward; `wide` names the arguments that autocast leaves.
        """
        self.signature, self.kernels, self._form = signature, kernels, form
        self._last: tuple | None = None  # dtype, device and words of what ran last
        self._announced: set = set()
        self._cast = [dims[:1] == ("B",) and name not in wide for name, dims in signature.dims.items()]
        self.training = t = Training(self, keep)
        inference = Implementation(self._cpu, self._cuda, self._fake, t.differentiate_inference, t.save)
        found = torch_op.register(signature, identity, inference, t.forward, t.backward)
        self.torch_op, self.training_op, self.backward_op = found

    def __call__(self, *args, initial_state=None, output_final_state: bool = False, **named):
        """(output [B, T, H, V], final state [B, H, K, V] or None)."""
        given = self._autocast(self.signature.bind(args, named))
        if initial_state is not None:
            self.signature.check_tensor("initial_state", initial_state)
        states = () if initial_state is None else (initial_state,)
        torch_op = self.training_op if needs_gradient(self.name, (*given, *states)) else self.torch_op
        o, state, *_ = self._run(torch_op, *given, initial_state, output_final_state)
        return o, state if output_final_state else None

    def _run(self, torch_op, *given) -> tuple:
        try:
            return torch_op(*given)
        except RuntimeError as error:
            if "functorch transforms" in str(error):
                raise transformed(self.name) from None
            raise

    def _autocast(self, given: list) -> list:
        import torch

        device = given[0].device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return given
        dtype = torch.get_autocast_dtype(device)
        return [x.to(dtype) if cast and x.dtype == torch.float32 else x for x, cast in zip(given, self._cast)]

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

    def _cpu(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        o, state = call.unchanged() if call.empty else self.run_on_cpu(call)
        self.note(call.like, "CPU backend, batched matrix products on torch")
        return call.returned(o, state)

    def run_on_cpu(self, call) -> tuple:
        """Output and final state, by the CPU backend."""
        from kdagen.runtime import cpu

        return cpu.run(self.program, call.tensors, call.initial_state, call.like.dtype)

    def _cuda(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        kernels = self.fitting(call)
        if call.empty:
            o, state = call.unchanged()
        else:
            found = self.launch(kernels, call.tensors, initial_state=call.initial_state)
            o, state = (found[kernels.by_role[role]] for role in ("out", "final_state"))
        self.note(call.like, "kernels in", kernels.folder)
        return call.returned(o, state)

    def _fake(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        return call.returned(*call.results())

    # -- kernels

    def fitting(self, call, **which):
        """The kernels for a call on the GPU that its tensors are on; built if they are nowhere."""
        return self.kernels.fitting(call.tensors, _capability(call.like.device), **which)

    def planned(self, call):
        """The training kernels for a call as they are, or would be, built: torch's compiler asks for shapes only."""
        import torch

        known = torch.cuda.is_available()
        return self.kernels.planned(call.tensors, _capability(call.like.device) if known else None)

    def launch(self, kernels, tensors: dict, *which: str, **states) -> dict:
        """Launches a pass of kernels on contiguous copies; states and cotangents go by their roles, and may be None."""
        tensors = tensors | {kernels.by_role[role]: x for role, x in states.items() if x is not None}
        return kernels.launch({name: self._contiguous(name, x) for name, x in tensors.items()}, *which)

    def _contiguous(self, name: str, tensor):
        if not tensor.is_contiguous() and name not in self._announced:
            self._announced.add(name)
            log.debug("%s: %s is not contiguous and is copied at each call", self.name, name)
        return tensor.contiguous()

    def note(self, like, *what) -> None:
        """Remembers what ran, and logs it the first time."""
        self._last = like.dtype, like.device, what
        if self._last not in self._announced:
            self._announced.add(self._last)
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


def _capability(device) -> str:
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability(device)))
