"""What the functions of FLA share whatever their recurrence: the op of a call, its states, and what is refused.

A function here has the signature of FLA's (0.6), takes what FLA's takes and refuses what it refuses, with an error that
is of FLA's type too: a CallError is the ValueError or the AssertionError that code written for FLA may expect.
"""

from __future__ import annotations

import functools
import importlib
import logging
import operator
import types
import warnings
from dataclasses import dataclass

from kdagen.errors import ArgumentError

OPS = types.SimpleNamespace()  # all ops by name: torch's compiler guards an attribute, not what a function returned
log = logging.getLogger("kdagen")


class CallError(ArgumentError, AssertionError):
    """A call of a function of FLA's that cannot be served: what it was given does not fit."""


class NotServedError(CallError, NotImplementedError):
    """An option of FLA's that kdagen has no kernels for."""


class RemovedError(CallError, DeprecationWarning):
    """An option that FLA has removed; it raises a DeprecationWarning."""


@dataclass(frozen=True)
class Call:
    """What a function was asked for beside its tensors and its recurrence."""

    initial_state: object = None
    output_final_state: bool = False
    cu_seqlens: object = None
    state_v_first: bool = False
    disable_recompute: bool = False
    token_by_token: bool = False  # the decode kernel, where no gradient is wanted
    reverse: bool = False  # from the last token to the first

    def run(self, recurrence: tuple, tensors: dict) -> tuple:
        """Output, in q's dtype, and final state of a recurrence, given by what makes it: (module:function, choices)."""
        op, given, state = self._prepared(recurrence, tensors)
        run = op.recurrent if self.token_by_token and not wants_gradient(*given, state) else op
        cu_seqlens = self.cu_seqlens
        if self.reverse:
            given, state, cu_seqlens = reversed_call(given, state, cu_seqlens)
        o, final = _checked(
            run, *given, initial_state=state, output_final_state=self.output_final_state, cu_seqlens=cu_seqlens
        )
        if self.reverse:
            o, final = o.flip(1), final if cu_seqlens is None or final is None else final.flip(0)
        return o.to(tensors["q"].dtype), final

    def run_with_states(self, recurrence: tuple, tensors: dict, chunk_size: int, cu_seqlens_cpu=None) -> tuple:
        """Output, final state, and the states before each chunk of each sequence [B, chunks, HV, ...] in k's dtype."""
        import torch

        op, given, state = self._prepared(recurrence, tensors)
        options = {"output_final_state": self.output_final_state, "cu_seqlens": self.cu_seqlens}
        o, final, after = _checked(op, *given, initial_state=state, states_every=chunk_size, **options)
        tokens = tensors["v"].shape[1]
        if self.cu_seqlens is None:
            first = after.new_zeros(after.shape[0], *after.shape[2:]) if state is None else state
            chunks = -(-tokens // chunk_size)
            before = torch.cat([first.unsqueeze(1), after], 1)[:, :chunks]
        else:
            ends = (self.cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()
            first = after.new_zeros(len(ends) - 1, *after.shape[2:]) if state is None else state
            before = torch.cat([first, after[0]])[_rows(ends, chunk_size)].unsqueeze(0)
        return o.to(tensors["q"].dtype), final, before.to(tensors["k"].dtype)

    def _prepared(self, recurrence: tuple, tensors: dict) -> tuple:
        """The op, its arguments in its order, and the initial state in its dtype."""
        import torch

        v = tensors["v"]
        tensors, gates = _gates_alike(recurrence, tensors)
        dtype = v.dtype if v.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        keep = "all" if self.disable_recompute else "states"
        layout = "VK" if self.state_v_first else "KV"
        dims = operator.index(tensors["k"].shape[-1]), operator.index(v.shape[-1])
        op = getattr(OPS, compiled(recurrence, dims, dtype, gates, keep, layout))
        state = self.initial_state
        if state is not None:
            state = state.to(torch.promote_types(v.dtype, torch.float32))
        return op, [tensors[name] for name in op.signature.tensors], state


def traced(function):
    """torch's compiler calls it while it traces, with plain numbers, and takes what it returns as it is.

    That is what torch.compiler.assume_constant_result marks; calling that would import the compiler.
    """
    function._dynamo_marked_constant = True
    return function


@traced
def compiled(recurrence: tuple, head_dim: tuple[int, int], dtype, gate_dtype, keep: str, layout: str) -> str:
    """The name, in OPS, of a recurrence's op; each combination is compiled once."""
    return _compiled(recurrence, head_dim, dtype, gate_dtype, keep, layout)


@functools.cache
def _compiled(recurrence: tuple, head_dim, dtype, gate_dtype, keep, layout):
    import kdagen

    options = {"head_dim": head_dim, "dtype": dtype, "gate_dtype": gate_dtype, "keep": keep, "state_layout": layout}
    op = kdagen.compile(made(recurrence), **options)
    name = f"{op.name}_{id(op)}"  # ops are for good
    setattr(OPS, name, op)
    return name


@traced
def rates(recurrence: tuple) -> tuple[str, ...]:
    """The arguments a token that kernels may take in float32 beside keys and values in half precision."""
    return _rates(recurrence)


@functools.cache
def _rates(recurrence: tuple) -> tuple[str, ...]:
    from kdagen.derive.canonical import canonical

    form = canonical(made(recurrence))
    return tuple(a.name for a in form.arguments if a.per_token and (not a.axis or a.name in form.gates))


def made(recurrence: tuple):
    """The recurrence itself: what `module:function` makes of the choices."""
    where, *choices = recurrence
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)(*choices)


def _gates_alike(recurrence: tuple, tensors: dict) -> tuple[dict, object]:
    """Gates and scalars in one dtype, as kernels take them: float32 if any is, beside values in half precision."""
    import torch

    found = {name: tensors[name] for name in rates(recurrence)}
    half = tensors["v"].dtype in (torch.bfloat16, torch.float16)
    if half and any(x.dtype != tensors["v"].dtype for x in found.values()):
        return tensors | {name: x.float() for name, x in found.items()}, torch.float32
    return tensors, None


def _checked(run, *args, **options):
    try:
        return run(*args, **options)
    except ArgumentError as error:
        raise CallError(str(error)) from None


def reversed_call(given: list, state, cu_seqlens) -> tuple:
    """The same call with tokens, and so sequences, in reverse order; parameters of the head stay."""
    given = [x.flip(1) if x.ndim > 2 else x for x in given]
    if cu_seqlens is not None:
        cu_seqlens = given[0].shape[1] - cu_seqlens.flip(0)
        state = None if state is None else state.flip(0)
    return given, state, cu_seqlens


def _rows(ends: list[int], every: int) -> list[int]:
    """Where the states before each chunk stand: first the sequences' initial states, then those after `every` tokens.

    Sequence s, from token a on, has the state after its (i + 1)-th whole chunk in slot a // every + i.
    """
    n, rows = len(ends) - 1, []
    for s, (a, b) in enumerate(zip(ends, ends[1:])):
        chunks = -(-(b - a) // every)
        rows += [s, *(n + a // every + i for i in range(chunks - 1))][:chunks]
    return rows


def wants_gradient(*tensors) -> bool:
    """Whether autograd records this call."""
    import torch

    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def default_scale(q, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    if q.ndim != 4:
        raise CallError(f"q has shape {list(q.shape)}: expected [B, T, H, K]")
    return operator.index(q.shape[-1]) ** -0.5 if scale is None else float(scale)


def heads(q, k, v) -> None:
    """Refuses value heads that do not share key heads evenly."""
    if q.shape != k.shape:
        raise CallError(f"q has shape {list(q.shape)} and k {list(k.shape)}: expected the same, [B, T, H, K]")
    if v.shape[2] % q.shape[2]:
        raise CallError(f"v has {v.shape[2]} heads, q and k {q.shape[2]}: expected a multiple of them (grouped values)")


def v_first(state_v_first: bool, kwargs: dict) -> bool:
    """Whether states are [V, K]; the option's old name is accepted, with FLA's DeprecationWarning."""
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise CallError("state_v_first and transpose_state_layout are one option, under its new and its old name")
    warnings.warn("transpose_state_layout is called state_v_first now", DeprecationWarning, stacklevel=3)
    return kwargs.pop("transpose_state_layout")


def rest(function: str, kwargs: dict, sizes: tuple[int, ...] = ()) -> int:
    """The chunk size among what is left of a call's options; FLA ignores others, so they are only logged."""
    if "head_first" in kwargs:
        raise RemovedError("head_first was removed: expected tensors as [B, T, H, ...]")
    size = kwargs.pop("chunk_size", None) or 64
    if sizes and size not in sizes:
        raise CallError(f"chunk_size = {size}: expected one of {', '.join(map(str, sizes))}")
    if kwargs:
        log.warning("%s ignores %s", function, ", ".join(sorted(kwargs)))
    return size


def one_device(cp_context) -> None:
    """Refuses context parallelism."""
    if cp_context is not None:
        raise NotServedError("cp_context: sequences split over devices are not served by kdagen; leave it out")


def in_float32(initial_state) -> None:
    """Refuses a state in half precision, as FLA does; float64 goes with float64 tensors."""
    import torch

    if initial_state is not None and initial_state.dtype not in (torch.float32, torch.float64):
        raise CallError(f"initial_state is {initial_state.dtype}: expected float32")


def rate(use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> int | None:
    """The form of beta: None as it is, 1 its sigmoid, 2 twice that."""
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise CallError("allow_neg_eigval=True doubles sigmoid(beta): expected use_beta_sigmoid_in_kernel=True too")
    return (1 + allow_neg_eigval) if use_beta_sigmoid_in_kernel else None


def parameter(name: str, given, like, *shape: int):
    """A parameter of the head in float32 and the op's shape, whatever shape it has; zeros where there is none."""
    import torch

    if given is None:
        return torch.zeros(shape, dtype=torch.float32, device=like.device)
    size = 1
    for n in shape:
        size *= n
    if given.numel() != size:
        raise CallError(f"{name} has shape {list(given.shape)}: expected {size} elements, {list(shape)}")
    return given.to(torch.promote_types(given.dtype, torch.float32)).reshape(shape)
