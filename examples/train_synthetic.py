"""Trains small models on synthetic tasks, KDA against other recurrences: palindrome, associative recall, stacks.

    python examples/train_synthetic.py                         # minutes on 2 CPU cores
    python examples/train_synthetic.py --report                # settings of the Kimi Linear report: 144 runs, for GPUs
    python examples/train_synthetic.py --task mqar --mixer rwkv7 --mixer mine.py:my_attention --length 64
    torchrun --nproc-per-node 2 examples/train_synthetic.py    # each batch and all parameters divided, with FSDP2

What the tasks are is in kdagen/models/training/tasks.py. Called again, the command goes on where it was, or was killed:
each run has a folder in --out, with a checkpoint and the figures of every step. Needs kdagen[models,report].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click
import torch

from kdagen.errors import KdagenError
from kdagen.models import Config, KimiLinear, LinearAttention
from kdagen.models.training import TASKS, Processes, Settings, draw, train
from kdagen.models.training.loop import WINDOW, Run, means
from kdagen.models.training.plot import figure_class

SMALL = {
    **{"task": tuple(TASKS), "mixer": ("kda", "gated_deltanet", "mamba2"), "length": (32,), "lr": (5e-3,)},
    **{"steps": 500, "batch": 32, "heads": 2, "head_dim": 32, "stacks": 4, "until": 0.999, "threads": 1},
}
REPORT = SMALL | {
    **{"length": (256, 512, 1024, 2048), "lr": (5e-5, 1e-4, 5e-4, 1e-3)},
    **{"steps": 20_000, "head_dim": 128, "stacks": 64, "threads": None},
}
LAYERS = 2


@dataclass(frozen=True)
class Choice:
    """One run of those that the options ask for."""

    task: str
    length: int
    mixer: str
    lr: float

    @property
    def folder(self) -> str:
        """Its name."""
        return f"{self.task}-{self.length}-{Path(self.mixer.replace(':', '-')).name}-{self.lr:g}"


def model_of(mixer: str, vocabulary: int, heads: int, head_dim: int, seed: int = 0) -> KimiLinear:
    """Two layers of linear attention, the hidden size that of all heads."""
    size = heads * head_dim
    linear = LinearAttention(head_dim=head_dim, num_heads=heads, mixer=mixer, ratio=None)
    tokens = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Config(
        vocab_size=vocabulary, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_experts=0, linear_attn_config=linear, **tokens,
    )  # fmt: skip
    return KimiLinear(config, seed=seed)


def task_of(choice: Choice, options: dict):
    """The task of a run. Unless given there are 16 symbols, or as many as leaves half of an mqar's keys unused."""
    symbols = options["symbols"] or max(16, choice.length // 2 if choice.task == "mqar" else 0)
    stacks = {"stacks": options["stacks"]} if choice.task == "stack" else {}
    return TASKS[choice.task](choice.length, symbols, options["seed"], **stacks)


def trained(choice: Choice, options: dict, processes: Processes) -> Run:
    """A run, from its beginning or its checkpoint."""
    task = task_of(choice, options)
    names = "steps", "batch", "until", "warmup", "decay"
    settings = Settings(lr=choice.lr, **{name: options[name] for name in names})
    model = model_of(choice.mixer, task.vocabulary, options["heads"], options["head_dim"], options["seed"])
    about = {"task": choice.task, **asdict(task), "mixer": choice.mixer}
    return train(
        model, lambda step: task.batch(step, settings.batch), settings, Path(options["out"]) / choice.folder, about,
        save_every=options["save_every"], processes=processes, title=choice.folder,
    )  # fmt: skip


def choices(options: dict) -> list[Choice]:
    """All runs, each task's together."""
    return [Choice(*x) for x in product(*(options[name] for name in ("task", "length", "mixer", "lr")))]


def best_of(runs: dict[Choice, Run]) -> dict[tuple, tuple]:
    """Of each task, length and mixer the choice with the best rate, and its run."""
    found: dict = {}
    for choice, run in runs.items():
        key = choice.task, choice.length, choice.mixer
        if key not in found or run.best > found[key][1].best:
            found[key] = choice, run
    return found


def table(best: dict, options: dict):
    """The best accuracy and the time of each; chance is one symbol of all."""
    from rich.table import Table

    found = Table(
        "task", "length", "mixer", "accuracy", "chance", "lr", "steps", "ms a step", box=None, padding=(0, 2, 0, 0)
    )
    for column in found.columns[3:]:
        column.justify = "right"
    for (task, length, mixer), (choice, run) in best.items():
        chance = 1 / task_of(choice, options).symbols
        figures = f"{run.best:.1%}", f"{chance:.1%}", f"{choice.lr:g}", str(len(run.curve)), f"{run.ms:.0f}"
        found.add_row(task, str(length), mixer, *figures)
    return found


def panels(best: dict) -> tuple[dict, str]:
    """Of each task the accuracy over steps, or of several lengths the best over length; and which of both."""
    over_length = len({length for _, length, _ in best}) > 1
    found: dict = {}
    for (task, length, mixer), (_, run) in best.items():
        x, y = found.setdefault(f"{task}: accuracy", {}).setdefault(mixer, ([], []))
        up = [run.best] if over_length else means([line["accuracy"] for line in run.curve])
        x += [length] if over_length else range(min(WINDOW, len(run.curve)), len(run.curve) + 1)
        y += up
    return found, "length" if over_length else "step"


def options_of(given: dict, report: bool) -> dict:
    """What was given, and for the rest the usual choices, or the report's."""
    usual = REPORT if report else SMALL
    return {name: usual.get(name) if value in (None, ()) else value for name, value in given.items()}


@click.command(help=__doc__.split("\n\n")[0], context_settings={"show_default": True})
@click.option("--report", is_flag=True, help="the report's settings, where no other option says otherwise")
@click.option("--task", multiple=True, type=click.Choice(tuple(TASKS)), help="may come several times; all")
@click.option("--mixer", multiple=True, help="a name of the zoo, or file.py:name; kda, gated_deltanet and mamba2")
@click.option("--length", multiple=True, type=int, help=f"tokens a sequence; {SMALL['length'][0]}")
@click.option("--lr", multiple=True, type=float, help=f"rates to try; {SMALL['lr'][0]}")
@click.option("--steps", type=int, help=f"at most; {SMALL['steps']}")
@click.option("--batch", type=int, help=f"sequences a step, of all processes together; {SMALL['batch']}")
@click.option("--heads", type=int, help=f"of each layer; {SMALL['heads']}")
@click.option("--head-dim", type=int, help=f"of keys and values; {SMALL['head_dim']}")
@click.option("--symbols", type=int, help="16, or more where an mqar has more keys")
@click.option("--stacks", type=int, help=f"of the task stack; {SMALL['stacks']}")
@click.option("--until", type=float, help=f"accuracy that ends a run; {SMALL['until']}")
@click.option("--warmup", type=int, default=50, help="steps in which the rate rises")
@click.option("--decay", type=click.Choice(("cosine", "linear", "constant")), default="cosine", help="of the rate")
@click.option("--seed", type=click.IntRange(0), default=0, help="of parameters and data")
@click.option(
    "--out", type=click.Path(file_okay=False), default="runs/synthetic", help="where runs are, each in a folder"
)
@click.option("--save-every", type=click.IntRange(1), default=100, help="steps between checkpoints")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", type=click.IntRange(1), help="of the CPU; 1, for which alone small tensors are large enough")
def main(report: bool, device: str, **given) -> None:
    options = options_of(given, report)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    try:
        figure_class()
        processes = Processes.join(device)
        runs = {choice: trained(choice, options, processes) for choice in choices(options)}
    except KdagenError as error:
        raise click.ClickException(str(error)) from None
    if processes.first:
        shown(best_of(runs), options)
    processes.leave()


def shown(best: dict, options: dict) -> None:
    """The table, and a plot beside the runs."""
    from rich.console import Console

    Console().print(table(best, options))
    lines, along = panels(best)
    path = draw(lines, Path(options["out"]) / "accuracy.png", "training accuracy on sequences never seen", along)
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
