"""Memory that shows what a kernel writes outside its tensors, and which elements it leaves unwritten."""

from __future__ import annotations

POISON = 0xFF  # as bytes of any floating dtype: a NaN that no arithmetic makes
GUARD_BYTES = 1 << 14


class Guarded:
    """Allocates tensors of NaN between guard regions; `allocate` is what LoadedOp.launch asks for."""

    def __init__(self, device="cpu"):
        self.device, self._made = device, []  # of each tensor: the bytes around it and what it is, for people

    def allocate(self, shape, dtype: str, device=None, zero: bool = False):
        """A tensor of poison, or of zeros."""
        import torch

        like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        size = like.numel() * like.element_size()
        buffer = torch.full((size + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8, device=device or self.device)
        self._made.append((buffer, f"{dtype} {list(like.shape)}"))
        tensor = buffer[GUARD_BYTES : GUARD_BYTES + size].view(like.dtype).view(like.shape)
        return tensor.zero_() if zero else tensor

    def copy(self, tensor):
        """The same values on the device, guarded; None stays None."""
        if tensor is None:
            return None
        return self.allocate(tensor.shape, str(tensor.dtype).removeprefix("torch.")).copy_(tensor)

    def broken(self) -> str:
        """What the tensor is whose guards were written to; nothing if all are as they were made."""
        edges = ((edge, what) for b, what in self._made for edge in (b[:GUARD_BYTES], b[-GUARD_BYTES:]))
        return next((what for edge, what in edges if not bool((edge == POISON).all())), "")


def unwritten(tensor) -> int:
    """How many elements are still poison."""
    import torch

    as_bytes = tensor.contiguous().view(torch.uint8).view(-1, tensor.element_size())
    return int((as_bytes == POISON).all(1).sum())


def same_bits(a, b) -> bool:
    """Equality of bits, NaN and signs of zero included."""
    import torch

    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
