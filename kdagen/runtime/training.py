"""An op in training: its forward that keeps what a backward needs, its backward, and how autograd joins the two.

Both are torch ops of their own (torch_op), so that compilers see them whole; what inference runs is in op. How much is
kept is the user's choice, `kdagen.compile(..., keep=...)`.
"""

from __future__ import annotations

from functools import cached_property

from kdagen.errors import GradientError
from kdagen.runtime import call as calls
from kdagen.runtime.torch_op import Implementation
from kdagen.schedule import Keep


class Training:
    """The implementations of an Op's training and backward ops, and their autograd formulas."""

    def __init__(self, op, keep: Keep):
        self.op, self.signature, self.keep = op, op.signature, keep

    @property
    def forward(self) -> Implementation:
        """Of the training op: (output, final state, tensors kept)."""
        return Implementation(self._cpu, self._cuda, self._fake, self._differentiate, self.save)

    @property
    def backward(self) -> Implementation:
        """Of the backward op: the gradient of each tensor, then that of the initial state."""
        return Implementation(self._cpu_backward, self._cuda_backward, self._fake_backward, self._refuse)

    @cached_property
    def adjoint(self):
        """The backward of the chunk form, which the CPU backend runs."""
        from kdagen.runtime import cpu

        return cpu.adjoint_of(self.op.program)

    # -- the training op

    def _cpu(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        if call.empty:
            (o, state), kept = call.unchanged(), self._kept_on_cpu(call)
        elif self.keep == Keep.INPUTS:
            (o, state), kept = self.op.run_on_cpu(call), []
        else:
            from kdagen.runtime import cpu

            o, state, *kept = cpu.run_keeping(self.op.program, call.tensors, call.initial_state, call.like.dtype)
        self.op.note(call.like, "CPU backend, batched matrix products on torch, in training")
        return *call.returned(o, state), kept

    def _kept_on_cpu(self, call) -> list:
        """New tensors for what is kept: the state before each chunk."""
        from kdagen.runtime import cpu

        if self.keep == Keep.INPUTS:
            return []
        chunk = cpu.chunk_size(call.sizes["T"], len(self.op.program.canonical.solving))
        _, state = call.results()
        return [state.new_empty(-(-call.sizes["T"] // chunk), *state.shape)]

    def _cuda(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        kernels = self.op.fitting(call, training=True)
        if call.empty:
            (o, state), kept = call.unchanged(), _kept_by(kernels, call)
        else:
            found = self.op.launch(kernels, call.tensors, initial_state=call.initial_state)
            o, state = (found[kernels.by_role[role]] for role in ("out", "final_state"))
            kept = [found[name] for name in kernels.kept]
        self.op.note(call.like, "kernels in", kernels.folder)
        return *call.returned(o, state), kept

    def _fake(self, *given, **options):
        call = calls.forward(self.signature, given, **options)
        on_gpu = call.like.device.type == "cuda"
        kept = _kept_by(self.op.planned(call), call) if on_gpu else self._kept_on_cpu(call)
        return *call.returned(*call.results()), kept

    # -- the backward op

    def _cpu_backward(self, *given):
        call, kept, d_out, d_state = calls.backward(self.signature, given)
        if call.empty:
            return call.no_gradients(d_state)
        from kdagen.runtime import cpu

        states = kept[0] if kept else None
        gradients, last = cpu.backward(self.adjoint, call.tensors, call.initial_state, d_out, d_state, states)
        return *_as_given(gradients, call.tensors), last

    def _cuda_backward(self, *given):
        call, kept, d_out, d_state = calls.backward(self.signature, given)
        if call.empty:
            return call.no_gradients(d_state)
        kernels = self.op.fitting(call, training=True)
        tensors = call.tensors | dict(zip(kernels.kept, kept, strict=True))
        states = {"initial_state": call.initial_state, "d_out": d_out, "d_final_state": d_state}
        found = self.op.launch(kernels, tensors, "backward", **states)
        return *_as_given(kernels.gradients(found), call.tensors), found[kernels.by_role["d_initial_state"]]

    def _fake_backward(self, *given):
        call, *_ = calls.backward(self.signature, given)
        return *(x.new_empty(x.shape) for x in call.tensors.values()), call.results()[1]

    # -- autograd

    def save(self, ctx, inputs, output) -> None:
        """Keeps what the backward needs where hooks and checkpoints see it: in save_for_backward, and nowhere else."""
        *given, wants_state = inputs
        _, state, *kept = output
        kept = kept[0] if kept else []  # the inference op keeps nothing
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept, *(() if wants_state else (state,)))
        ctx.save_for_backward(*given, *kept)

    def _differentiate(self, ctx, d_out, d_state, d_kept):
        saved, given = ctx.saved_tensors, len(self.signature.tensors) + 1  # read once, for a checkpoint runs at this
        return self._gradients(ctx, saved[:given], list(saved[given:]), d_out, d_state)

    def differentiate_inference(self, ctx, d_out, d_state):
        """Gradients through the inference op, called as a torch op by itself: the forward runs again."""
        import torch

        given = ctx.saved_tensors
        with torch.no_grad():
            *_, kept = self.op.training_op(*given)
        return self._gradients(ctx, given, kept, d_out, d_state)

    def _gradients(self, ctx, given: tuple, kept: list, d_out, d_state) -> tuple:
        needed = ctx.needs_input_grad
        if d_out is None and d_state is None:
            return (None,) * len(needed)
        try:
            gradients = self.op.backward_op(*given, kept, d_out, d_state)
        except RuntimeError as error:
            if "Batching rule" in str(error):
                raise batched(self.signature.name) from None
            raise
        return tuple(x if need else None for x, need in zip((*gradients, None), needed))

    def _refuse(self, ctx, *gradients):
        raise GradientError(
            f"{self.signature.name}: a gradient of its gradient was asked for (create_graph=True), but kdagen derives "
            f"first derivatives only: leave create_graph out, or detach the gradient. At small sizes "
            f"kdagen.reference.recurrence_reference, plain torch in float64, can be differentiated twice"
        )


def _as_given(gradients: dict, tensors: dict):
    """Gradients in the order and dtypes of the arguments; zeros for one on which nothing depends."""
    for name, x in tensors.items():
        found = gradients.get(name)
        yield x.new_zeros(x.shape) if found is None else found.to(x.dtype).contiguous()


def _kept_by(kernels, call) -> list:
    """New tensors for what these kernels keep."""
    import torch

    dims, specs = kernels.dims(call.tensors), kernels.plan["tensors"]
    dtypes = {name: getattr(torch, specs[name]["dtype"]) for name in kernels.kept}
    return [call.like.new_empty(kernels.shape(name, dims), dtype=dtypes[name]) for name in kernels.kept]


def needs_gradient(op: str, given: list) -> bool:
    """Whether autograd wants to go back through a call; a derivative in forward mode is refused."""
    import torch
    from torch.autograd.forward_ad import unpack_dual

    if any(unpack_dual(x).tangent is not None for x in given):
        raise GradientError(
            f"{op} has no derivative in forward mode (torch.func.jvp, torch.autograd.forward_ad): use reverse mode, "
            f"such as backward() or torch.autograd.grad"
        )
    return torch.is_grad_enabled() and any(x.requires_grad for x in given) and not torch.compiler.is_exporting()


def transformed(op: str) -> GradientError:
    """torch takes no library's op with a backward through torch.func."""
    return GradientError(
        f"{op} cannot be differentiated by torch.func (grad, vjp, jacrev): use backward() or torch.autograd.grad"
    )


def batched(op: str) -> GradientError:
    """torch's older vmap, which autograd still uses for batched gradients, takes no library's op."""
    return GradientError(
        f"{op} takes one gradient of its output at a time: leave out is_grads_batched=True (of torch.autograd.grad) or "
        f"vectorize=True (of torch.autograd.functional)"
    )
