"""Builds ops, and variants of their schedules, into one small folder: for a GPU machine without a compiler.

    python benchmarks/pack_for_device.py --out device_ops
    # carry kdagen's checkout and device_ops there, then:
    PYTHONPATH=. python benchmarks/gpu_forward.py device_ops

Each sub-folder is a package as `kdagen build` writes it: `default`, and one for each variant of the schedule.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from kdagen import zoo
from kdagen.build.builder import build
from kdagen.build.progress import Progress, summary
from kdagen.errors import ScheduleError
from kdagen.pipeline import compile_op

MIB = 1 << 20
VARIED = ("kda", "kda_bounded", "gated_deltanet", "gla", "dplr")
VARIANTS = {
    "chunk16": {"chunk_size": 16},
    "chunk32": {"chunk_size": 32},
    "chunk64": {"chunk_size": 64},
    "v64": {"v_tile": 64},
    "stages3": {"stages": 3},
    "pipelined": {"scan_skeleton": "scan_pipelined"},
    "split": {"output": "split"},
}


def sources(arch: str, ops: list[str], varied: list[str], variants: list[str]) -> dict[str, list]:
    """What to build by package: defaults of all ops, then what differs from them; what cannot be is left out."""
    made = {"default": [compile_op(zoo.get(op), arch=arch) for op in ops]}
    for name in variants:
        for op, default in ((s.name, s) for s in made["default"] if s.name in varied):
            try:
                source = compile_op(zoo.get(op), arch=arch, schedule=VARIANTS[name])
            except ScheduleError as error:
                click.echo(f"{name} of {op} left out: {error}")
                continue
            if source.kernels != default.kernels:
                made.setdefault(name, []).append(source)
    return made


def build_each(found: list, out: Path, jobs: int | None) -> list:
    """Builds all at once; where a schedule takes more of the chip than there is, one by one without it."""
    try:
        return build(found, out, jobs, Progress())
    except ScheduleError as error:
        if len(found) == 1:
            click.echo(f"{out.name} of {found[0].name} left out: {error}")
            return []
        return [built for source in found for built in build_each([source], out, jobs)]


def size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("device_ops"), show_default=True)
@click.option("--arch", default="sm90", show_default=True)
@click.option("--ops", default=",".join(zoo.names()), help="Entries of the zoo.  [default: all]")
@click.option(
    "--varied", default=",".join(VARIED), show_default=True, help="Those that are built in every variant too."
)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once.  [default: the number of cores]")
@click.option("--limit", default=40, show_default=True, help="MiB that the folder may have.")
def main(out: Path, arch: str, ops: str, varied: str, variants: str, jobs: int | None, limit: int) -> None:
    """Build what benchmarks/gpu_forward.py and `pytest -m gpu` need on a GPU machine without a compiler."""
    started = time.perf_counter()
    for package, found in sources(arch, ops.split(","), varied.split(","), variants.split(",")).items():
        click.echo(f"{package}:\n{summary(build_each(found, out / package, jobs))}", nl=False)
    total = size(out) / MIB
    click.echo(f"{out}: {total:.1f} MiB in {time.perf_counter() - started:.0f} s")
    if total > limit:
        raise click.ClickException(
            f"{out} has {total:.1f} MiB, expected at most {limit}: choose fewer --ops or --variants"
        )


if __name__ == "__main__":
    main()
