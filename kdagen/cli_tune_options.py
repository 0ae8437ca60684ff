"""The options of `kdagen tune` and how they are read; its commands are in kdagen.cli_tune."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import click

from kdagen.cli_build import choices, pair
from kdagen.errors import ArgumentError
from kdagen.purposes import PURPOSES
from kdagen.state import DTYPES as STATE_DTYPES
from kdagen.state import LAYOUTS, StateType

# Those of kdagen.autotune.gpus; a help text imports nothing.
GPUS = ("H100", "H200", "A100", "B200", "RTX 4090", "RTX 5090", "MI300X")

UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """ "90s", "20m", "2h" as seconds."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)) or not float(match[1]):
        raise ArgumentError(f"--budget {text}: expected a time such as 90s, 20m or 2h")
    return float(match[1]) * UNITS[match[2]]


FOLDER = click.option(
    "--dir",
    "path",
    type=click.Path(path_type=Path, file_okay=False),
    default="kdagen_tune",
    show_default=True,
    help="The directory of the sweep.",
)
DEVICE = click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="SPEC",
    help="cuda:0, cpu, or replay:LOG.jsonl (a recording); repeatable.  [default: all GPUs here]",
)
BUDGET = click.option(
    "--budget",
    metavar="TIME",
    callback=lambda ctx, option, text: text and seconds(text),
    help="Stop after this long: 90s, 20m, 2h.  [default: when all is done]",
)
JOBS = click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once.  [default: number of cores]")
RAY = click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Spread the work over the machines of a Ray cluster, or of one that is started here.",
)
INTO = click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of tables that winners go to.  [default: your own, in kdagen's cache folder]",
)
TASK = (
    click.option(
        "--purpose",
        "purposes",
        multiple=True,
        type=click.Choice(PURPOSES),
        help="Whole sequences, training, or decoding token by token; repeatable.  [default: all]",
    ),
    click.option("--gpu", metavar="NAME", help=f"The GPU to tune for, where it is not here: {', '.join(GPUS)}."),
    click.option("--head-dim", default="128", show_default=True, help="K, or K,V."),
    click.option("--dtype", help="Of operands.  [default: bfloat16; float32 on the CPU]"),
    click.option("--gate-dtype", help="dtype of gates and scalars a token.  [default: --dtype]"),
    click.option("--state-layout", type=click.Choice(tuple(LAYOUTS)), default="KV", show_default=True),
    click.option("--state-dtype", type=click.Choice(STATE_DTYPES), default="float32", show_default=True),
    click.option(
        "--fix",
        "fixed",
        multiple=True,
        metavar="FIELD=VALUE,...",
        help="Only these values of a field of the schedule, such as chunk_size=16,32; repeatable.",
    ),
)
SWEEP = (
    click.option(
        "--op",
        "ops",
        multiple=True,
        default=("kda",),
        show_default=True,
        help="A recurrence of the zoo, or file.py:name; repeatable.",
    ),
    *TASK,
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="SHAPE",
        help="BxTxH such as 1x8192x64, BxTxH/HV, or ragged lengths 1300+547:64; of one --purpose; repeatable.",
    ),
    click.option("--policy", metavar='"MODE CACHE"', help="How calls are timed, such as 'graph cold'."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the search, and of inputs."),
    click.option(
        "--exhaustive",
        type=click.IntRange(min=1),
        default=200,
        show_default=True,
        help="Candidates up to which all are tried; of more, the search chooses.",
    ),
)


def options(*several):
    """One decorator of several."""
    return lambda function: reduce(lambda f, option: option(f), reversed(several), function)


def asked(ops, devices, head_dim: str, state_layout: str, state_dtype: str, fixed, shapes=(), **rest):
    """What was asked for (kdagen.autotune.asked)."""
    from kdagen.autotune.asked import Asked

    state, dims = StateType(state_layout, state_dtype), pair("--head-dim", head_dim)
    narrowed = tuple(narrow(fixed).items())
    return Asked(ops, devices=devices, shapes=shapes, head_dim=dims, state=state, fixed=narrowed, **rest)


def narrow(texts: tuple[str, ...]) -> dict[str, list]:
    """Values by field: "chunk_size=16,32" is {"chunk_size": [16, 32]}."""
    lists = {field: str(values).split(",") for field, values in choices(texts, "--fix").items()}
    return {field: [int(v) if v.isdigit() else v for v in values] for field, values in lists.items()}


def given(ctx, names) -> list[str]:
    """Those of these options that were written."""
    default = click.core.ParameterSource.DEFAULT
    return [name for name in names if ctx.get_parameter_source(name) != default]
