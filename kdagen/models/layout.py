"""Where the tokens of a call stand: rows of a batch, or sequences behind each other in one row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from kdagen.errors import ArgumentError


@dataclass(frozen=True)
class Layout:
    """B rows of T tokens, each a sequence; or one row, cut by `ends`. `past`: tokens of each that came before."""

    batch: int
    tokens: int
    ends: tuple[int, ...] | None = None
    cu_seqlens: object = None  # ends as a tensor on the tokens' device
    past: tuple[int, ...] | None = None  # None: there is no cache
    ranks: object = None  # those that sequences are split over (kdagen.models.ranks)

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.batch if self.ends is None else len(self.ends) - 1

    @property
    def steps(self) -> bool:
        """Whether each sequence has exactly one token, in a row of its own."""
        return self.ends is None and self.tokens == 1

    @cached_property
    def pieces(self) -> tuple[slice, ...]:
        """Where each sequence of a ragged row stands."""
        return tuple(map(slice, self.ends, self.ends[1:]))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        if self.ends is None:
            return (self.tokens,) * self.batch
        return tuple(b - a for a, b in zip(self.ends, self.ends[1:]))

    @cached_property
    def alike(self) -> bool:
        """Whether all sequences have rows of their own and pasts of one length."""
        return self.ends is None and len(set(self.past or (0,))) == 1

    def of(self, x, n: int):
        """Sequence n of a tensor [B, T, ...], as a batch of one."""
        return x[n : n + 1] if self.ends is None else x[:, self.pieces[n]]

    def joined(self, parts: list):
        """The inverse of `of`, for all sequences."""
        import torch

        return torch.cat(parts, 0 if self.ends is None else 1)


def layout_of(ids, cu_seqlens, past: tuple[int, ...] | None, group=None) -> Layout:
    """The layout of a call, checked; over the ranks of a group if there is one."""
    if ids.dim() != 2:
        raise ArgumentError(
            f"input_ids has shape {list(ids.shape)}, expected [B, T]: call input_ids.unsqueeze(0) for one sequence"
        )
    ends = None
    if cu_seqlens is not None:
        ends = tuple(cu_seqlens.tolist())
        if ids.shape[0] != 1 or ends[:1] != (0,) or list(ends) != sorted(ends) or ends[-1] != ids.shape[1]:
            raise ArgumentError(
                f"cu_seqlens is {list(ends)} for input_ids of shape {list(ids.shape)}: expected one row of tokens, and "
                f"0 and the end of each sequence, the last being {ids.shape[1]}"
            )
    found = Layout(*ids.shape, ends, cu_seqlens, past)
    if group is not None:
        from kdagen.models.ranks import ranks_of

        found = replace(found, ranks=ranks_of(group, ids.shape[0], found.lengths, ends is not None))
    if past is not None and len(past) != found.sequences:
        raise ArgumentError(
            f"the cache holds {len(past)} sequences, input_ids {found.sequences}: expected as many, such as "
            f"model.new_cache({found.sequences})"
        )
    return found
