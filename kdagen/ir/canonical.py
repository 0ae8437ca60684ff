"""The canonical form: every recurrence as rank-one streams over one decayed state.

    p_r = scale_r * (y_r + S_{t-1}^T z_r + sum_s p_s [intra])     pseudo-value of stream r
    S_t = diag(exp(g)) S_{t-1} + sum_r x_r p_r^T                 state, K x V
    o_t = y_o + S_{t-1}^T z_o + sum_s p_s [intra]                output, a reader like any other

Unlike the recurrence (what a user wrote) nothing here is a program: each field is one
sympy expression, elementwise over a head's channels, in the symbols of the arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy


class Intra(str, Enum):
    """How a reader sees the pseudo-value of a stream at its own token."""

    NONE = "none"  # strictly earlier tokens only
    GRAM = "gram"  # with coefficient x . z: the diagonal of the decayed Gram matrix


@dataclass(frozen=True)
class Argument:
    """An input of the recurrence. Tensor shape: [B, T, heads, axis] a token, [HV, axis] otherwise (Canonical.heads)."""

    name: str
    axis: str  # "K", "V", or "" for a scalar a head
    per_token: bool = True
    lower: float | None = None  # known bounds of the raw values
    upper: float | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, real=True)


@dataclass(frozen=True)
class Reader:
    """Reads the state: scale * (y + S^T z + own-token pseudo-values)."""

    y: sympy.Expr  # axis V; 0 if absent
    z: sympy.Expr  # axis K; 0 if it does not read the state
    scale: sympy.Expr  # scalar; 1 if absent
    after: bool  # True: reads diag(exp(g)) S_{t-1}; False: reads S_{t-1} itself
    intra: tuple[Intra | sympy.Expr, ...]  # one a stream; an Expr is an explicit scalar coefficient

    @property
    def reads(self) -> bool:
        return self.z != 0


@dataclass(frozen=True)
class Stream:
    """A rank-one write x p^T, p being what `reader` returns."""

    x: sympy.Expr  # axis K
    reader: Reader

    @property
    def reads(self) -> bool:
        """Whether this stream's pseudo-value depends on the state, and so enters the solve."""
        return self.reader.reads or any(i != Intra.NONE for i in self.reader.intra)


@dataclass(frozen=True)
class Canonical:
    """A recurrence in canonical form."""

    name: str
    doc: str
    arguments: tuple[Argument, ...]
    decay: sympy.Expr  # log decay g <= 0; 0 if the state does not decay
    decay_axis: str  # "K" one rate a key channel, "" one rate a head
    decay_lower: float  # derived bound on g a token; -inf when unbounded
    streams: tuple[Stream, ...]
    output: Reader

    @property
    def solving(self) -> tuple[int, ...]:
        """Indices of the streams that enter the triangular solve."""
        return tuple(i for i, s in enumerate(self.streams) if s.reads)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Solving streams' readers, then the output."""
        return tuple(self.streams[i].reader for i in self.solving) + (self.output,)

    @property
    def gates(self) -> frozenset[str]:
        """The arguments that decay the state and are neither keys nor values."""
        readers = [s.reader for s in self.streams] + [self.output]
        vectors = [*(s.x for s in self.streams), *(e for r in readers for e in (r.y, r.z))]
        return frozenset(
            map(str, self.decay.free_symbols - {s for e in vectors for s in sympy.sympify(e).free_symbols})
        )

    def heads(self, argument: Argument) -> str:
        """Which heads an argument has: "H" for keys, which a group of value heads may share, else "HV"."""
        key = argument.per_token and argument.axis == "K" and argument.name not in self.gates
        return "H" if key else "HV"

    def dtypes(self, dtype: str, gate_dtype: str) -> dict[str, str]:
        """Parameters of the head in fp32; keys and values in `dtype`; what only gates and scales in `gate_dtype`."""
        return {
            a.name: "float32" if not a.per_token else gate_dtype if not a.axis or a.name in self.gates else dtype
            for a in self.arguments
        }

    @property
    def secondary_matrices(self) -> int:
        """C x C matrices a chunk: readers times streams."""
        return len(self.readers) * len(self.streams)
