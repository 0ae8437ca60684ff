"""kdagen in transformers: its kimi_linear model computes Kimi Delta Attention by kdagen's ops.

kdagen.hf.patch()             # until kdagen.hf.unpatch()
with kdagen.hf.patch(): ...   # or until the end of the block
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

from kdagen.errors import ArgumentError

MODULE = "transformers.models.kimi_linear.modeling_kimi_linear"
_replaced: dict = {}


def chunk_kimi_delta_attention(
    query, key, value, g, beta, chunk_size: int = 64, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """Prefill and training: g is the log decay, beta a sigmoid already, states are [B, H, K, V]; options of models
    that mean nothing here are ignored, and so is chunk_size, which kdagen chooses."""
    from kdagen.fla.kda import chunk_kda

    return chunk_kda(
        query,
        key,
        value,
        g,
        beta,
        initial_state=_full(initial_state),
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def recurrent_kimi_delta_attention(
    query, key, value, g, beta, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """Decoding, token by token; arguments as `chunk_kimi_delta_attention` has."""
    from kdagen.fla.kda import fused_recurrent_kda

    return fused_recurrent_kda(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def _full(state):
    """A state in float32, whatever a cache keeps it in."""
    import torch

    return state if state is None else state.to(torch.promote_types(state.dtype, torch.float32))


SERVED = (chunk_kimi_delta_attention, recurrent_kimi_delta_attention)


def patch():
    """Makes transformers' kimi_linear use kdagen at once; as a context manager, until the end of its block.

    Raises:
        ArgumentError: the transformers that is installed has no kimi_linear, or one that looks its functions up
            under other names.
    """
    try:
        modeling = importlib.import_module(MODULE)
        found = {function.__name__: getattr(modeling, function.__name__) for function in SERVED}
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"kdagen.hf.patch() needs the kimi_linear of transformers 5.23 or like it: {error}"
        ) from None
    for function in SERVED:
        _replaced.setdefault(function.__name__, found[function.__name__])
        setattr(modeling, function.__name__, function)
    return _until_the_end()


def unpatch() -> None:
    """Gives kimi_linear its own functions back; nothing happens where it has them."""
    if _replaced:
        modeling = importlib.import_module(MODULE)
        for name in list(_replaced):
            setattr(modeling, name, _replaced.pop(name))


@contextmanager
def _until_the_end():
    try:
        yield
    finally:
        unpatch()
