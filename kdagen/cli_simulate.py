"""`kdagen simulate`: compiles to TileLang, executes those very programs on the CPU, compares with the recurrence."""

from __future__ import annotations

import click

from kdagen.cli_build import KEEP, choices, pair
from kdagen.errors import SimulationError


@click.command("simulate")
@click.argument("name")
@click.option("--arch", default="sm90", show_default=True, help="The target whose program is executed.")
@click.option(
    "--gate",
    default="mild",
    show_default=True,
    help="What decays are drawn: mild, softplus, bounded, extreme or reset (some of them -inf).",
)
@click.option("--tokens", type=click.IntRange(min=1), default=80, show_default=True, help="Tokens a sequence.")
@click.option("--heads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs drawn.")
@click.option("--backward", is_flag=True, help="The program for training: its gradients too, against torch's autograd.")
@click.option(
    "--keep", type=click.Choice(KEEP), help="With --backward: what the forward leaves for it.  [default: states]"
)
@click.option(
    "--check-schedules", is_flag=True, help="Also run the warps of each kernel side by side, in random orders."
)
@click.option("--head-dim", default="128", show_default=True, help="K, or K,V; 64, 128 or 256 each.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float16.")
@click.option("--gate-dtype", help="dtype of gates and scalars a token.  [default: --dtype]")
@click.option("--schedule", multiple=True, metavar="FIELD=VALUE", help="A choice, such as chunk_size=32; repeatable.")
@click.option(
    "--templates",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="A folder of kernel skeletons that come before kdagen's own.",
)
def command(name, arch, gate, tokens, heads, batch, seed, backward, keep, check_schedules, **options) -> None:
    """Execute the generated GPU program of NAME (of the zoo, or file.py:name) on the CPU. Needs no GPU and no nvcc.

    Every store rounds as the GPU's would; the result is compared with the recurrence, token by token in float64.
    """
    from kdagen import pipeline
    from kdagen.recurrence import load
    from kdagen.simulate import verify

    if keep and not backward:
        raise click.UsageError("--keep says what a forward leaves for its backward: add --backward")
    recurrence, dims = load(name), pair("--head-dim", options["head_dim"])
    fields = choices(options["schedule"]) | ({"keep": keep} if keep else {})
    make, check = (
        (pipeline.compile_training, verify.verify_training) if backward else (pipeline.compile_op, verify.verify)
    )
    source = make(recurrence, dims, options["dtype"], arch, fields, options["gate_dtype"], options["templates"])
    click.echo(heading(source, (batch, tokens, heads), gate))
    verdict = check(source, recurrence, (batch, tokens, heads), gate, seed, check_schedules)
    click.echo(report(source, verdict), nl=False)
    if check_schedules:
        click.echo("\n".join(schedule_lines(verdict)))
    if not verdict.ok:
        raise SimulationError(f"{source.name} for {source.target} is off by more than is allowed: see the errors above")


def heading(source, shape, gate: str) -> str:
    """What is executed, in two lines."""
    batch, tokens, heads = shape
    schedule = ", ".join(f"{field} {value}" for field, value in source.schedule.items())
    return (
        f"{source.name} for {source.target}, {source.dtype}, K = {source.dims['K']}, V = {source.dims['V']}: "
        f"B = {batch}, T = {tokens}, H = {heads}, {gate} gate\nschedule: {schedule}\n"
    )


def report(source, verdict) -> str:
    """Tables of what each kernel did and of the errors."""
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as text:
        console.print(_kernels(source, verdict))
        console.print()
        console.print(_errors(verdict))
    states = f"initial and final states: {verdict.state_bytes():,.0f} bytes a head, whatever the length"
    return f"{text.get()}\n{states}\nexecuted in {verdict.seconds:.1f} s\n"


def _table(*titles: str):
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left")
    return table


def _kernels(source, verdict):
    table = _table("kernel", "blocks", "threads", "bytes a token a head", "product FLOPs a token a head")
    threads = {k.name: k.threads for k in source.kernels}
    for name, statistics in verdict.statistics.items():
        figures = statistics.blocks, threads[name.split()[-1]], verdict.bytes(name), verdict.flops(name)
        table.add_row(name, *(f"{n:,.0f}" for n in figures))
    totals = (sum(map(verdict.bytes, verdict.statistics)), sum(map(verdict.flops, verdict.statistics)))
    table.add_row("all", "", "", *(f"{n:,.0f}" for n in totals))
    return table


def _errors(verdict):
    table = _table("against float64", "relative error", "at most", "is it")
    for what, (error, most) in verdict.errors.items():
        table.add_row(what, f"{error:.2e}", f"{most:g}", "yes" if error <= most else "NO")
    return table


def schedule_lines(verdict) -> list[str]:
    """The race simulator's verdict on each kernel."""
    return [_race_line(statistics.schedule) for statistics in verdict.statistics.values()]


def _race_line(report) -> str:
    if len(report.roles) == 1:
        return f"{report.kernel}: all warps have one role, so nothing can race"
    orders = f"{len(report.seeds)} random orders of copies, products and warps"
    return f"{report.kernel}: {len(report.roles)} roles of warps; {orders} gave the same bits"
