"""An op in training: its forward that keeps what a backward needs, its backward, and how autograd joins the two.

Both are torch ops of their own (torch_op), so that compilers see them whole; what inference runs is in op. How much is
kept is the user's choice, `kdagen.compile(..., keep=...)`.
"""

from __future__ import annotations

from functools import cached_property

from kdagen.errors import GradientError
from kdagen.runtime import call as calls
from kdagen.runtime.cpu_schedule import schedule_of
from kdagen.runtime.torch_op import NAMES, Implementation
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

    def call(self, given: tuple, named: dict):
        """What the training op was given, shapes and dtypes checked."""
        return calls.forward(self.signature, self.op.state, NAMES["_training"], given, named)

    def _cpu(self, *given, **named):
        call = self.call(given, named)
        call.check_values()
        if call.empty:
            (o, state, _), kept = call.unchanged(), self._kept_on_cpu(call)
        elif self.keep == Keep.INPUTS:
            (o, state, _), kept = self.op.run_on_cpu(call, "training"), []
        else:
            from kdagen.runtime import cpu

            inside, schedule = call.inside(call.initial_state), schedule_of(self.op, call, "training")
            given = call.tensors, inside, call.like.dtype, call.ends, schedule
            o, state, *kept = cpu.run_keeping(self.op.program, *given)
            state = call.outside(state)
        self.op.note(call.like, "CPU backend, batched matrix products on torch, in training")
        return *call.returned(o, state, None)[:2], kept

    def _kept_on_cpu(self, call) -> list:
        """New tensors for what is kept: the state before each chunk."""
        import torch

        from kdagen.runtime import cpu

        if self.keep == Keep.INPUTS:
            return []
        ragged = None if call.cu_seqlens is None else call.sizes["N"]
        batch, tokens = call.sizes["B"], call.sizes["T"]
        rows = schedule_of(self.op, call, "training").rows
        chunks = cpu.kept_chunks(batch, tokens, ragged, len(self.op.program.canonical.solving), rows)
        dtype = torch.promote_types(call.like.dtype, torch.float32)
        return [call.like.new_empty(chunks, 1, *(call.sizes[d] for d in ("HV", "K", "V")), dtype=dtype)]

    def _cuda(self, *given, **named):
        call = self.call(given, named)
        if call.check:
            call.check_values()
        kernels = self.op.fitting(call, "training")
        if call.empty:
            (o, state, _), kept = call.unchanged(), _kept_by(kernels, call)
        else:
            found = self.op.launch(kernels, call.given, initial_state=call.initial_state)
            o, state = (found[kernels.by_role[role]] for role in ("out", "final_state"))
            kept = [found[name] for name in kernels.kept]
        self.op.note(call.like, "kernels in", kernels.folder)
        return *call.returned(o, state, None)[:2], kept

    def _fake(self, *given, **named):
        call = self.call(given, named)
        on_gpu = call.like.device.type == "cuda"
        kept = _kept_by(self.op.planned(call), call) if on_gpu else self._kept_on_cpu(call)
        return *call.returned(*call.results())[:2], kept

    # -- the backward op

    def _cpu_backward(self, *given):
        call, kept, d_out, d_state = calls.backward(self.signature, self.op.state, given)
        if call.empty:
            return call.no_gradients(d_state)
        from kdagen.runtime import cpu

        first, kept = call.inside(call.initial_state), kept[0] if kept else None
        schedule = schedule_of(self.op, call, "training")
        given = call.tensors, first, d_out, call.inside(d_state), kept, call.ends, schedule
        gradients, last = cpu.backward(self.adjoint, *given)
        return *_as_given(gradients, call.tensors), call.outside(last)

    def _cuda_backward(self, *given):
        call, kept, d_out, d_state = calls.backward(self.signature, self.op.state, given)
        if call.empty:
            return call.no_gradients(d_state)
        kernels = self.op.fitting(call, "training")
        given = call.given | dict(zip(kernels.kept, kept, strict=True))
        states = {"initial_state": call.initial_state, "d_out": d_out, "d_final_state": d_state}
        found = self.op.launch(kernels, given, "backward", **states)
        return *_as_given(kernels.gradients(found), call.tensors), found[kernels.by_role["d_initial_state"]]

    def _fake_backward(self, *given):
        call, *_ = calls.backward(self.signature, self.op.state, given)
        return *(x.new_empty(x.shape) for x in call.tensors.values()), call.results()[1]

    # -- autograd

    def save(self, ctx, inputs, output) -> None:
        """Keeps what the backward needs where hooks and checkpoints see it: in save_for_backward, and nowhere else."""
        count = len(self.signature.tensors)
        tensors, (initial_state, wants_state, cu_seqlens, *_) = inputs[:count], inputs[count:]
        _, state, rest = output
        kept = rest if isinstance(rest, (list, tuple)) else [rest]  # the inference op: states, which have no gradient
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept, *(() if wants_state else (state,)))
        ctx.save_for_backward(*tensors, initial_state, cu_seqlens, *kept)

    def _differentiate(self, ctx, d_out, d_state, d_kept):
        saved, given = ctx.saved_tensors, len(self.signature.tensors) + 2  # read once, for a checkpoint runs at this
        return self._gradients(ctx, saved[:given], list(saved[given:]), d_out, d_state)

    def differentiate_inference(self, ctx, d_out, d_state, d_states):
        """Gradients through the inference op, called as a torch op by itself: the forward runs again."""
        import torch

        *tensors, initial_state, cu_seqlens, _ = ctx.saved_tensors
        with torch.no_grad():
            *_, kept = self.op.training_op(*tensors, initial_state, False, cu_seqlens)
        return self._gradients(ctx, (*tensors, initial_state, cu_seqlens), kept, d_out, d_state)

    def _gradients(self, ctx, given: tuple, kept: list, d_out, d_state) -> tuple:
        """Of the tensors and the initial state; the other options have none."""
        needed = ctx.needs_input_grad
        if d_out is None and d_state is None:
            return (None,) * len(needed)
        try:
            gradients = self.op.backward_op(*given, kept, d_out, d_state)
        except RuntimeError as error:
            if "Batching rule" in str(error):
                raise batched(self.signature.name) from None
            raise
        options = (None,) * (len(needed) - len(gradients))
        return tuple(x if need else None for x, need in zip((*gradients, *options), needed))

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

    dims, specs = kernels.dims(call.given), kernels.plan["tensors"]
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


def inference_only(op: str, what: str) -> GradientError:
    """What a call that has no backward says."""
    return GradientError(
        f"{op}: {what} is for inference and has no gradient, but arguments require one: call it under "
        f"torch.no_grad(), or detach them; op(...) without states_every is what trains"
    )


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
