"""Real processes that stand for ranks: a function on each, and what it returned."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(function, count: int, *args) -> list:
    """What function(rank, *args) returns on each of so many ranks of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one, (function, count, folder, args), count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank: int, function, count: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=wait)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
