"""`kdagen build`: options to OpSources to a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click

from kdagen import debug
from kdagen.errors import ArgumentError, ScheduleError
from kdagen.purposes import PURPOSES, without
from kdagen.schedule import Keep
from kdagen.state import DTYPES as STATE_DTYPES
from kdagen.state import LAYOUTS, StateType
from kdagen.target import TARGETS

ARCHS = (
    ", ".join(t.name if t.compiles else f"{t.name} (source only)" for t in TARGETS.values()) + "; several: sm80,sm90."
)
KEEP = tuple(keep.value for keep in Keep)


class Several(click.ParamType):
    """A comma-separated list."""

    name = "list"

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part for part in value.split(",") if part)


def pair(option: str, text: str) -> tuple[int, int]:
    """ "128" is (128, 128), "128,64" is (128, 64)."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise ArgumentError(f"{option} {text}: expected K or K,V, such as 128 or 128,64")
    return int(parts[0]), int(parts[-1])


def choices(texts: tuple[str, ...], option: str = "--schedule") -> dict:
    """field=value options as a dict; numbers become numbers."""
    split = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, equals, value) in zip(texts, split) if not (equals and value)]:
        raise ArgumentError(f"{option} {wrong[0]}: expected field=value, such as chunk_size=32")
    return {field: int(value) if value.isdigit() else value for field, _, value in split}


@click.command("build")
@click.option(
    "--arch",
    type=Several(),
    multiple=True,
    required=True,
    help=ARCHS,
)
@click.option(
    "--op",
    "ops",
    multiple=True,
    default=("kda",),
    show_default=True,
    help="A recurrence of the zoo, or file.py:name; repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder to write: an importable package. Ops that it holds already stay.  [default: kdagen_ops]",
)
@click.option("--head-dim", default="128", show_default=True, help="K, or K,V; 64, 128 or 256 each.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float16; sums are float32.")
@click.option("--gate-dtype", help="dtype of gates and scalars a token.  [default: --dtype]")
@click.option(
    "--schedule",
    "schedule",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A choice of the schedule of inference, such as chunk_size=32; repeatable.",
)
@click.option(
    "--only",
    "purposes",
    multiple=True,
    type=click.Choice(PURPOSES),
    help="Kernels for this alone: whole sequences, training, or decoding token by token; repeatable.  [default: all]",
)
@click.option(
    "--state-layout",
    type=click.Choice(tuple(LAYOUTS)),
    default="KV",
    show_default=True,
    help="Of states as they are given and returned: [N, HV, K, V] or [N, HV, V, K].",
)
@click.option(
    "--state-dtype",
    type=click.Choice(STATE_DTYPES),
    default="float32",
    show_default=True,
    help="That states are stored in; sums are float32.",
)
@click.option(
    "--keep",
    type=click.Choice(KEEP),
    default="states",
    show_default=True,
    help="In training, what a forward leaves for its backward beside the inputs.",
)
@click.option(
    "--training-schedule",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A choice of the schedule of training, such as segment=4; repeatable.",
)
@click.option(
    "--decode-schedule",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A choice of the schedule of decoding, such as v_tile=64; repeatable.",
)
@click.option(
    "--gpu",
    "only",
    multiple=True,
    help="Tuned schedules for this GPU alone, such as H100; where no table speaks of it, those of the nearest GPU, or "
    "the model's choice; repeatable.  [default: for all GPUs of --arch that have a table]",
)
@click.option("--untuned", is_flag=True, help="The default schedules alone.")
@click.option(
    "--templates",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of kernel skeletons that come before kdagen's own.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once.  [default: the number of cores]")
def command(
    arch, ops, out, head_dim, dtype, gate_dtype, templates, jobs, state_layout, state_dtype, only, untuned, **chosen
) -> None:
    """Compile kernels for the GPUs of --arch: those of inference, of training (forward and backward) and of decoding.

    Beside those of the default schedules, those of each schedule that was tuned for a GPU of that arch, unless the
    schedule is given here.

    Needs nvcc and a C compiler, no GPU. For each kernel: its TileLang source, its CUDA source, a library that loads
    without any compiler, and manifest.json. Then `from kdagen_ops import kda` gives the op on a GPU machine.
    """
    from kdagen.build.builder import build
    from kdagen.build.progress import Progress, summary
    from kdagen.recurrence import load
    from kdagen.target import target

    started, out = time.perf_counter(), out or debug.build_dir()
    archs = [target(name).name for names in arch for name in names]
    dims, compilers = pair("--head-dim", head_dim), _compilers(**chosen)
    more = {"template_folders": templates, "state": StateType(state_layout, state_dtype)}
    _check_gpus(only, archs, untuned)
    sources = [
        source
        for op in ops
        for name in archs
        for how in compilers
        for source in _sources(load(op), how, (dims, dtype, name), gate_dtype, more, only, untuned or bool(templates))
    ]
    built = build(sources, out, jobs, Progress())
    click.echo(summary(built), nl=False)
    for name in dict.fromkeys(b.target for b in built if not target(b.target).compiles):
        click.echo(f"{name}: source only (kdagen does not compile for it)")
    click.echo(f"wrote {', '.join(str(b.folder) for b in built)} in {time.perf_counter() - started:.1f} s")
    click.echo(f"use:  from {out.name} import {', '.join(dict.fromkeys(b.name for b in built))}")


class How(NamedTuple):
    """What makes an OpSource for a purpose, and the fields of its schedule that were chosen."""

    make: Callable
    fields: dict
    given: bool  # by the user, so that no tuned one is looked for


def _compilers(purposes, schedule, keep: str, training_schedule, decode_schedule) -> list[How]:
    """For each purpose that is wanted."""
    from kdagen import pipeline

    training = {"keep": keep} | choices(training_schedule, "--training-schedule")
    found = {
        "inference": How(pipeline.compile_op, choices(schedule), bool(schedule)),
        "training": How(partial(_training, alone=purposes == ("training",)), training, bool(training_schedule)),
        "decode": How(pipeline.compile_decode, choices(decode_schedule, "--decode-schedule"), bool(decode_schedule)),
    }
    return [how for purpose, how in found.items() if not purposes or purpose in purposes]


def _sources(recurrence, how: How, what: tuple, gate_dtype, more: dict, only: tuple[str, ...], untuned: bool) -> list:
    """The OpSource of a purpose and, where its schedule was left to kdagen, those of the schedules that were tuned."""
    from kdagen.autotune.variants import variants

    def make(fields: dict):
        return how.make(recurrence, *what, fields, gate_dtype, **more)

    if (source := make(how.fields)) is None:
        return []
    return [source] if untuned or how.given else variants(source, recurrence, gate_dtype, make, only)


def _check_gpus(only: tuple[str, ...], archs: list[str], untuned: bool) -> None:
    from kdagen.autotune.variants import check_gpu

    if only and untuned:
        raise ArgumentError("--gpu chooses among tuned schedules, --untuned leaves them out: expected one of the two")
    for gpu in only:
        check_gpu(gpu, archs)


def _training(recurrence, dims, dtype, arch, fields, *args, alone: bool, **options):
    """The OpSource for training; where there is none by default a note and None, where one was asked for an error."""
    from kdagen import pipeline

    try:
        return pipeline.compile_training(recurrence, dims, dtype, arch, fields, *args, **options)
    except ScheduleError as error:
        if fields.keys() == {"keep"} and not alone:
            click.echo(f"no training: {error}", err=True)
            return None
        raise ScheduleError(f"{error} ({without('training')})") from None
