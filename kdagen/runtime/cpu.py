"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU."""

from __future__ import annotations

from dataclasses import replace

from kdagen.ir.tensor import Adjoint, Program

ROWS = 64  # of a chunk's solve: the fastest of 16, 32 and 64 at every length in benchmarks/cpu_op.py


def run(program: Program, tensors: dict, initial_state=None, out_dtype=None) -> tuple:
    """Output [B, T, H, V] in `out_dtype` (that of what is computed unless given) and final state [B, H, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64.
    """
    import torch

    with torch.no_grad():
        return _interpreter(program, tensors).run(initial_state, out_dtype)


def run_keeping(program: Program, tensors: dict, initial_state=None, out_dtype=None) -> tuple:
    """As `run`, and the state before each chunk, [chunk, B, H, K, V], for `backward`."""
    import torch

    with torch.no_grad():
        return _interpreter(program, tensors).run_keeping(initial_state, out_dtype)


def adjoint_of(program: Program) -> Adjoint:
    """The backward of a program as `backward` runs it fastest: decayed operands and Gram matrices in one tree."""
    from kdagen.derive.adjoint import adjoint
    from kdagen.ir.tensor_values import carried

    return adjoint(program, carried(program.prepare))


def backward(adjoint: Adjoint, tensors: dict, initial_state, d_out, d_final_state, states=None) -> tuple[dict, object]:
    """Gradients by argument name, in the argument's dtype and shape, and that of the initial state [B, H, K, V].

    `d_out` [B, T, H, V] and `d_final_state` [B, H, K, V] may be None, which is zero. `states` are those of
    `run_keeping`; without them they are computed again.
    """
    import torch

    from kdagen.ir.adjoint_interpret import AdjointInterpreter

    with torch.no_grad():
        if states is None:
            states = _interpreter(replace(adjoint.forward, output=()), tensors).states(initial_state)
        run = AdjointInterpreter(adjoint, tensors, *_choices(adjoint.forward, tensors))
        return run.run(states, d_out, d_final_state)


def _interpreter(program: Program, tensors: dict):
    from kdagen.ir.tensor_interpret import Interpreter

    return Interpreter(program, tensors, *_choices(program, tensors))


def _choices(program: Program, tensors: dict) -> tuple:
    """Chunk size and dtype of what is computed."""
    import torch

    from kdagen.ir.tensor_values import sizes

    wide = any(x.dtype == torch.float64 for x in tensors.values())
    tokens = sizes(program.canonical.arguments, tensors)["T"]
    return chunk_size(tokens, len(program.canonical.solving)), torch.float64 if wide else torch.float32


def chunk_size(tokens: int, solving: int) -> int:
    """A power of two: no more than the sequence fills, nor than gives ROWS rows for that many solving streams.

    From ROWS tokens on it does not depend on the length, so that neither do the bits of an output.
    """
    most, chunk = ROWS >> (max(solving, 1) - 1).bit_length(), 1
    while chunk < most and chunk < tokens:  # comparisons alone: torch's compiler asks for any number of tokens
        chunk *= 2
    return chunk
