"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU."""

from __future__ import annotations

from kdagen.ir.tensor import Program

ROWS = 64  # of a chunk's solve: the fastest of 16, 32 and 64 at every length in benchmarks/cpu_op.py


def run(program: Program, tensors: dict, initial_state=None, out_dtype=None) -> tuple:
    """Output [B, T, H, V] in `out_dtype` (that of what is computed unless given) and final state [B, H, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64.
    """
    import torch

    from kdagen.ir.tensor_interpret import Interpreter, sizes

    wide = any(x.dtype == torch.float64 for x in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    chunk = chunk_size(sizes(program.canonical.arguments, tensors)["T"], len(program.canonical.solving))
    with torch.no_grad():
        return Interpreter(program, tensors, chunk, dtype).run(initial_state, out_dtype)


def chunk_size(tokens: int, solving: int) -> int:
    """A power of two: no more than the sequence fills, nor than gives ROWS rows for that many solving streams.

    From ROWS tokens on it does not depend on the length, so that neither do the bits of an output.
    """
    most = ROWS >> (max(solving, 1) - 1).bit_length()
    return min(max(most, 1), 1 << (tokens - 1).bit_length())
