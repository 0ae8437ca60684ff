"""A model whose sequences are split over ranks: logits and gradients are those of one process."""

from itertools import accumulate, pairwise

import pytest
import ranks
import torch
import torch.distributed as dist
from small_models import model, tokens

from kdagen.errors import ArgumentError
from kdagen.runtime.sequence_parallel import part_of

KDA = {"kda_layers": [1, 2], "full_attn_layers": [3]}
CASES = {  # linear_attn_config, other fields, tokens of each rank, ends of sequences in a row
    "hybrid": (KDA, {}, (7, 2, 9), None),
    "residuals, gates, no tokens": (KDA, {"attn_res_block_size": 2, "mla_use_output_gate": True}, (5, 0, 8), None),
    "no tokens first": (KDA, {}, (0, 6, 5), None),
    "sequences in a row": (KDA, {}, (7, 2, 9), (0, 3, 12, 18)),
    "of another recurrence, in a row": (KDA | {"mixer": "rwkv7"}, {}, (6, 7, 4), (0, 6, 7, 17)),
}


def run(name: str, ids, ends, weights, group=None) -> tuple:
    """Logits, and of their weighted sum the gradient of each parameter, in float64."""
    linear, others, *_ = CASES[name]
    made = model(linear, num_hidden_layers=3, **others).double()
    logits = made(ids, cu_seqlens=ends, group=group)
    (logits * weights).sum().backward()
    return logits.detach(), {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in made.named_parameters()}


def drawn(name: str) -> tuple:
    """Tokens, and weights of logits, of the whole."""
    *_, counts, ends = CASES[name]
    ids = tokens(2 if ends is None else 1, sum(counts))
    return ids, torch.randn(*ids.shape, 97, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def on_rank(rank: int) -> dict:
    found = {}
    for name, (_, _, counts, ends) in CASES.items():
        start, end = list(pairwise([0, *accumulate(counts)]))[rank]
        ids, weights = drawn(name)
        own = None if ends is None else part_of(torch.tensor(ends), start, end)[0]
        found[name] = run(name, ids[:, start:end], own, weights[:, start:end], dist.group.WORLD)
    made = model(KDA, num_hidden_layers=3)
    ends = torch.tensor([0, 4] if rank else [0])
    found["batches"] = said(lambda: made(tokens(1 + rank, 4), group=dist.group.WORLD))
    found["no sequence"] = said(lambda: made(tokens(1, 4 if rank else 0), cu_seqlens=ends, group=dist.group.WORLD))
    found["cache"] = said(lambda: made(tokens(1, 4), cache=made.new_cache(), group=dist.group.WORLD))
    found["last"] = said(lambda: made(tokens(1, 4), last=True, group=dist.group.WORLD))
    first = dist.new_group([0, 1])
    found["outside"] = said(lambda: made(tokens(1, 4), group=first)) if rank == 2 else ""
    return found


def said(call) -> str:
    """The message of a call's error."""
    with pytest.raises(ArgumentError) as refused:
        call()
    return str(refused.value)


@pytest.fixture(scope="module")
def found():
    return ranks.on_ranks(on_rank, 3)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name, found):
    ids, weights = drawn(name)
    ends = CASES[name][-1]
    logits, gradients = run(name, ids, None if ends is None else torch.tensor(ends), weights)
    parts = [part[name] for part in found]
    assert (torch.cat([x for x, _ in parts], 1) - logits).abs().max() <= 1e-12 * logits.abs().max()
    for n, expected in gradients.items():
        mine = sum(x[n] for _, x in parts)
        assert (mine - expected).norm() <= 1e-11 * expected.norm(), n


BESIDE = (
    "{} was given beside a group: expected neither, for sequences are split over ranks in training and scoring alone; "
    "generate in one process"
)
ERRORS = {
    "batches": "the batch is 1 on rank 0, 2 on rank 1, 3 on rank 2; expected the same on all, for ranks differ in "
    "their tokens alone",
    "no sequence": "cu_seqlens of rank 0 holds no sequence, expected at least one on each rank: [0, 0] where the one "
    "that goes on has no token",
    "cache": BESIDE.format("a cache"),
    "last": BESIDE.format("last=True"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, found):
    assert [part[case] for part in found] == [ERRORS[case]] * 3


def test_a_rank_outside_the_group(found):
    assert found[2]["outside"].startswith("the model: rank 2 is not in the group, expected only its ranks to call: ")
