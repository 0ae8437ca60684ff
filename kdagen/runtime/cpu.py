"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU."""

from __future__ import annotations

from kdagen.ir.tensor import Program

CHUNK_SIZE = 32  # the fastest of 16, 32 and 64 in benchmarks/cpu_op.py


def run(program: Program, tensors: dict, initial_state=None, out_dtype=None) -> tuple:
    """Output [B, T, H, V] in `out_dtype` (that of what is computed unless given) and final state [B, H, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64.
    """
    import torch

    from kdagen.ir.tensor_interpret import Interpreter

    wide = any(x.dtype == torch.float64 for x in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    with torch.no_grad():
        return Interpreter(program, tensors, CHUNK_SIZE, dtype).run(initial_state, out_dtype)
