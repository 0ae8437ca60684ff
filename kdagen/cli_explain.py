"""`kdagen explain`: how a recurrence is derived, what it costs, how its decays stay finite."""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("name")
@click.option("--against", metavar="OTHER", help="Set NAME beside another recurrence: what does it save?")
@click.option("--latex", is_flag=True, help="The chunk form's equations as a LaTeX document.")
@click.option("--tensor-ir", is_flag=True, help="The chunk form as the compiler holds it.")
def command(name: str, against: str | None, latex: bool, tensor_ir: bool) -> None:
    """Show what kdagen makes of NAME (of the zoo, or file.py:name): canonical form, chunk form, cost, decays."""
    from kdagen import explain
    from kdagen.recurrence import load

    if sum(map(bool, (against, latex, tensor_ir))) > 1:
        raise click.UsageError("--against, --latex and --tensor-ir are three views: choose one")
    recurrence = load(name)
    if against:
        text = explain.compare(recurrence, load(against))
    elif latex:
        text = explain.latex(recurrence)
    elif tensor_ir:
        from kdagen.ir.tensor_show import show

        text = show(explain.Derived(recurrence).program)
    else:
        text = explain.explain(recurrence)
    click.echo(text, nl=False)
