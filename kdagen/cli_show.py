"""`kdagen show`: what one stage of the compiler makes of a recurrence, as text."""

from __future__ import annotations

import click

from kdagen.cli_build import choices, pair

STAGES = ("recurrence", "canonical", "tensor", "adjoint", "tile", "tilelang")


@click.command("show")
@click.argument("name")
@click.option("--stage", type=click.Choice(STAGES), default="tilelang", show_default=True)
@click.option("--backward", is_flag=True, help="What is made for training: the kernels of both passes, the adjoint.")
@click.option("--arch", default="sm90", show_default=True)
@click.option("--head-dim", default="128", show_default=True, help="K, or K,V; 64, 128 or 256 each.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--schedule", multiple=True, metavar="FIELD=VALUE", help="A choice: chunk_size=32; repeatable.")
@click.option(
    "--templates", multiple=True, type=click.Path(exists=True, file_okay=False), help="Skeletons of your own."
)
def command(name, stage, backward, arch, head_dim, dtype, schedule, templates) -> None:
    """Print what a stage of the compiler makes of NAME (of the zoo, or file.py:name)."""
    from kdagen import pipeline
    from kdagen.recurrence import load

    recurrence = load(name)
    dims = pair("--head-dim", head_dim)
    make = pipeline.compile_training_stages if backward or stage == "adjoint" else pipeline.compile_stages
    made = make(recurrence, dims, dtype, arch, choices(schedule), template_folders=templates)
    click.echo(text(recurrence, made, stage))


def text(recurrence, made, stage: str) -> str:
    """A stage's result in that stage's own notation."""
    import json

    from kdagen.ir import tensor_show, tile
    from kdagen.ir.canonical_json import to_json

    return {
        "recurrence": lambda: str(recurrence),
        "canonical": lambda: json.dumps(to_json(made.canonical), indent=2),
        "tensor": lambda: tensor_show.show(made.program),
        "adjoint": lambda: tensor_show.show_adjoint(made.adjoint),
        "tile": lambda: "\n\n".join(map(tile.show, made.kernels)),
        "tilelang": lambda: "\n".join(k.text for k in made.source.kernels),
    }[stage]()
