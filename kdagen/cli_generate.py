"""`kdagen generate`: text, or token ids, from the folder of a model; a cache can be kept, and gone on from."""

from __future__ import annotations

from pathlib import Path

import click

from kdagen.errors import ArgumentError

DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.command("generate")
@click.option(
    "--model",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A folder of config.json, safetensors and a tokenizer.",
)
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="Repeatable: prompts are read side by side.")
@click.option(
    "--prompt-file", "files", multiple=True, metavar="FILE", help="The same, from a file, - for stdin; repeatable."
)
@click.option("--tokens", "ids", multiple=True, metavar="1,2,3", help="A prompt as token ids; so is what comes.")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=128, show_default=True, help="Of each prompt.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that hold this much probability.",
)
@click.option("--seed", type=int, help="Of the drawing.  [default: another one each time]")
@click.option(
    "--stop",
    "stops",
    multiple=True,
    metavar="TEXT",
    help="End before this text, beside the model's own end; after this token id with --tokens. Repeatable.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the parameters.  [default: as they were saved]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1.  [default: cuda where there is one]")
@click.option("--chunk", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens read at a time.")
@click.option("--save-cache", "save", type=click.Path(path_type=Path), help="Keep what is needed to go on.")
@click.option(
    "--load-cache", "load", type=click.Path(path_type=Path), help="Go on from there; prompts, if any, come behind it."
)
def command(folder, load, save, dtype, device, max_new_tokens, temperature, top_p, seed, chunk, **asked) -> None:
    """Generate from a model: text to stdout as it comes, progress to stderr.

    Several prompts are generated from side by side, and printed when all are done.
    """
    from kdagen.models import progress
    from kdagen.models.asked import Prompts

    prompts = Prompts(folder, going_on=load is not None, **asked)
    if save and not save.absolute().parent.is_dir():
        raise ArgumentError(f"--save-cache {save}: there is no folder {save.parent}: expected one that exists")
    if load and not load.is_file():
        raise ArgumentError(f"--load-cache {load}: there is no such file: expected one that --save-cache wrote")
    device = _device(device)
    from kdagen.models.session import Run  # only now, for it takes torch

    with progress.reading(folder):
        run = Run.begun(_model(folder, dtype, device), prompts, load)
    drawing = {"temperature": temperature, "top_p": top_p, "seed": run.generator(seed) if temperature else None}
    shown = progress.show(sum(map(len, run.prompts)), max_new_tokens * len(run.prompts), len(run.prompts))
    try:
        with shown:
            run.generate(shown, max_new_tokens, chunk, drawing)
    except KeyboardInterrupt:
        click.echo("stopped" + (f"; {save} was not written" if save else ""), err=True)
        raise SystemExit(130) from None
    run.print()
    if save:
        run.save(save, drawing["seed"])


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or ["unknown"])[0]
        raise ArgumentError(
            f"--device {name}: expected a device of this machine, such as cpu or cuda: {first}"
        ) from None


def _model(folder: Path, dtype: str | None, device):
    import torch

    from kdagen.models import KimiLinear

    return KimiLinear.from_pretrained(folder, dtype and getattr(torch, dtype), device)
