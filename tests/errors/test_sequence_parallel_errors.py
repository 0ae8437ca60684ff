"""Each message that an op over ranks can give; where ranks differ, on every one of them."""

import re

import pytest
import ranks
import torch
import torch.distributed as dist

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.errors import ArgumentError, GradientError, KdagenError


def raises(error, message: str):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


def given(name: str = "gla", tokens: int = 3, heads: int = 2, batch: int = 1, dtype=torch.float32) -> dict:
    drawn = kg.zoo.sample(canonical(kg.load(name)), (batch, tokens, heads, 4, 3))
    return {n: x.to(dtype) for n, x in drawn.items()}


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield kg.sequence_parallel(kg.compile("gla"))
    dist.destroy_process_group()


def test_what_is_no_op():
    message = "sequence_parallel was given a str, expected an op: kdagen.compile('kda'), or one of a built package"
    with raises(ArgumentError, message):
        kg.sequence_parallel("kda")


def test_torch_distributed_is_not_initialised():
    message = (
        "gla: torch.distributed is not initialised, expected a group of ranks: run under torchrun, and call "
        "torch.distributed.init_process_group() first"
    )
    with raises(ArgumentError, message):
        kg.sequence_parallel(kg.compile("gla"))


def test_states_every(alone):
    message = (
        "gla: states_every = 2, which is not taken over ranks, for each would begin to count by itself: expected some "
        "of initial_state, output_final_state, cu_seqlens, check"
    )
    with raises(ArgumentError, message):
        alone(**given(), states_every=2)


def test_arguments_that_do_not_bind(alone):
    message = "gla takes q, k, v, g (initial_state, output_final_state, cu_seqlens, check): missing g; unknown scale"
    with raises(ArgumentError, message):
        alone(*list(given().values())[:3], scale=1)


def test_no_piece(alone):
    message = (
        "gla: cu_seqlens holds no piece, expected at least one on each rank: [0, 0] where the sequence that goes on "
        "has no token"
    )
    with raises(ArgumentError, message):
        alone(**given(), cu_seqlens=torch.tensor([0]))


def test_a_gradient_of_a_gradient(alone):
    tensors = {n: x.requires_grad_() for n, x in given().items()}
    (d_q,) = torch.autograd.grad(alone(**tensors)[0].sum(), tensors["q"], create_graph=True)
    with pytest.raises(GradientError, match=r"^gla: a gradient of its gradient was asked for \(create_graph=True\)"):
        d_q.sum().backward()


# -- what differs between ranks, and what all of them say of it

OVER = "gla over 2 ranks: {}; expected the same on all, for ranks differ in their tokens alone"
DIFFERENT = {
    "heads": OVER.format("H is 2 on rank 0, 4 on rank 1"),
    "batch": OVER.format("B is 1 on rank 0, 2 on rank 1"),
    "dtype": OVER.format("dtype is float32 on rank 0, float64 on rank 1"),
    "cu_seqlens": OVER.format("cu_seqlens is None on rank 0, given on rank 1"),
    "final state": OVER.format("output_final_state is False on rank 0, True on rank 1"),
    "gradient": OVER.format("that a gradient is wanted is False on rank 0, True on rank 1"),
    "layout": OVER.format("the type of states is KV float32 on rank 0, VK float32 on rank 1"),
}


def different(case: str, rank: int):
    """A call that is unlike on rank 1."""
    changed = rank == 1
    tensors = given(
        heads=4 if changed and case == "heads" else 2,
        batch=2 if changed and case == "batch" else 1,
        dtype=torch.float64 if changed and case == "dtype" else torch.float32,
    )
    if changed and case == "gradient":
        tensors["v"].requires_grad_()
    ends = torch.tensor([0, 3]) if changed and case == "cu_seqlens" else None
    op = kg.compile("gla", state_layout="VK" if changed and case == "layout" else "KV")
    final = changed and case == "final state"
    return kg.sequence_parallel(op)(**tensors, cu_seqlens=ends, output_final_state=final)


def said(call) -> str:
    """The message of a call's error."""
    try:
        call()
    except KdagenError as error:
        return str(error)
    return "nothing"


def on_rank(rank: int) -> dict:
    found = {case: said(lambda case=case: different(case, rank)) for case in DIFFERENT}
    name = ("gla", "retnet")[rank]
    found["recurrence"] = said(lambda: kg.sequence_parallel(kg.compile(name))(**given(name)))
    op, wrong = kg.sequence_parallel(kg.compile("gla")), given()
    op(**wrong)  # compared once
    wrong["k"] = wrong["k"].fill_(float("nan")) if rank else wrong["k"]
    found["refused"] = said(lambda: op(**wrong, check=True))
    first = dist.new_group([0])
    found["outside"] = said(lambda: kg.sequence_parallel(kg.compile("gla"), first))
    return found


@pytest.fixture(scope="module")
def messages():
    return ranks.on_ranks(on_rank, 2)


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ(case, messages):
    assert [found[case] for found in messages] == [DIFFERENT[case]] * 2


def test_another_recurrence(messages):
    for name, found in zip(("gla", "retnet"), messages):
        pattern = (
            rf"{name} over 2 ranks: the recurrence is gla \(\w{{12}}\) on rank 0, retnet \(\w{{12}}\) on rank 1; exp"
        )
        assert re.match(pattern, found["recurrence"]), found["recurrence"]


def test_a_rank_that_refuses_its_arguments(messages):
    own = (
        "gla: k[0, 0, 0, 0] is nan, expected finite numbers: look at what made k, or replace it by torch.nan_to_num(k)"
    )
    assert [found["refused"] for found in messages] == [f"gla: rank 1 of 2 refused its arguments: {own}", own]


def test_a_rank_outside_the_group(messages):
    message = (
        "gla: rank 1 is not in the group, expected only its ranks to call: leave the others out, or make groups of all "
        "ranks by torch.distributed.new_subgroups"
    )
    assert [found["outside"] for found in messages] == ["nothing", message]
