"""One call of an op's torch ops: what it was given, checked, and the tensors that it returns.

States are in the op's layout and dtype here; what computes them takes and gives [N, HV, K, V] in full (`inside`).
Decoding has a call of its own, in kdagen.runtime.decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kdagen.errors import ArgumentError
from kdagen.runtime.checks import check, state_dtype
from kdagen.runtime.signature import Signature
from kdagen.runtime.values import check_finite, ends_of
from kdagen.state import StateType


@dataclass
class Call:
    """Legal arguments by name, their sizes, and the tensor whose dtype and device are the output's."""

    signature: Signature
    state: StateType
    tensors: dict
    sizes: dict
    initial_state: object = None
    wants_state: bool = False
    cu_seqlens: object = None
    every: int = 0
    check: bool = False  # values too, though that waits for a GPU

    @property
    def like(self):
        """The tensor whose dtype and device are the output's."""
        return self.tensors[self.signature.value]

    @property
    def given(self) -> dict:
        """The arguments, and cu_seqlens if there is one: what sizes are read from."""
        return self.tensors if self.cu_seqlens is None else {**self.tensors, "cu_seqlens": self.cu_seqlens}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no token, or no sequence."""
        return any(self.sizes[dim] == 0 for dim in ("B", "T", "N", "HV", "V"))

    @cached_property
    def ends(self) -> list[int] | None:
        """The ends of a ragged batch's sequences, 0 first; legal ones."""
        if self.cu_seqlens is None:
            return None
        return ends_of(self.signature.name, self.cu_seqlens, self.sizes["T"])

    def check_values(self) -> None:
        """Refuses illegal ends and what is not finite; the padding of a ragged batch may hold anything."""
        end = self.sizes["T"] if self.ends is None else self.ends[-1]
        for name, x in self.tensors.items():
            used = x[:, :end] if "T" in self.signature.dims[name] else x
            check_finite(self.signature.name, name, used, name in self.signature.gates)
        if self.initial_state is not None:
            check_finite(self.signature.name, "initial_state", self.initial_state)

    # -- results

    def results(self) -> tuple:
        """New tensors for output, final state and, of no elements unless asked for, states."""
        states = (self.sizes["B"], self.sizes["T"] // self.every if self.every else 0)
        return self.new_output(), self.new_state(self.sizes["N"]), self.new_state(*states)

    def new_output(self):
        """A tensor for the output."""
        return self.like.new_empty([self.sizes[dim] for dim in ("B", "T", "HV", "V")])

    def new_state(self, *lead: int):
        """States in the op's layout and dtype."""
        dims = (self.sizes[dim] for dim in ("HV", *self.state.dims))
        return self.like.new_empty(*lead, *dims, dtype=state_dtype(self.like.dtype, self.state))

    def unchanged(self) -> tuple:
        """With nothing to compute: zeros, and the state as it was."""
        o, state, states = self.results()
        return o.zero_(), _copied(self.initial_state, state), states.zero_()

    def no_gradients(self, d_final_state) -> tuple:
        """With nothing to compute: nothing depends on the arguments, and the state's cotangent stays as it was."""
        return *(x.new_zeros(x.shape) for x in self.tensors.values()), _copied(d_final_state, self.results()[1])

    def returned(self, o, state, states) -> tuple:
        """What a torch op returns: a tensor in any case, without elements for what was not asked for."""
        none = state.new_empty(0)
        return o, state if self.wants_state else none, states if self.every else none.clone()

    # -- states

    def inside(self, state):
        """A state of the op's as [N, HV, K, V]; what takes it sees to the dtype."""
        return state if state is None or self.state.layout == "KV" else state.mT

    def outside(self, state):
        """A state [.., HV, K, V] in the op's layout and dtype."""
        if state is None:
            return self.new_state(0, 0)
        turned = state if self.state.layout == "KV" else state.mT
        return turned.to(state_dtype(self.like.dtype, self.state)).contiguous()


def _copied(state, onto):
    return onto.zero_() if state is None else onto.copy_(state)


def forward(signature: Signature, state: StateType, options: tuple[str, ...], given: tuple, named: dict) -> Call:
    """A call of an op whose `options` follow its tensors; torch passes all by place, and drops defaults at the end."""
    tensors, rest = split(signature, given)
    named = dict(zip(options, rest)) | named
    initial_state, cu_seqlens = named.get("initial_state"), named.get("cu_seqlens")
    every = named.get("states_every", 0)
    if every < 0:
        raise ArgumentError(
            f"{signature.name}: states_every = {every}, expected a number of tokens, or None for no states"
        )
    sizes = check(signature, tensors, state, cu_seqlens=cu_seqlens, initial_state=initial_state)
    wanted = named.get("output_final_state", False)
    check_too = named.get("check", False)
    return Call(signature, state, tensors, sizes, initial_state, wanted, cu_seqlens, every, check_too)


def backward(signature: Signature, state: StateType, given: tuple) -> tuple:
    """A call of the backward op, and what it was given besides: the tensors kept, the cotangents of both results."""
    tensors, (initial_state, cu_seqlens, kept, d_out, d_state) = split(signature, given)
    states = {"initial_state": initial_state, "d_out": d_out, "d_final_state": d_state}
    sizes = check(signature, tensors, state, cu_seqlens=cu_seqlens, **states)
    return Call(signature, state, tensors, sizes, initial_state, False, cu_seqlens), kept, d_out, d_state


def split(signature: Signature, given: tuple) -> tuple[dict, tuple]:
    """The arguments by name, and what follows them."""
    count = len(signature.tensors)
    return dict(zip(signature.tensors, given)), given[count:]
