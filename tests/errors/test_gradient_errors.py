"""Each message that differentiating an op can give."""

import re

import pytest
import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.errors import ArgumentError, GradientError

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in forward mode
SHAPE = (2, 10, 2, 4, 3)


def raises(error, message: str):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


@pytest.fixture
def given():
    drawn = kg.zoo.sample(canonical(kg.load("gla")), SHAPE)
    return [x.requires_grad_() for x in drawn.values()]


@pytest.fixture
def op():
    return kg.compile("gla")


TWICE = (
    "gla: a gradient of its gradient was asked for (create_graph=True), but kdagen derives first derivatives only: "
    "leave create_graph out, or detach the gradient. At small sizes kdagen.reference.recurrence_reference, plain torch "
    "in float64, can be differentiated twice"
)
FORWARD = (
    "gla has no derivative in forward mode (torch.func.jvp, torch.autograd.forward_ad): use reverse mode, such as "
    "backward() or torch.autograd.grad"
)
FUNC = "gla cannot be differentiated by torch.func (grad, vjp, jacrev): use backward() or torch.autograd.grad"
BATCHED = (
    "gla takes one gradient of its output at a time: leave out is_grads_batched=True (of torch.autograd.grad) or "
    "vectorize=True (of torch.autograd.functional)"
)


def test_a_gradient_of_a_gradient(op, given):
    (d_q,) = torch.autograd.grad(op(*given)[0].sum(), given[0], create_graph=True)
    with raises(GradientError, TWICE):
        d_q.sum().backward()


def test_a_gradient_with_create_graph_that_is_not_differentiated_again_is_no_error(op, given):
    (d_q,) = torch.autograd.grad(op(*given)[0].sum(), given[0], create_graph=True)
    assert d_q.requires_grad and torch.isfinite(d_q).all()


def test_what_the_message_advises_is_true(given):
    from kdagen.reference import recurrence_reference

    o, _ = recurrence_reference(kg.load("gla"), dict(zip(("q", "k", "v", "g"), given)))
    (d_q,) = torch.autograd.grad(o.sum(), given[0], create_graph=True)
    (d_v,) = torch.autograd.grad(d_q.sum(), given[2])
    assert d_v.any()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode(op, given, requires_grad):
    from torch.autograd import forward_ad

    q, *rest = (x.requires_grad_(requires_grad) for x in given)
    with forward_ad.dual_level(), raises(GradientError, FORWARD):
        op(forward_ad.make_dual(q, torch.ones_like(q)), *rest)


def test_forward_mode_of_the_state(op, given):
    state = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    with raises(GradientError, FORWARD):
        torch.func.jvp(lambda state: op(*given, initial_state=state)[0], (state,), (state,))


@pytest.mark.parametrize("nested", [False, True])
def test_functional_transforms(op, given, nested):
    q, *rest = (x.detach() for x in given)
    call = torch.func.vmap(lambda q: op(q, *rest)[0]) if nested else lambda q: op(q, *rest)[0]
    with raises(GradientError, FUNC):
        torch.func.grad(lambda q: call(q).sum())(torch.stack([q, q]) if nested else q)


def test_gradients_in_batches(op, given):
    o, _ = op(*given)
    with raises(GradientError, BATCHED):
        torch.autograd.grad(o, given[0], torch.ones(3, *o.shape, dtype=o.dtype), is_grads_batched=True)


COTANGENTS = {
    "shape": (
        {"d_out": torch.zeros(2, 10, 2, 4, dtype=torch.float64)},
        "gla: d_out has shape [2, 10, 2, 4], expected [B, T, HV, V] = [2, 10, 2, 3]: V = 3 is set by v",
    ),
    "heads": (
        {"d_out": torch.zeros(2, 10, 1, 3, dtype=torch.float64)},
        "gla: d_out has shape [2, 10, 1, 3], expected [B, T, HV, V] = [2, 10, 2, 3]: HV = 2 is set by v",
    ),
    "dtype": (
        {"d_out": torch.zeros(2, 10, 2, 3)},
        "gla: d_out is float32, expected float64: call d_out.to(torch.float64)",
    ),
    "state": (
        {"d_final_state": torch.zeros(2, 2, 4, 3)},
        "gla: d_final_state is float32, expected float64: call d_final_state.to(torch.float64)",
    ),
}


@pytest.mark.parametrize("case", COTANGENTS)
def test_cotangents_given_to_the_torch_op(op, given, case):
    cotangents, message = COTANGENTS[case]
    with raises(ArgumentError, message):
        op.backward_op(*given, None, None, [], *({"d_out": None, "d_final_state": None} | cotangents).values())


@pytest.mark.parametrize("choice", [{"keep": "outputs"}, {"training_schedule": {"keep": "outputs"}}])
def test_what_to_keep(choice):
    with raises(ArgumentError, "keep = 'outputs': expected one of inputs, states, all"):
        kg.compile("gla", **choice)
