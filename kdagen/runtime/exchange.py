"""What passes between ranks that hold consecutive tokens: states, and what is composed of the ranks between.

Tensors alone, and nothing of any op: what the states are is for kdagen.runtime.rank_part to say. All that is sent is
contiguous and on the device of what is computed, and no call is particular to a backend of torch.distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from kdagen.errors import ArgumentError


class Exchange:
    """Ranks in the order of their tokens. All call the same methods in the same order."""

    def __init__(self, name: str, group=None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                f"{name}: torch.distributed is not initialised, expected a group of ranks: run under torchrun, and "
                f"call torch.distributed.init_process_group() first"
            )
        self.name, self.group = name, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ArgumentError(
                f"{name}: rank {dist.get_rank()} is not in the group, expected only its ranks to call: leave the "
                f"others out, or make groups of all ranks by torch.distributed.new_subgroups"
            )

    @property
    def first(self) -> bool:
        """Whether nothing comes before this rank."""
        return self.rank == 0

    def told(self, said) -> list:
        """What each rank says: plain objects, for which a GPU is waited for."""
        every: list = [None] * self.size
        dist.all_gather_object(every, said, group=self.group)
        return every

    def compare(self, said: dict | None, error: Exception | None) -> None:
        """Refuses what differs between ranks; if one refuses its own arguments, so do all."""
        every = self.told(str(error) if error else said)
        if error:
            raise error
        for rank, other in enumerate(every):
            if isinstance(other, str):
                raise ArgumentError(f"{self.name}: rank {rank} of {self.size} refused its arguments: {other}")
        for what, first in every[0].items():
            if any(other[what] != first for other in every):
                listed = ", ".join(f"{other[what]} on rank {rank}" for rank, other in enumerate(every))
                raise ArgumentError(
                    f"{self.name} over {self.size} ranks: {what} is {listed}; expected the same on all, for ranks "
                    f"differ in their tokens alone"
                )

    def before(self, state, transition, columns: int, reverse: bool = False):
        """What comes to this rank from all before it (`reverse`: behind it); None on the first.

        Each rank makes transition x + state of an x that comes to it; the first, whose transition is None, state. In
        round n a rank has composed 2^n ranks up to itself and sends that on by 2^n, the state alone once nothing comes
        before those: at most log2(ranks) times K x (V + columns) numbers, and V of the columns at first and last.
        """
        place = self.size - 1 - self.rank if reverse else self.rank
        own, found, step = (state, None if place == 0 else transition), None, 1
        while step < self.size:
            theirs = None
            if place >= step:
                width = state.shape[-1] + (0 if place < 2 * step else columns)
                theirs = state.new_empty(*state.shape[:-1], width)
            mine = torch.cat([x for x in own if x is not None], -1) if place + step < self.size else None
            self._swap(mine, place + step, theirs, place - step, reverse)
            if theirs is not None:
                came = theirs.split([state.shape[-1], columns][: 1 if place < 2 * step else 2], -1)
                came = came[0], came[1] if len(came) > 1 else None
                found = came if found is None else followed(found, came)
                if place + 2 * step < self.size:
                    own = followed(own, came)
            step *= 2
        return None if found is None else found[0]

    def _swap(self, mine, to: int, theirs, source: int, reverse: bool) -> None:
        """Sends and receives at once; None for neither."""
        pairs = [(op, x, at) for op, x, at in ((dist.isend, mine, to), (dist.irecv, theirs, source)) if x is not None]
        ranks = [self.size - 1 - at if reverse else at for *_, at in pairs]
        ops = [dist.P2POp(op, x, group=self.group, group_peer=rank) for (op, x, _), rank in zip(pairs, ranks)]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def from_last(self, state):
        """The last rank's, on every rank."""
        dist.broadcast(state, group=self.group, group_src=self.size - 1)
        return state

    def to_last(self, cotangent):
        """The sum of all ranks', on the last one; None on others."""
        cotangent = cotangent.contiguous()
        dist.reduce(cotangent, group=self.group, group_dst=self.size - 1)
        return cotangent if self.rank == self.size - 1 else None


def followed(after: tuple, before: tuple) -> tuple:
    """(state, transition) of one part behind another."""
    (state, transition), (past, first) = after, before
    return state + times(transition, past), None if first is None else times(transition, first)


def times(transition, x):
    """M x; a diagonal M is a column."""
    return transition * x if transition.shape[-1] == 1 else transition @ x


def transposed(transition):
    """M^T; a diagonal M is its own."""
    return transition if transition.shape[-1] == 1 else transition.mT
