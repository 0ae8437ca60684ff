"""The processes of a run: one, or those that torchrun started, which share parameters and batches (FSDP2).

Each holds a part of the parameters and of the optimiser, and reads a part of each batch; the sums are those of one
process. What is saved is whole, so that any number of processes can go on from it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import distributed

from kdagen.errors import KdagenError, TrainingError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str = "cpu") -> Processes:
        """Those of torchrun, each with a GPU of its own where the device is "cuda"; alone without torchrun."""
        if not distributed.is_torchelastic_launched():
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{distributed.get_node_local_rank()}"
            torch.cuda.set_device(device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def leave(self) -> None:
        """After the last thing that processes do together."""
        if self.count > 1:
            distributed.barrier()
            gc.collect()  # divided models hold groups of processes, whose threads must have ended when Python ends
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """The sequences of a batch that are this process's."""
        if batch % self.count:
            raise TrainingError(
                f"a batch of {batch} sequences cannot be divided among {self.count} processes: expected a multiple of "
                f"{self.count}, such as {-(-batch // self.count) * self.count}"
            )
        each = batch // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, *numbers) -> list[float]:
        """Sums over all processes."""
        found = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in numbers])
        if self.count > 1:
            distributed.all_reduce(found)
        return found.tolist()

    def agreed(self, make):
        """What `make` gives the first process, on all; an error that kdagen raises in it is raised on all too."""
        if self.count == 1:
            return make()
        found = [None]
        if self.first:
            try:
                found = [make()]
            except KdagenError as error:
                found = [error]
        distributed.broadcast_object_list(found)
        if isinstance(found[0], KdagenError):
            raise found[0]
        return found[0]

    def share(self, model) -> None:
        """Divides a model's parameters among the processes, each layer's gathered when it runs."""
        if self.count == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(self.device).type, (self.count,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def whole(self, model):
        """The model with all of its parameters, on the first process; None on others."""
        if self.count == 1:
            return model
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        from kdagen.models.model import KimiLinear

        tensors = get_model_state_dict(model, options=self.options())
        if not self.first:
            return None
        with torch.device("meta"):
            found = KimiLinear(model.config)
        found.load_state_dict(tensors, assign=True)
        return found

    def state(self, model, optimizer) -> tuple[dict, dict]:
        """The whole states of model and optimiser by the parameters' names, on the first process."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        return get_state_dict(model, optimizer, options=self.options())

    def restore(self, model, optimizer, state: tuple[dict, dict] | None) -> None:
        """Gives each process its part of what `state` gave the first."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        own, of_optimizer = state or ({}, {})
        options = self.options(broadcast_from_rank0=self.count > 1)
        set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=of_optimizer, options=options)

    def options(self, **others):
        """Of torch's functions for states: whole tensors, on the CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(full_state_dict=True, cpu_offload=True, **others)
