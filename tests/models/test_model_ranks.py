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
    try:
        made(tokens(1 + rank, 4), group=dist.group.WORLD)
    except ArgumentError as error:
        found["batches"] = str(error)
    return found


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


def test_batches_that_differ(found):
    message = (
        "the batch is 1 on rank 0, 2 on rank 1, 3 on rank 2; expected the same on all, for ranks differ in their "
        "tokens alone"
    )
    assert [part["batches"] for part in found] == [message] * 3
