"""torch tensors as the numpy arrays that simulators run on, sharing memory (numpy knows bfloat16 through ml_dtypes)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdagen.simulate.memory import BFLOAT16

if TYPE_CHECKING:
    import torch


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """An array's memory as a tensor."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
