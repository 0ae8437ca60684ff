"""A sequence in pieces is the sequence whole: chunks, single tokens, ragged batches, and over a file."""

import pytest
import torch
from small_models import close, model, tokens

from kdagen.models import Cache, mla

TOKENS = tokens(3, 60)
KINDS = {
    "release": {},
    "k3": {
        "linear": {"gate_lower_bound": -5.0, "use_full_rank_gate": True},
        **{"q_lora_rank": 12, "mla_use_output_gate": True, "attn_res_block_size": 2, "hidden_act": "situ"},
    },
    "full": {"linear": {"ratio": 0}},
}


@pytest.fixture(params=KINDS)
def small(request):
    return model(**KINDS[request.param])


def ragged(rows: list):
    """Sequences behind each other, and their ends."""
    return torch.cat(rows).unsqueeze(0), torch.tensor([0, *map(len, rows)]).cumsum(0)


@torch.no_grad()
def test_chunks_and_tokens(small):
    expected, cache = small(TOKENS), small.new_cache(3)
    cuts = [0, 17, 18, 19, 19, 40, 41, 60]
    found = [small(TOKENS[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
    assert close(torch.cat(found, 1), expected)
    assert cache.lengths == [60, 60, 60]


@torch.no_grad()
def test_a_ragged_batch_is_its_sequences(small):
    rows = [TOKENS[0, :7], TOKENS[1, :0], TOKENS[1], TOKENS[2, :1], TOKENS[2, :33]]
    found = small(*ragged(rows)[:1], cu_seqlens=ragged(rows)[1])
    expected = torch.cat([small(row.unsqueeze(0)) for row in rows if len(row)], 1)
    assert close(found, expected)


@torch.no_grad()
def test_ragged_pasts(small):
    """Sequences of different lengths go on: a token each, several each, and ragged again."""
    cache, starts = small.new_cache(3), (5, 31, 12)
    expected = small(TOKENS)
    ids, ends = ragged([row[:n] for row, n in zip(TOKENS, starts)])
    last = small(ids, cache=cache, cu_seqlens=ends, last=True)
    assert close(last, torch.stack([expected[n, start - 1] for n, start in enumerate(starts)]))
    at = list(starts)
    for count in (1, 1, 4, 1):
        ids = torch.stack([row[n : n + count] for row, n in zip(TOKENS, at)])
        found = small(ids, cache=cache)
        assert all(close(found[i], expected[i, n : n + count]) for i, n in enumerate(at))
        at = [n + count for n in at]
    ids, ends = ragged([TOKENS[0, at[0] : at[0] + 9], TOKENS[1, :0], TOKENS[2, at[2] : at[2] + 2]])
    found = small(ids, cache=cache, cu_seqlens=ends)[0]
    assert close(found[:9], expected[0, at[0] : at[0] + 9]) and close(found[9:], expected[2, at[2] : at[2] + 2])
    assert cache.lengths == [at[0] + 9, at[1], at[2] + 2]


@torch.no_grad()
def test_over_a_file(small, tmp_path):
    cache = small.new_cache(3)
    small(TOKENS[:, :20], cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    expected = [small(TOKENS[:, t : t + 1], cache=cache) for t in range(20, 24)]
    again = Cache.load(tmp_path / "cache.safetensors", small)
    assert again.lengths == [20, 20, 20]
    for t, logits in zip(range(20, 24), expected):
        assert torch.equal(small(TOKENS[:, t : t + 1], cache=again), logits)


@torch.no_grad()
def test_long_pasts(monkeypatch):
    """Heads, and queries behind a past, go in blocks where there are many: the same."""
    small = model(linear={"ratio": 0})
    expected, cache = small(TOKENS), small.new_cache(3)
    monkeypatch.setattr(mla, "MASK_ELEMENTS", 200)
    monkeypatch.setattr(mla, "KEY_ELEMENTS", 100)
    found = [small(TOKENS[:, a:b], cache=cache) for a, b in ((0, 17), (17, 60))]
    assert close(torch.cat(found, 1), expected)


@torch.no_grad()
def test_some_of_the_sequences(small):
    cache = small.new_cache(3)
    small(TOKENS[:, :20], cache=cache)
    chosen = cache.select([2, 0, 2])
    expected = small(TOKENS)
    found = small(TOKENS[[2, 0, 2], 20:25], cache=chosen)
    assert close(found, expected[[2, 0, 2], 20:25])
    assert close(small(TOKENS[:, 20:25], cache=cache), expected[:, 20:25])  # the first is as it was


@torch.no_grad()
def test_bytes():
    """Latents by the token; states and convolutions are the same however long a sequence is."""
    small = model().to(torch.bfloat16)
    cache = small.new_cache(2)
    small(TOKENS[:2, :20], cache=cache)
    assert cache.bytes["latents"] == 2 * 20 * (16 + 8) * 2
    assert cache.bytes["states"] == 3 * 2 * 2 * 16 * 16 * 4
    assert cache.bytes["convolutions"] == 3 * 2 * 3 * 3 * 32 * 2
