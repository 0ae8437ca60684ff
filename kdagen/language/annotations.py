"""What an argument may be annotated with: its axis, whether each token has one, bounds, and how many there are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from kdagen.errors import RecurrenceError


@dataclass(frozen=True)
class Role:
    """The role of an argument. `kg.Channel(lower=-5.0, upper=0.0)` bounds it; `kg.Key[2]` is a tuple of two."""

    name: str
    axis: str  # "K", "V", or "" for a scalar a head
    per_token: bool = True
    lower: float | None = None
    upper: float | None = None
    count: int | None = None

    def __call__(self, lower: float | None = None, upper: float | None = None) -> Role:
        if lower is not None and upper is not None and lower > upper:
            raise RecurrenceError(f"kg.{self.name}(lower={lower}, upper={upper}): the bounds are the wrong way round")
        return replace(self, lower=lower, upper=upper)

    def __getitem__(self, count: int) -> Role:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise RecurrenceError(f"kg.{self.name}[{count!r}]: expected how many there are, an integer from 1 up")
        return replace(self, count=count)


Key = Role("Key", "K")
Value = Role("Value", "V")
Channel = Role("Channel", "K")
Scalar = Role("Scalar", "")
HeadParameter = Role("HeadParameter", "", per_token=False)
ChannelParameter = Role("ChannelParameter", "K", per_token=False)
ValueParameter = Role("ValueParameter", "V", per_token=False)


def role_of(parameter: inspect.Parameter, body, scope: dict) -> Role | None:
    """The annotation of a parameter, resolved where it is a string; None if there is none."""
    found = parameter.annotation
    if found is inspect.Parameter.empty:
        return None
    if isinstance(found, str):
        names = {**body.__globals__, **scope, **inspect.getclosurevars(body).nonlocals}
        try:
            found = eval(found, names)
        except RecurrenceError:
            raise
        except Exception as e:
            raise RecurrenceError(
                f"the annotation {parameter.annotation!r} of '{parameter.name}' is not understood: {e}"
            ) from None
    if not isinstance(found, Role):
        raise RecurrenceError(
            f"argument '{parameter.name}' is annotated with {parameter.annotation!r}: expected one of kg.Key, "
            f"kg.Value, kg.Channel, kg.Scalar, kg.HeadParameter, kg.ChannelParameter, kg.ValueParameter"
        )
    return found
