"""One call of an op's torch ops: what it was given, checked, and what it returns where there is nothing to compute."""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.runtime.checks import check
from kdagen.runtime.signature import Signature


@dataclass
class Call:
    """Legal arguments by name, their sizes B, T, H, K and V, and the tensor whose dtype and device are the output's."""

    tensors: dict
    sizes: dict
    like: object
    initial_state: object = None
    wants_state: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no token, or no sequence."""
        return not self.like.numel()

    def results(self) -> tuple:
        """New tensors for output and final state."""
        import torch

        b, t, h, k, v = (self.sizes[dim] for dim in "BTHKV")
        state_dtype = torch.promote_types(self.like.dtype, torch.float32)
        return self.like.new_empty(b, t, h, v), self.like.new_empty(b, h, k, v, dtype=state_dtype)

    def unchanged(self) -> tuple:
        """With no token: no output, and the state as it was."""
        o, state = self.results()
        return o, _copied(self.initial_state, state)

    def no_gradients(self, d_final_state) -> tuple:
        """With no token: nothing depends on the arguments, and the state's cotangent stays as it was."""
        return *(x.new_zeros(x.shape) for x in self.tensors.values()), _copied(d_final_state, self.results()[1])

    def returned(self, o, state) -> tuple:
        """What a torch op returns: a tensor in any case, without elements for a state that was not asked for."""
        return o, state if self.wants_state else state.new_empty(0)


def _copied(state, onto):
    return onto.zero_() if state is None else onto.copy_(state)


def forward(signature: Signature, given: tuple, initial_state=None, output_final_state: bool = False) -> Call:
    """A call of the inference or the training op; torch passes all by place, and drops defaults at the end."""
    tensors, options = _split(signature, given)
    initial_state, wants_state = *options, *(initial_state, output_final_state)[len(options) :]
    sizes = check(signature, tensors, initial_state=initial_state)
    return Call(tensors, sizes, tensors[signature.value], initial_state, wants_state)


def backward(signature: Signature, given: tuple) -> tuple:
    """A call of the backward op, and what it was given besides: the tensors kept, the cotangents of both results."""
    tensors, (initial_state, kept, d_out, d_state) = _split(signature, given)
    sizes = check(signature, tensors, initial_state=initial_state, d_out=d_out, d_final_state=d_state)
    return Call(tensors, sizes, tensors[signature.value], initial_state), kept, d_out, d_state


def _split(signature: Signature, given: tuple) -> tuple[dict, tuple]:
    count = len(signature.tensors)
    return dict(zip(signature.tensors, given)), given[count:]
