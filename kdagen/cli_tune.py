"""`kdagen tune`: plan, compile, measure, publish, why and report exchange one directory; alone it does all of it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import click

from kdagen.cli_tune_options import BUDGET, DEVICE, FOLDER, INTO, JOBS, RAY, SWEEP, TASK, asked, given, options


class Stages(click.Group):
    """Lists its commands in the order in which they are used."""

    def list_commands(self, ctx) -> list[str]:
        return list(self.commands)


@click.group("tune", cls=Stages, invoke_without_command=True)
@options(FOLDER, DEVICE, *SWEEP, BUDGET, JOBS, RAY, INTO)
@click.pass_context
def command(ctx, path: Path, devices, budget, jobs, ray, into, **sweep) -> None:
    """Find the fastest schedules for a device; ops pick them up by themselves.

    Without a command all of it: plan, compile, measure, again while the search finds more, publish, why, report. One
    that was stopped goes on where it was. Each command is for one stage; plan and compile need no GPU, measure needs
    no compiler, and --dir may be carried from machine to machine between them.
    """
    if ctx.invoked_subcommand:
        if given(ctx, ctx.params):
            raise click.UsageError(f"options come behind the command: kdagen tune {ctx.invoked_subcommand} --dir ...")
        return
    from kdagen.autotune.tune import tune

    folder = _planned(ctx, path, devices, sweep)
    devices, workers = _devices(folder, devices, ray)
    with _saying(folder, budget) as say:
        paths = tune(folder, devices, jobs, say.deadline, say, into, _compilers(ray), workers)
    _said(folder)
    _published(paths)
    _reported(folder)


@command.command(short_help="List the candidates, reject what cannot be good.")
@options(FOLDER, DEVICE, *SWEEP)
@click.pass_context
def plan(ctx, path: Path, devices, **sweep) -> None:
    """List the candidates and reject what cannot be good. Needs neither GPU nor compiler."""
    from kdagen.autotune.plan import plan

    folder = _planned(ctx, path, devices, sweep)
    with _saying(folder) as say:
        plan(folder, say)
    _said(folder)


@command.command("compile", short_help="Compile those that are worth it.")
@options(FOLDER, JOBS, BUDGET, RAY)
def compile_(path: Path, jobs, budget, ray) -> None:
    """Compile the candidates that are worth it. Needs nvcc and TileLang, no GPU."""
    folder, compilers = _going_on(path), _compilers(ray)
    with _saying(folder, budget) as say:
        compilers(folder, jobs, say.deadline, say)
    _said(folder)


@command.command(short_help="Check them on devices, then time those that are right.")
@options(FOLDER, DEVICE, BUDGET, RAY)
def measure(path: Path, devices, budget, ray) -> None:
    """Check the candidates on devices, then time those that are right. Needs neither nvcc nor TileLang."""
    from kdagen.autotune.measure import measure

    folder = _going_on(path)
    devices, workers = _devices(folder, devices, ray)
    with _saying(folder, budget) as say:
        measure(folder, devices, say.deadline, say, workers and workers())
    _said(folder)


@command.command(short_help="Put the winners into the tables that ops choose by.")
@options(FOLDER, INTO)
def publish(path: Path, into) -> None:
    """Put the winners into the tables that ops choose by: whatever lies wholly below the untuned default."""
    from kdagen.autotune.folder import Folder
    from kdagen.autotune.publish import publish

    _published(publish(Folder(path), into))


@command.command(short_help="Say who won, by how much, and what became of the others.")
@options(FOLDER)
def why(path: Path) -> None:
    """Say who won and by how much, what limits it, and what became of all other candidates."""
    from kdagen.autotune.folder import Folder

    _said(Folder(path))


@command.command(short_help="The same as an HTML page with plots.")
@options(FOLDER)
def report(path: Path) -> None:
    """Write what `why` says as an HTML page with plots. Needs matplotlib: pip install 'kdagen[report]'."""
    from kdagen.autotune.folder import Folder
    from kdagen.autotune.report import report

    click.echo(f"wrote {report(Folder(path))}")


@command.command(short_help="The schedules that there are, and what each constraint removes.")
@click.argument("op")
@options(DEVICE, *TASK)
def space(op: str, devices, **sweep) -> None:
    """Print the schedules that there are for OP, how many, and what each constraint removes."""
    from kdagen.autotune.asked import sweep_of
    from kdagen.autotune.space import describe

    found = sweep_of(asked((op,), devices, **sweep))
    click.echo("\n".join(describe(study.task, found.fixed) for study in found.studies), nl=False)


def _planned(ctx, path: Path, devices, sweep: dict):
    """The folder of the sweep that is asked for; one that is there, or was recorded, need not be asked for again."""
    from kdagen.autotune.asked import recorded, sweep_of
    from kdagen.autotune.folder import SWEEP as FILE
    from kdagen.autotune.folder import Folder

    if given(ctx, sweep):
        Folder.create(path, sweep_of(asked(devices=devices, **sweep)))
    elif not (path / FILE).exists():
        replayed = next((spec for spec in devices if spec.startswith("replay:")), None)
        Folder.create(path, recorded(replayed) if replayed else sweep_of(asked(devices=devices, **sweep)))
    return _going_on(path)


def _going_on(path: Path):
    """The folder of a sweep; it is said how much is there."""
    from kdagen.autotune.folder import Folder
    from kdagen.autotune.standing import Standing

    folder = Folder(path)
    if there := Standing(folder.sweep, folder.log).there:
        click.echo(f"going on in {path}: {there}", err=True)
    return folder


@contextmanager
def _saying(folder, budget: float | None = None):
    """Progress; Ctrl-C ends it with a word on how to go on."""
    from kdagen.autotune import progress
    from kdagen.autotune.standing import Standing

    deadline = time.monotonic() + budget if budget else None
    try:
        with progress.show(Standing(folder.sweep, folder.log), deadline) as say:
            yield say
    except KeyboardInterrupt:
        how = f"{click.get_current_context().command_path} --dir {folder.path}"
        click.echo(f"stopped; all that was found is kept: go on with `{how}`", err=True)
        raise SystemExit(130) from None


def _devices(folder, devices, ray: str | None) -> tuple:
    """Devices here and None; or by Ray, what makes their workers: all GPUs of the cluster unless some are given."""
    from functools import partial

    from kdagen.autotune.asked import devices_for
    from kdagen.autotune.sweep import CPU

    if ray is None:
        return list(devices) or devices_for(folder.sweep), None
    from kdagen.autotune import distribute

    on_cpu = all(study.task.target == CPU for study in folder.sweep.studies)
    devices = list(devices) or [CPU] * on_cpu
    return devices, partial(distribute.workers, devices, None if ray == "local" else ray)


def _compilers(ray: str | None):
    """compile_candidates, here or by Ray."""
    from functools import partial

    from kdagen.autotune import compile

    if ray is None:
        return compile.compile_candidates
    from kdagen.autotune import distribute

    return partial(distribute.compile_candidates, address=None if ray == "local" else ray)


def _said(folder) -> None:
    from kdagen.autotune.why import why

    click.echo(why(folder), nl=False)


def _published(paths: list[Path]) -> None:
    found = ", ".join(map(str, paths))
    nothing = "nothing: the untuned default was in no finals yet (those on a recording count for --into alone)"
    click.echo(f"published {found or nothing}")


def _reported(folder) -> None:
    """The report of a sweep that can do without: where matplotlib is missing a note."""
    from kdagen.autotune.report import report
    from kdagen.errors import ToolchainError

    try:
        click.echo(f"wrote {report(folder)}")
    except ToolchainError as error:
        click.echo(f"no report: {error}")
