"""Every error that kdagen raises on purpose, by the room in which it arises.

A message says what was written, what was expected and how to fix it, in lower case.
"""


class KdagenError(Exception):
    """Base class: `except kdagen.KdagenError` catches everything kdagen raises on purpose."""


class RecurrenceError(KdagenError):
    """The recurrence as written is outside the family, or a role in it is ambiguous."""


class ArgumentError(KdagenError, ValueError):
    """A tensor or option given to an op has the wrong shape, dtype, device or value."""


class ScheduleError(KdagenError):
    """A schedule is not legal for this recurrence, these head dims or this target."""


class TargetError(KdagenError):
    """An unknown or unsupported target."""


class ToolchainError(KdagenError):
    """nvcc, the C compiler or TileLang is missing or failed."""


class ArtefactError(KdagenError):
    """A built or cached file is missing, corrupt, or was made by another version."""


class SimulationError(KdagenError):
    """A generated program cannot be executed in a simulator, or misbehaves in one."""


class GradientError(KdagenError, RuntimeError):
    """A derivative was asked for that is not derived: a second one, or one in forward mode."""


class TrainingError(KdagenError):
    """A training run cannot start or go on as asked, or its loss is no number any more."""


class LaunchError(KdagenError):
    """The GPU's driver is missing, or refused to load or launch a kernel."""
