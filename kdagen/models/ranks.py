"""A model whose sequences are split over ranks: what its layers need of the tokens before a rank's own.

A recurrence needs a state (kdagen.sequence_parallel), a short convolution the last inputs, full attention all latents.
What each rank's own tokens are is in layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kdagen.errors import ArgumentError
from kdagen.runtime.exchange import Exchange


@dataclass(frozen=True, eq=False)
class Ranks:
    """A group of ranks with consecutive tokens: of each, how many belong to the sequences that go on.

    `begins` says of each rank whether what goes on begins there, in a row of sequences behind each other; else it goes
    on from the rank before.
    """

    group: object
    rank: int
    counts: tuple[int, ...]
    begins: tuple[bool, ...]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.counts)

    @property
    def past(self) -> range:
        """The ranks that hold what comes to this one."""
        first = max((n for n in range(self.rank) if self.begins[n]), default=0)
        return range(first, self.rank)

    def over(self, op):
        """An op on sequences that are split."""
        return _over(op, self.group)

    def behind(self, x, keep: int | None = None) -> tuple:
        """(what comes before x [B, T, C] in the sequences that come from other ranks, x), gradients to the ranks that
        hold it included; of what comes before the last `keep` tokens, zero where there were none, or all."""
        found = Behind.apply(x, self, keep)
        return found.split((found.shape[1] - x.shape[1], x.shape[1]), 1)


@lru_cache(maxsize=256)
def _over(op, group):
    import kdagen

    return kdagen.sequence_parallel(op, group)


def ranks_of(group, batch: int, lengths: tuple[int, ...], ragged: bool) -> Ranks:
    """The ranks of a call, each of which has told the others of its tokens."""
    exchange = Exchange("the model", group)
    every = exchange.told((batch, ragged, len(lengths), lengths[-1] if lengths else 0))
    if len({said[:2] for said in every}) > 1:
        listed = ", ".join(f"{b}{' and cu_seqlens' if r else ''} on rank {n}" for n, (b, r, *_) in enumerate(every))
        raise ArgumentError(f"the batch is {listed}; expected the same on all, for ranks differ in their tokens alone")
    *_, pieces, counts = zip(*every)
    if ragged and 0 in pieces:
        raise ArgumentError(
            f"cu_seqlens of rank {pieces.index(0)} holds no sequence, expected at least one on each rank: [0, 0] where "
            f"the one that goes on has no token"
        )
    return Ranks(group, exchange.rank, counts, tuple(ragged and n > 1 for n in pieces))


class Behind(torch.autograd.Function):
    """x [B, T, C] behind what comes from the ranks before: one all_gather, and in the backward one reduce_scatter."""

    @staticmethod
    def forward(ctx, x, ranks: Ranks, keep: int | None):
        counts = [n if keep is None else min(n, keep) for n in ranks.counts]
        ctx.ranks, ctx.keep, ctx.counts, ctx.tokens = ranks, keep, counts, x.shape[1]
        every = _gathered(x[:, x.shape[1] - counts[ranks.rank] :], counts, ranks.group)
        before = torch.cat([x[:, :0], *(every[n][:, : counts[n]] for n in ranks.past)], 1)
        if keep is not None:
            before = _in_front(before, keep)[:, max(0, before.shape[1] - keep) :]
        return torch.cat([before, x], 1)

    @staticmethod
    def backward(ctx, gradient):
        ranks, counts = ctx.ranks, ctx.counts
        before, own = gradient.split((gradient.shape[1] - ctx.tokens, ctx.tokens), 1)
        held = [counts[n] for n in ranks.past]
        before = _in_front(before[:, max(0, before.shape[1] - sum(held)) :], sum(held))
        asked = dict(zip(ranks.past, before.split(held, 1)))
        mine = _scattered([asked.get(n, own[:, :0]) for n in range(ranks.size)], counts, ranks)
        return own + F.pad(mine, (0, 0, ctx.tokens - mine.shape[1], 0)), None, None


def _in_front(x, count: int):
    """At least so many tokens, zeros before the first."""
    return F.pad(x, (0, 0, max(0, count - x.shape[1]), 0))


def _padded(x, count: int):
    """So many tokens, zeros behind the last."""
    return F.pad(x, (0, 0, 0, count - x.shape[1])).contiguous()


def _gathered(x, counts: list[int], group) -> list:
    """Of every rank its tokens, and zeros behind them."""
    mine = _padded(x, max(counts))
    every = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(every, mine, group=group)
    return every


def _scattered(parts: list, counts: list[int], ranks: Ranks):
    """The sum of what all ranks ask of this one's tokens."""
    padded = [_padded(part, max(counts)) for part in parts]
    mine = torch.empty_like(padded[0])
    dist.reduce_scatter(mine, padded, group=ranks.group)
    return mine[:, : counts[ranks.rank]]
