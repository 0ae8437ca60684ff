"""An op token by token: `op.decode` on a pool of states, and `op.recurrent`, the same on states of its own.

Both are torch ops of their own (torch_op) and run the step form on the CPU (cpu_decode), one kernel on a GPU. What
runs whole sequences at once is in op.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, partial

from kdagen.runtime import call as calls
from kdagen.runtime import values
from kdagen.runtime.checks import check
from kdagen.runtime.cpu_schedule import schedule_of
from kdagen.runtime.torch_op import NAMES, Implementation
from kdagen.runtime.training import inference_only


@dataclass
class Decode(calls.Call):
    """Legal arguments of decoding; `pool` is read and written."""

    pool: object = None
    indices: object = None  # [N, W], or None: slot n is sequence n's
    accepted: object = None
    null_below: int = 0
    pool_name: str = "state_pool"

    @property
    def columns(self) -> int:
        """How many slots a sequence has: 1, or W of a speculative one."""
        return self.sizes.get("W", 1)

    @cached_property
    def slots(self) -> list[list[int]]:
        """The slots of each sequence, -1 for none."""
        n = self.sizes["N"]
        given = [[i] for i in range(n)] if self.indices is None else self.indices.reshape(n, self.columns).tolist()
        return [[i if i >= max(self.null_below, 0) else -1 for i in row] for row in given]

    @cached_property
    def starts(self) -> list[int]:
        """The slot that each sequence starts from, -1 for none."""
        accepted = [1] * self.sizes["N"] if self.accepted is None else self.accepted.tolist()
        return [row[count - 1] if any(i >= 0 for i in row) else -1 for row, count in zip(self.slots, accepted)]

    def check_values(self) -> None:
        """Refuses illegal ends, slots and counts, and arguments that are not finite; not states, which are large."""
        op, sizes = self.signature.name, self.sizes
        super().check_values()
        if self.indices is not None:
            values.check_slots(op, self.slots, sizes["S"], self.null_below)
        if self.accepted is not None:
            values.check_accepted(op, self.accepted.tolist(), self.slots, self.columns)
        if self.ends is not None and self.columns > 1:
            values.check_lengths(op, self.ends, self.columns)

    def check_states(self) -> None:
        """Refuses states that are read and not finite."""
        for slot in self.starts:
            if slot >= 0:
                values.check_finite(self.signature.name, f"{self.pool_name}[{slot}]", self.pool[slot])


def decode_call(op, given: tuple, named: dict) -> Decode:
    """What the decode op was given, shapes and dtypes checked."""
    tensors, rest = calls.split(op.signature, given)
    named = dict(zip(NAMES["_decode"], rest)) | named
    null_below, check_too = named.pop("null_below", 0), named.pop("check", False)
    sizes = check(op.signature, tensors, op.state, **named)
    pool, indices, accepted, cu_seqlens = (named.get(name) for name in NAMES["_decode"][:4])
    return Decode(
        op.signature, op.state, tensors, sizes, cu_seqlens=cu_seqlens, check=check_too, pool=pool, indices=indices,
        accepted=accepted, null_below=null_below,
    )  # fmt: skip


class Decoding:
    """The implementations of an Op's recurrent and decode ops."""

    def __init__(self, op):
        self.op = op

    @property
    def recurrent(self) -> Implementation:
        """Of the recurrent op: (output, final state)."""
        return Implementation(self._cpu_recurrent, self._cuda_recurrent, self._fake_recurrent, self._refuse)

    @property
    def decode(self) -> Implementation:
        """Of the decode op: output; it replaces states of the pool."""
        return Implementation(self._cpu, self._cuda, self._fake)

    # -- decode

    @cached_property
    def alike(self):
        """What calls on CPU tensors that came before leave to those alike, a cpu_decode.Alike."""
        from kdagen.runtime.cpu_decode import Alike

        return Alike(self.op)

    def _cpu(self, *given, **named):
        plain = len(given) == len(self.op.signature.tensors) + 1 and not named
        if plain and (out := self.alike.run(given)) is not None:
            return out
        call = decode_call(self.op, given, named)
        call.check_values()
        return self._on_cpu(call, partial(self.alike.remember, given) if plain else lambda table: None)

    def prepared(self, given: tuple, out):
        """What the native loop takes for float32 arguments and a pool that stay where they are, and writes into `out`:
        a cpu_native.Placed; None where torch's operations decode. Threads share states only where these are large."""
        from kdagen.runtime.cpu_decode import SHARED_BYTES, threads_of

        call, native = decode_call(self.op, given, {}), self.op.step.native
        if not native.fits(call):
            return None
        large = call.pool.nbytes >= SHARED_BYTES
        return native.prepared(call, out, threads_of(schedule_of(self.op, call, "decode")) if large else 1)

    def _on_cpu(self, call: Decode, remember=lambda table: None):
        from kdagen.runtime import cpu_decode

        out, what = call.new_output().zero_(), "CPU backend, nothing to do"
        if not call.empty:
            what = cpu_decode.run(self.op.step, call, out, schedule_of(self.op, call, "decode"), remember)
        self.op.note(call.like, what)
        return out

    def _cuda(self, *given, **named):
        call = decode_call(self.op, given, named)
        if call.check:
            call.check_values()
            call.check_states()
        return self._on_gpu(call)

    def _on_gpu(self, call: Decode):
        kernels = self.op.fitting(call, "decode")
        self.op.note(call.like, "kernels in", kernels.folder)
        if call.empty:
            return call.new_output().zero_()
        given = {"state_pool": call.pool, "state_indices": call.indices, "num_accepted_tokens": call.accepted}
        found = self.op.launch(kernels, call.given, "decode", {"null_below": call.null_below}, **given)
        return found[kernels.by_role["out"]]

    def _fake(self, *given, **named):
        return decode_call(self.op, given, named).new_output()

    # -- recurrent: a pool of its own, in which sequence n has slot n

    def _call(self, given: tuple, named: dict):
        return calls.forward(self.op.signature, self.op.state, NAMES["_recurrent"], given, named)

    def _cpu_recurrent(self, *given, **named):
        call = self._call(given, named)
        call.check_values()
        return self._recurrent(call, self._on_cpu)

    def _cuda_recurrent(self, *given, **named):
        call = self._call(given, named)
        if call.check:
            call.check_values()
        return self._recurrent(call, self._on_gpu)

    def _recurrent(self, call: calls.Call, run) -> tuple:
        pool = call.unchanged()[1]
        given = {field.name: getattr(call, field.name) for field in fields(call)}
        given["sizes"] = call.sizes | {"S": call.sizes["N"]}
        o = run(Decode(**given, pool=pool, pool_name="initial_state"))
        return call.returned(o, pool, None)[:2]

    def _fake_recurrent(self, *given, **named):
        call = self._call(given, named)
        return call.returned(*call.results())[:2]

    def _refuse(self, ctx, *gradients):
        raise inference_only(self.op.name, "recurrent")
