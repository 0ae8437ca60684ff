"""What `kdagen.compile` was asked for, as plain data: tells ops apart, and says the same to `kdagen build`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kdagen import zoo
from kdagen.errors import ArgumentError
from kdagen.runtime.checks import short
from kdagen.schedule import DTYPES, Keep, Schedule
from kdagen.state import DEFAULT, StateType
from kdagen.target import target

GATE_DTYPES = (*DTYPES, "float32")


@dataclass(frozen=True)
class Options:
    """How `kdagen.compile` was asked to compile."""

    head_dim: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    arch: str | None = None
    schedule: Schedule | dict | None = None  # a dict: the fields in which it differs from the default; None: tuned
    gate_dtype: str | None = None
    templates: tuple[str, ...] = ()
    build_dir: str | None = None
    keep: Keep = Keep.STATES
    training_schedule: dict | None = None  # the fields in which training's differs; what it keeps is `keep`
    state: StateType = DEFAULT
    decode_schedule: dict | None = None  # the fields in which decoding's differs

    def json(self) -> dict:
        """What tells these options from others, the text of the skeletons included."""
        schedule = None if self.schedule is None else _fields(self.schedule)
        fields = {**vars(self), "schedule": schedule, "state": asdict(self.state)}
        texts = [
            (path.name, path.read_text()) for folder in self.templates for path in sorted(Path(folder).glob("*.j2"))
        ]
        return {**fields, "templates": [self.templates, texts]}

    @property
    def untuned(self) -> frozenset[str]:
        """The purposes whose schedule was given, or whose kernels were not written by kdagen: nothing is looked up."""
        given = {"inference": self.schedule, "training": self.training_schedule, "decode": self.decode_schedule}
        return frozenset(purpose for purpose, how in given.items() if how is not None or self.templates)

    def words(self) -> list[str]:
        """The same as options of `kdagen build`; defaults are left out."""
        pairs = [
            *([("--head-dim", f"{self.head_dim[0]},{self.head_dim[1]}")] if self.head_dim != Options.head_dim else []),
            *([("--dtype", self.dtype)] if self.dtype != Options.dtype else []),
            *([("--gate-dtype", self.gate_dtype)] if self.gate_dtype else []),
            *_choices("--schedule", self.schedule),
            *([("--keep", self.keep.value)] if self.keep != Options.keep else []),
            *_choices("--training-schedule", self.training_schedule),
            *_choices("--decode-schedule", self.decode_schedule),
            *([("--state-layout", self.state.layout)] if self.state.layout != DEFAULT.layout else []),
            *([("--state-dtype", self.state.dtype)] if self.state.dtype != DEFAULT.dtype else []),
            *(("--templates", folder) for folder in self.templates),
        ]
        return [word for pair in pairs for word in pair]


def _fields(schedule) -> dict:
    """The fields that were chosen, of a schedule or of a dict."""
    return schedule.fields() if hasattr(schedule, "fields") else dict(schedule or {})


def _choices(option: str, schedule: Schedule | dict | None):
    return ((option, f"{field}={getattr(value, 'value', value)}") for field, value in _fields(schedule).items())


def options(
    head_dim,
    dtype,
    arch,
    schedule,
    gate_dtype,
    templates,
    build_dir,
    keep=Keep.STATES,
    training_schedule=None,
    state_layout: str = DEFAULT.layout,
    state_dtype=DEFAULT.dtype,
    decode_schedule=None,
) -> Options:
    """Options as plain data; what no schedule or GPU could take is refused here."""
    dims = (head_dim, head_dim) if isinstance(head_dim, int) else tuple(head_dim)
    if len(dims) != 2 or not all(isinstance(n, int) and n > 0 for n in dims):
        raise ArgumentError(f"head_dim = {head_dim!r}: expected K or (K, V), such as 128 or (128, 64)")
    if (name := short(dtype)) not in DTYPES:
        raise ArgumentError(
            f"dtype = {name!r}: expected one of {', '.join(DTYPES)}. It is that of the GPU kernels: "
            f"on the CPU an op takes float32 and float64 tensors too, whatever dtype it was compiled for"
        )
    if gate_dtype and short(gate_dtype) not in GATE_DTYPES:
        raise ArgumentError(f"gate_dtype = {short(gate_dtype)!r}: expected one of {', '.join(GATE_DTYPES)}")
    folders = tuple(str(Path(folder).resolve()) for folder in templates)
    gates = short(gate_dtype) if gate_dtype else None
    place = str(Path(build_dir).resolve()) if build_dir else None
    training, decode = (None if given is None else _fields(given) for given in (training_schedule, decode_schedule))
    if (keep := (training or {}).pop("keep", keep)) not in list(Keep):
        raise ArgumentError(f"keep = {keep!r}: expected one of {', '.join(k.value for k in Keep)}")
    chip = target(arch).name if arch else None
    state = StateType(state_layout, short(state_dtype))
    return Options(dims, name, chip, schedule, gates, folders, place, Keep(keep), training, state, decode)


def wide_arguments(canonical, chosen: Options) -> tuple[str, ...]:
    """The arguments a token that GPU kernels take in float32."""
    if chosen.gate_dtype != "float32":
        return ()
    from kdagen.pipeline import argument_dtypes

    dtypes = argument_dtypes(canonical, chosen.dtype, chosen.gate_dtype)
    return tuple(a.name for a in canonical.arguments if a.per_token and dtypes[a.name] == "float32")


def spec_of(recurrence) -> str:
    """How a command names a recurrence: as one of the zoo, or by the file that it stands in."""
    if recurrence.name in zoo.names() and zoo.get(recurrence.name) is recurrence:
        return recurrence.name
    file = Path(recurrence.body.__code__.co_filename)
    return f"{file if file.is_file() else 'FILE.py'}:{recurrence.name}"
