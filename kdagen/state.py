"""The type of a state as it is given and returned: which of its dimensions comes first, and its dtype."""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.errors import ArgumentError

LAYOUTS = {"KV": ("K", "V"), "VK": ("V", "K")}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class StateType:
    """A state in memory: [N, HV, K, V] or, for "VK", [N, HV, V, K]; sums are fp32 whatever it is stored in."""

    layout: str = "KV"
    dtype: str = "float32"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ArgumentError(
                f"state_layout = {self.layout!r}: expected 'KV' ([N, HV, K, V]) or 'VK' ([N, HV, V, K])"
            )
        if self.dtype not in DTYPES:
            raise ArgumentError(f"state_dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def dims(self) -> tuple[str, str]:
        """The two dimensions of a head's state, outer first."""
        return LAYOUTS[self.layout]

    def index(self, k: str, v: str) -> str:
        """The text of an element's last two indices."""
        return f"{k}, {v}" if self.layout == "KV" else f"{v}, {k}"

    @property
    def name(self) -> str:
        """What tells a variant from the default one: "" for it, else such as "vk.bf16"."""
        parts = ["vk"] * (self.layout == "VK") + ["bf16"] * (self.dtype == "bfloat16")
        return ".".join(parts)


DEFAULT = StateType()
