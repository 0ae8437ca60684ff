"""`kdagen explain`: how a recurrence is derived, what it costs, how its decays stay finite."""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("name")
@click.option("--backward", is_flag=True, help="The backward: what is differentiated how, its cost, what it keeps.")
@click.option("--against", metavar="OTHER", help="Set NAME beside another recurrence: what does it save?")
@click.option("--latex", is_flag=True, help="The equations as a LaTeX document.")
@click.option("--tensor-ir", is_flag=True, help="The chunk form, or its adjoint, as the compiler holds it.")
def command(name: str, backward: bool, against: str | None, latex: bool, tensor_ir: bool) -> None:
    """Show what kdagen makes of NAME (of the zoo, or file.py:name): canonical form, chunk form, cost, decays."""
    from kdagen import explain, explain_backward
    from kdagen.ir import tensor_show
    from kdagen.recurrence import load

    if sum(map(bool, (against, latex, tensor_ir))) > 1:
        raise click.UsageError("--against, --latex and --tensor-ir are three views: choose one")
    if against and backward:
        raise click.UsageError("--against compares forwards: leave out --backward")
    recurrence = load(name)
    if against:
        text = explain.compare(recurrence, load(against))
    elif latex:
        text = (explain_backward if backward else explain).latex(recurrence)
    elif tensor_ir:
        derived = explain.Derived(recurrence)
        text = tensor_show.show_adjoint(derived.adjoint) if backward else tensor_show.show(derived.program)
    else:
        text = (explain_backward if backward else explain).explain(recurrence)
    click.echo(text, nl=False)
