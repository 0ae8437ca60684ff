"""Sample inputs in natural ranges for any canonical form: for tests, examples and benchmarks.

Keys are unit vectors, rates lie in (0, 1), and the decay follows a class: the argument that drives it is found by
bisection, whatever pre-activation stands between. Where roles do not tell enough (DPLR's a and b must not let the state
grow) a zoo file gives a function for the argument in SAMPLE.
"""

from __future__ import annotations

import sympy

from kdagen.errors import ArgumentError
from kdagen.ir.canonical import Argument, Canonical
from kdagen.ir.functions import ChannelSum
from kdagen.reference import evaluate

# Log decay from u uniform in (0, 1): what gates of each class look like.
GATES = {
    "mild": lambda u: -0.1 * u,
    "softplus": lambda u: -((-(1 - u).log()) ** 1.5),  # a long tail, about 1 on average
    "bounded": lambda u: -5.0 * u,
    "extreme": lambda u: -30.0 * u**2,
    "reset": lambda u: (-0.1 * u).masked_fill(u > 0.95, float("-inf")),
}


class Draw:
    """Draws tensors for the arguments of one canonical form; `tensors` holds those drawn so far."""

    def __init__(self, canonical: Canonical, shape, gate: str, seed: int):
        import torch

        if gate not in GATES:
            raise ArgumentError(f"unknown gate class '{gate}': expected one of {', '.join(GATES)}")
        self.canonical, self.shape, self.gate = canonical, shape, gate
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict = {}
        self.shared: dict = {}

    def size(self, axis: str, per_token: bool = True) -> tuple[int, ...]:
        b, t, h, k, v = self.shape
        return ((b, t, h) if per_token else (h,)) + {"K": (k,), "V": (v,), "": ()}[axis]

    def uniform(self, axis: str, per_token: bool = True):
        import torch

        return torch.rand(self.size(axis, per_token), generator=self.generator, dtype=torch.float64)

    def normal(self, axis: str, per_token: bool = True):
        import torch

        return torch.randn(self.size(axis, per_token), generator=self.generator, dtype=torch.float64)

    def unit(self, name: str = ""):
        """Unit key vectors; the same ones for the same name."""
        import torch

        drawn = torch.nn.functional.normalize(self.normal("K"), dim=-1)
        return self.shared.setdefault(name, drawn) if name else drawn

    def decay(self):
        """exp(g), with an axis of channels."""
        env = {a.symbol: self.wide(a) for a in self.canonical.arguments if a.name in self.tensors}
        return evaluate(self.canonical.decay, env).exp()

    def wide(self, a: Argument):
        return self.tensors[a.name] if a.axis else self.tensors[a.name].unsqueeze(-1)

    def natural(self, a: Argument):
        """By role and bounds alone."""
        import torch

        if a.lower is not None and a.upper is not None:
            return a.lower + (a.upper - a.lower) * self.uniform(a.axis, a.per_token)
        if a.lower is not None:
            return a.lower + self.uniform(a.axis, a.per_token)
        if not a.per_token:
            return 0.5 * self.normal(a.axis, False)
        if a.axis == "K" and a.symbol not in _normalised(self.canonical):
            return torch.nn.functional.normalize(self.normal("K"), dim=-1)
        return self.normal(a.axis) if a.axis else 0.1 + 0.8 * self.uniform("")


def sample(canonical: Canonical, shape: tuple[int, int, int, int, int], gate: str = "mild", seed: int = 0) -> dict:
    """Float64 tensors for each argument, for shape (B, T, H, K, V)."""
    draw = Draw(canonical, shape, gate, seed)
    driver = _driver(canonical)
    hints = _hints(canonical)
    first = [a for a in canonical.arguments if a is not driver and a.symbol in canonical.decay.free_symbols]
    rest = [a for a in canonical.arguments if a is not driver and a not in first]
    for a in first:
        draw.tensors[a.name] = draw.natural(a) if a.axis or not a.per_token else draw.uniform("")
    if driver:
        draw.tensors[driver.name] = _drive(driver, draw)
    for a in rest:
        draw.tensors[a.name] = hints[a.name](draw) if a.name in hints else draw.natural(a)
    return {a.name: draw.tensors[a.name] for a in canonical.arguments}


def _hints(canonical: Canonical) -> dict:
    from kdagen import zoo

    hints = zoo.hints(canonical.name)
    same = hints and {n.value for n in zoo.get(canonical.name).inputs} == {a.name for a in canonical.arguments}
    return hints if same else {}


def _normalised(canonical: Canonical) -> set[sympy.Symbol]:
    """What the recurrence divides by its own norm."""
    exprs = [canonical.output.z, *(e for s in canonical.streams for e in (s.x, s.reader.z))]
    roots = {p for e in exprs for p in e.atoms(sympy.Pow) if p.exp == -sympy.S.Half and p.has(ChannelSum)}
    return {s for p in roots for c in p.atoms(ChannelSum) for s in c.free_symbols}


def _driver(canonical: Canonical) -> Argument | None:
    """The argument that a decay class is imposed through: one a token if there is, of the decay's own axis."""
    found = [a for a in canonical.arguments if a.symbol in canonical.decay.free_symbols]
    return max(found, key=lambda a: (a.per_token, a.axis == canonical.decay_axis), default=None)


def _drive(driver: Argument, draw: Draw):
    """Values of the driver that give a log decay of the class, or come as near as the recurrence allows."""
    target = GATES[draw.gate](draw.uniform(driver.axis, driver.per_token))
    decay = draw.canonical.decay
    if decay == driver.symbol:
        return target
    if decay == sympy.log(driver.symbol):
        return target.exp()
    low, high = target.new_full(target.shape, -60.0), target.new_full(target.shape, 60.0)
    if driver.lower is not None:
        low = low.clamp_min(driver.lower)
    if driver.upper is not None:
        high = high.clamp_max(driver.upper)
    rising = _log_decay(high, driver, draw) > _log_decay(low, driver, draw)
    for _ in range(60):
        middle = (low + high) / 2
        up = (_log_decay(middle, driver, draw) < target) == rising
        low, high = low.where(~up, middle), high.where(up, middle)
    return (low + high) / 2


def _log_decay(values, driver: Argument, draw: Draw):
    draw.tensors[driver.name] = values
    env = {a.symbol: draw.wide(a) for a in draw.canonical.arguments if a.name in draw.tensors}
    g = evaluate(draw.canonical.decay, env)
    return g.amax(-1) if not driver.axis else g
