"""Linear attention under FLA's names, with the normaliser that it may have: o / (q . sum of the keys so far).

The sum of keys is plain torch beside the op: it is a cumulative sum, which needs no kernel of its own.
"""

from __future__ import annotations

from kdagen.fla.call import Call, default_scale, reversed_call
from kdagen.fla.linear import LINEAR


def chunk_linear_attn(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    normalize: bool = True, cu_seqlens=None,
):  # fmt: skip
    """(o [B, T, H, V], final state) of linear attention, its state a pair if normalised.

    q and k [B, T, H, K]; v [B, T, H, V]. With normalize=True o is divided by q . (sum of keys), and states are
    (state [N, H, K, V] or None, sum of keys [N, 1, H, K]); an initial_state may then be such a pair.
    """
    return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_chunk_linear_attn(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    normalize: bool = True, cu_seqlens=None,
):  # fmt: skip
    """`chunk_linear_attn` under its other name."""
    return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, normalize: bool = False, cu_seqlens=None,
):  # fmt: skip
    """Linear attention token by token, from the last to the first with reverse=True."""
    return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, True, reverse)


def _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, step=False, reverse=False):
    state, keys = initial_state if normalize and isinstance(initial_state, tuple) else (initial_state, None)
    scale = default_scale(q, scale)
    call = Call(state, output_final_state, cu_seqlens, token_by_token=step, reverse=reverse)
    o, final = call.run((LINEAR, scale), {"q": q, "k": k, "v": v})
    if not normalize:
        return o, final
    given = [q, k]
    if reverse:
        given, keys, cu_seqlens = reversed_call(given, keys, cu_seqlens)
    sums, last = _sums_of_keys(given[1], keys, cu_seqlens)
    weight = (scale * given[0] * sums).sum(-1, keepdim=True) + 1e-10
    if reverse:
        weight, last = weight.flip(1), last if cu_seqlens is None else last.flip(0)
    return (o / weight).to(q.dtype), (final, last)


def _sums_of_keys(k, keys, cu_seqlens) -> tuple:
    """The sum of a sequence's keys up to each token [B, T, H, K], and up to its end [N, 1, H, K]."""
    import torch

    sums = torch.cat([k.new_zeros(k.shape[0], 1, *k.shape[2:]), k], 1).to(torch.promote_types(k.dtype, torch.float32))
    sums = sums.cumsum(1)
    if cu_seqlens is None:
        sums = sums if keys is None else sums + keys
        return sums[:, 1:], sums[:, -1:]
    ends = cu_seqlens.long()
    before = sums[0, ends[:-1]] if keys is None else sums[0, ends[:-1]] - keys.squeeze(1)
    sequence = torch.searchsorted(ends[1:], torch.arange(k.shape[1], device=k.device), right=True)
    sequence = sequence.clamp(max=len(ends) - 2)
    return sums[:, 1:] - before[sequence], (sums[0, ends[1:]] - before).unsqueeze(1)
