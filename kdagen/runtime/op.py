"""`kdagen.compile` and what it returns: an op that runs on CPU tensors at once and on CUDA tensors by built kernels.

An `Op` binds arguments (signature) and calls one of its torch ops (torch_op), whose implementations check them (call,
checks, values) and run the CPU backend (cpu) or kernels (found by jit, or those of a built package). This module holds
the op in inference; where gradients are wanted, training; token by token, decode. What would run, in words, is in
explain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdagen.errors import ArgumentError
from kdagen.runtime import call as calls
from kdagen.runtime import torch_op
from kdagen.runtime.checks import check_tag, short
from kdagen.runtime.cpu_schedule import schedule_of
from kdagen.runtime.decode import Decoding
from kdagen.runtime.signature import CALL, DECODE, RECURRENT, Signature, describe, signature
from kdagen.runtime.torch_op import NAMES, Implementation
from kdagen.runtime.training import Training, inference_only, needs_gradient, transformed
from kdagen.runtime.tuned import Tuned
from kdagen.schedule import Keep
from kdagen.state import DEFAULT, StateType

if TYPE_CHECKING:
    from kdagen.recurrence import Recurrence
    from kdagen.schedule import DecodeSchedule, Schedule, TrainingSchedule


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
    state_layout: str = DEFAULT.layout,
    state_dtype=DEFAULT.dtype,
    decode_schedule: DecodeSchedule | dict | None = None,
) -> Op:
    """The op of a recurrence. Nothing is compiled here; on CPU tensors only `recurrence` matters.

    Args:
        recurrence: what `@kg.recurrence` returns, a name of the zoo, or "file.py:name".
        head_dim: (K, V) of the GPU kernels, each 64, 128 or 256; one number stands for both.
        dtype: of keys, values and output on GPUs: "bfloat16" or "float16" (or torch's).
        arch: "sm90" and the like; that of the tensors' GPU unless given.
        schedule: of inference: a whole schedule, or the fields in which it differs from the default. What is given is
            used for all shapes; unless it is, a schedule is chosen by the size of a call among those that were tuned.
            {} stands for the default alone, whose results do not depend on which sizes were tuned how.
        gate_dtype: of gates and scalars a token on GPUs; `dtype` unless given.
        templates: folders of kernel skeletons that come before kdagen's own.
        build_dir: the folder that `kdagen build` wrote; KDAGEN_BUILD_DIR or ./kdagen_ops unless given.
        keep: what a forward leaves for its backward beside its arguments: "inputs" (nothing: all is computed again),
            "states" (the state before each chunk) or "all" (what prepare made too).
        training_schedule: as `schedule`, of the kernels that train; a `keep` of its own counts.
        state_layout: of all states: "KV" ([N, HV, K, V]) or "VK" ([N, HV, V, K]).
        state_dtype: that they are stored in: "float32" or "bfloat16". Sums are float32 whatever it is.
        decode_schedule: as `schedule`, of the kernel that decodes.

    Raises:
        RecurrenceError: the recurrence is outside the family, or there is none of that name.
        ArgumentError, TargetError: a dtype or arch that there are no kernels for.
    """
    from kdagen.derive.canonical import canonical
    from kdagen.recurrence import load
    from kdagen.runtime import jit, options

    spec, recurrence = recurrence, load(recurrence)
    chosen = options.options(
        head_dim, dtype, arch, schedule, gate_dtype, templates, build_dir, keep, training_schedule, state_layout,
        state_dtype, decode_schedule,
    )  # fmt: skip
    form = canonical(recurrence)
    description = describe(recurrence, form)
    description["canonical"]["doc"] = ""
    kernels = jit.JustInTime(recurrence, chosen, spec if isinstance(spec, str) else options.spec_of(recurrence))
    identity = torch_op.identity(description, chosen.json())
    wide = options.wide_arguments(form, chosen)
    rest = lambda: form, kernels, chosen.keep, wide, chosen.state, chosen.untuned  # noqa: E731
    return shared(identity, lambda: Op(signature(description), identity, *rest))


def shared(identity: str, make: Callable[[], Op]) -> Op:
    """The op of this identity: a torch op is registered for good, so there is one Op behind it."""
    if identity not in _ops:
        _ops[identity] = make()
    return _ops[identity]


class Op:
    """A recurrence as a torch op: `o, final_state = op(q, k, v, ..., initial_state=None, output_final_state=False)`.

    Arguments go by place or by the recurrence's own names: keys [B, T, H, K], values [B, T, HV, V], gates a channel
    [B, T, HV, K], scalars [B, T, HV], parameters [HV] or [HV, K]; HV is a multiple of H, and value head j has key head
    j // (HV // H). A sequence (kg.Key[n]) is a list of n tensors, or one stacked on the dimension before the heads.
    o is [B, T, HV, V] in v's dtype; final_state is [B, HV, K, V] (or [B, HV, V, K]: state_layout) in float32 (float64
    for float64; or bfloat16: state_dtype), None unless asked for. GPU kernels read contiguous tensors: others are
    copied first.

    With `cu_seqlens` [N + 1], 0 and the end of each of N sequences, these stand behind each other in a batch of B = 1,
    and states are [N, ...]; tokens after the last end are padding. With `states_every=n` a third result holds the state
    after every n tokens of a sequence, [B, T // n, ...], that of a ragged batch's sequence from slot start // n on.
    `check=True` looks for NaN, infinities and illegal cu_seqlens on a GPU too, which waits for it.

    Gradients flow to all arguments and to initial_state, in the dtype of each. Under torch.autocast, arguments a token
    in float32 are cast to its dtype, but for those that the kernels take in float32 (gate_dtype); states and parameters
    of the head stay. `recurrent` does the same token by token, `decode` on a pool of states.
    """

    def __init__(self, signature: Signature, identity: str, form: Callable, kernels, keep=Keep.STATES, wide=(),
                 state: StateType = DEFAULT, untuned: frozenset[str] = frozenset()):  # fmt: skip
        """`form()` gives the canonical form; `kernels.fitting(tensors, capability, purpose, want)` gives a LoadedOp.

        `keep` is what a forward in training leaves for its backward; `wide` names the arguments that autocast leaves;
        `untuned` are the purposes for which no tuned schedule is looked for.
        """
        self.signature, self.kernels, self._form, self.state = signature, kernels, form, state
        self.tuned = Tuned(self, untuned)
        self._last: tuple | None = None  # dtype, device and words of what ran last
        self._announced: set = set()
        self._cast = [dims[:1] == ("B",) and name not in wide for name, dims in signature.dims.items()]
        self.training, self.decoding = t, d = Training(self, keep), Decoding(self)
        inference = Implementation(self._cpu, self._cuda, self._fake, t.differentiate_inference, t.save)
        implementations = {
            "": inference, "_training": t.forward, "_backward": t.backward, "_recurrent": d.recurrent,
            "_decode": d.decode,
        }  # fmt: skip
        found = torch_op.register(signature, identity, implementations)
        self.torch_op, self.training_op, self.backward_op, self.recurrent_op, self.decode_op = found

    def __call__(self, *args, initial_state=None, output_final_state: bool = False, cu_seqlens=None,
                 states_every: int | None = None, check: bool = False, **named):  # fmt: skip
        """(output [B, T, HV, V], final state or None), and the states if `states_every` is given."""
        given = self.bound(args, named)
        options = self.given_options(initial_state=initial_state, cu_seqlens=cu_seqlens)
        wants = needs_gradient(self.name, [*given, *options])
        common = initial_state, bool(output_final_state), cu_seqlens
        if states_every is None:
            torch_op = self.training_op if wants else self.torch_op
            o, state, *_ = self._run(torch_op, *given, *common, *(() if wants else (0,)), bool(check))
            return o, self.tagged(state) if output_final_state else None
        if wants:
            raise inference_only(self.name, f"states_every={states_every}")
        if isinstance(states_every, bool) or not isinstance(states_every, int) or states_every < 1:
            raise ArgumentError(
                f"{self.name}: states_every = {states_every!r}, expected a number of tokens, or None for no states"
            )
        o, state, states = self._run(self.torch_op, *given, *common, states_every, bool(check))
        return o, self.tagged(state) if output_final_state else None, self.tagged(states)

    def recurrent(self, *args, initial_state=None, output_final_state: bool = False, cu_seqlens=None,
                  check: bool = False, **named):  # fmt: skip
        """What a call gives, token by token: for few tokens, without gradients."""
        given = self.bound(args, named, RECURRENT)
        options = self.given_options(initial_state=initial_state, cu_seqlens=cu_seqlens)
        if needs_gradient(self.name, [*given, *options]):
            raise inference_only(self.name, "recurrent")
        options = initial_state, bool(output_final_state), cu_seqlens, bool(check)
        o, state = self._run(self.recurrent_op, *given, *options)
        return o, self.tagged(state) if output_final_state else None

    def decode(self, *args, state_pool=None, state_indices=None, num_accepted_tokens=None, cu_seqlens=None,
               null_below: int = 0, check: bool = False, **named):  # fmt: skip
        """The output [B, T, HV, V] of the next tokens of N sequences, whose states in a pool are replaced.

        `state_pool` is [S, HV, K, V] (or [S, HV, V, K]), contiguous. Sequence n of the batch, or of `cu_seqlens`, has
        slot `state_indices[n]`, or n. An index below `null_below`, below 0 or beyond the pool is none: output zero, no
        state touched. With `state_indices` [N, W], W > 1, a sequence starts from the slot in column
        num_accepted_tokens[n] - 1 (0 unless given) and leaves the state after its token t in column t's slot.
        On the CPU and with `check` an index beyond the pool is an error.
        """
        given = self.bound(args, named, DECODE)
        self.signature.check_tensor("state_pool", state_pool)
        options = self.given_options(
            state_pool=state_pool, state_indices=state_indices, num_accepted_tokens=num_accepted_tokens,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if needs_gradient(self.name, [*given, *options]):
            raise inference_only(self.name, "decode")
        if isinstance(null_below, bool) or not isinstance(null_below, int):
            raise ArgumentError(f"{self.name}: null_below = {null_below!r}, expected a number of slots, such as 0 or 1")
        options = state_pool, state_indices, num_accepted_tokens, cu_seqlens, null_below, bool(check)
        return self._run(self.decode_op, *given, *options)

    def bound(self, args: tuple, named: dict, options: tuple[str, ...] = CALL) -> list:
        """The tensors of a call in order, cast as autocast has it; `options` are those that it takes beside them."""
        return self._autocast(self.signature.bind(args, named, options))

    def given_options(self, **options) -> list:
        """The tensors among options, of which states are of this op's layout as far as can be told."""
        import torch

        tensors = {name: x for name, x in options.items() if x is not None}
        for name, x in tensors.items():
            self.signature.check_tensor(name, x)
            if not torch.compiler.is_compiling():
                check_tag(self.name, name, x, self.state)
        return list(tensors.values())

    def tagged(self, state):
        """A state that says of which layout it is, where torch's compiler does not look on."""
        import torch

        if not torch.compiler.is_compiling():
            state.kdagen_layout = self.state.layout
        return state

    def _run(self, torch_op, *given):
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
    def form(self):
        """The canonical form."""
        return self._form()

    @cached_property
    def program(self):
        """The chunk form, which the CPU backend runs."""
        from kdagen.derive.chunk import chunk_form

        return chunk_form(self.form)

    @cached_property
    def step(self):
        """The step form, which the CPU backend decodes by."""
        from kdagen.derive.step import step_form
        from kdagen.runtime.cpu_decode import Step

        return Step(step_form(self.form), self.state)

    # -- what torch calls

    def call(self, given: tuple, named: dict):
        """What the inference op was given, shapes and dtypes checked."""
        return calls.forward(self.signature, self.state, NAMES[""], given, named)

    def _cpu(self, *given, **named):
        call = self.call(given, named)
        call.check_values()
        results = call.unchanged() if call.empty else self.run_on_cpu(call)
        self.note(call.like, "CPU backend, batched matrix products on torch")
        return call.returned(*results)

    def run_on_cpu(self, call, purpose: str = "inference") -> tuple:
        """Output, final state and states, by the CPU backend."""
        from kdagen.runtime import cpu

        inside, schedule = call.inside(call.initial_state), schedule_of(self, call, purpose)
        o, *states = cpu.run(self.program, call.tensors, inside, call.like.dtype, call.ends, call.every, schedule)
        return o, *map(call.outside, states)

    def _cuda(self, *given, **named):
        call = self.call(given, named)
        if call.check:
            call.check_values()
        kernels = self.fitting(call)
        scalars = {"every": self._every(call, kernels)}
        if call.empty:
            results = call.unchanged()
        else:
            found = self.launch(kernels, call.given, scalars=scalars, initial_state=call.initial_state)
            results = [found[kernels.by_role[role]] for role in ("out", "final_state", "states")]
        self.note(call.like, "kernels in", kernels.folder)
        return call.returned(*results)

    def _every(self, call, kernels) -> int:
        """After how many chunks a state is asked for, 0 for never."""
        chunk = kernels.plan["chunk_size"]
        if call.every % chunk:
            raise ArgumentError(
                f"{self.name}: states_every = {call.every}, expected a multiple of {chunk} on this GPU: its kernels "
                f"take chunks of {chunk} tokens (kg.compile(..., schedule={{'chunk_size': ...}}) for others)"
            )
        return call.every // chunk

    def _fake(self, *given, **named):
        call = self.call(given, named)
        return call.returned(*call.results())

    # -- kernels

    def fitting(self, call, purpose: str = "inference"):
        """The kernels for a call on the GPU that its tensors are on; built if they are nowhere."""
        capability = _capability(call.like.device)
        want = self.tuned.want(call, purpose, capability)
        kernels = self.kernels.fitting(call.tensors, capability, purpose, want)
        if want:
            self.tuned.say(want, self.kernels.choices[want])
        return kernels

    def planned(self, call):
        """The training kernels for a call as they are, or would be, built: torch's compiler asks for shapes only."""
        import torch

        capability = _capability(call.like.device) if torch.cuda.is_available() else None
        want = self.tuned.want(call, "training", capability) if capability else None
        return self.kernels.planned(call.tensors, capability, want=want)

    def launch(self, kernels, tensors: dict, which: str = "forward", scalars: dict | None = None, **states) -> dict:
        """Launches a pass of kernels on contiguous copies; states and cotangents go by their roles, and may be None."""
        tensors = tensors | {kernels.by_role[role]: x for role, x in states.items() if x is not None}
        contiguous = {name: self._contiguous(name, x) for name, x in tensors.items()}
        return kernels.launch(contiguous, which, scalars=scalars)

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
