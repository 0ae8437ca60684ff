"""How a run is trained: what of it can be chosen, and what decides its numbers. Plain data, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdagen.errors import ArgumentError

DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Settings:
    """AdamW with gradients clipped: the rate rises for `warmup` steps, then falls to a share `final` of `lr`."""

    steps: int = 1000
    batch: int = 16  # sequences a step, of all processes together
    lr: float = 1e-3
    warmup: int = 50
    decay: str = "cosine"  # or "linear", "constant"
    final: float = 0.1
    weight_decay: float = 0.1  # of linear maps alone
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # of the norm of all gradients
    until: float | None = None  # ends the run when the accuracy is this high

    def __post_init__(self):
        for problem in self._problems():
            raise ArgumentError(f"settings of a run: {problem}")

    def _problems(self):
        for name, least in {"steps": 1, "batch": 1, "warmup": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name} is {value!r}, expected a number from {least} up"
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name} is {getattr(self, name)!r}, expected a number above 0"
        for name, value in {"final": self.final, "until": self.until or 0}.items():
            if not 0 <= value <= 1:
                yield f"{name} is {value!r}, expected a share from 0 to 1"
        if not self.weight_decay >= 0 or not all(0 <= beta < 1 for beta in self.betas):
            yield (
                f"weight_decay is {self.weight_decay!r} and betas are {self.betas!r}, expected a weight decay from 0 "
                f"up, and betas from 0 to below 1"
            )
        if self.decay not in DECAYS:
            yield f"decay is {self.decay!r}, expected {' or '.join(map(repr, DECAYS))}"

    def lr_at(self, step: int) -> float:
        """The rate of a step, the first being 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.decay]
        return self.lr * (self.final + (1 - self.final) * left)
