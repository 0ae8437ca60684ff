"""Trains a language model on bytes of real text, then lets it write: three layers of KDA to one of full attention.

    python examples/train_bytes.py                             # on the sources of Python's standard library: minutes
    python examples/train_bytes.py ~/mail.txt --steps 5000     # on a file, or the files of a folder (--pattern '*.md')
    torchrun --nproc-per-node 2 examples/train_bytes.py        # each batch and all parameters divided, with FSDP2

The last twentieth of the text is held out, and bits a byte are told of it. Called again, the command goes on where it
was, or was killed. The model is left in the folder `model` of --out, for KimiLinear.from_pretrained. Needs
kdagen[models,report].
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path

import click
import numpy
import torch

from kdagen.errors import ArgumentError, KdagenError
from kdagen.models import Config, KimiLinear, LinearAttention
from kdagen.models.training import Processes, Settings, draw, train
from kdagen.models.training.plot import figure_class

END = b"\0"  # of a file
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}  # of the standard library
HELD_OUT = 20  # one part of so many
BATCHES = 4  # that are evaluated on


class Text:
    """Bytes to train on and bytes held out; a batch is a function of (seed, step)."""

    def __init__(self, data: bytes, length: int, seed: int = 0):
        whole = numpy.frombuffer(data, dtype=numpy.uint8)
        cut = len(whole) - len(whole) // HELD_OUT
        self.train, self.held_out, self.length, self.seed = whole[:cut], whole[cut:], length, seed
        if len(self.held_out) <= length:
            raise ArgumentError(
                f"the text has {len(whole)} bytes, {len(self.held_out)} of them held out, for sequences of {length}: "
                f"expected more text, or a shorter --length"
            )

    def batch(self, step: int, size: int) -> tuple:
        """Sequences from anywhere, and the byte that follows each."""
        return self._windows(self.train, numpy.random.default_rng([self.seed, step]), size)

    def evaluation(self, size: int) -> list[tuple]:
        """The same few batches each time, of what is held out."""
        draw = numpy.random.default_rng(0)
        return [self._windows(self.held_out, draw, size) for _ in range(BATCHES)]

    def _windows(self, data, draw, size: int) -> tuple:
        starts = draw.integers(0, len(data) - self.length, size)
        found = torch.from_numpy(numpy.stack([data[i : i + self.length + 1] for i in starts]).astype(numpy.int64))
        return found[:, :-1], found[:, 1:]


def read(path: Path | None, pattern: str, most: int) -> bytes:
    """A file, or the files of a folder behind each other, in the order of their names; at most so many bytes."""
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    files = [root] if root.is_file() else sorted(x for x in root.rglob(pattern) if x.is_file())
    if path is None:
        files = [x for x in files if not SKIPPED & set(x.relative_to(root).parts)]
    found, size = [], 0
    for file in files:
        found.append(file.read_bytes() + END)
        size += len(found[-1])
        if size >= most:
            break
    if not size:
        raise ArgumentError(f"{root} has no files {pattern}: expected text; name a file, a folder or a --pattern")
    return b"".join(found)[:most]


def model_of(hidden: int, layers: int, heads: int, experts: int, mixer: str, ratio: int, seed: int = 0) -> KimiLinear:
    """A hybrid of `ratio` linear layers to one of full attention; a token is a byte."""
    dim, rank = hidden // heads, hidden // 2
    linear = LinearAttention(head_dim=dim, num_heads=heads, mixer=mixer, ratio=ratio)
    latent = {"kv_lora_rank": rank, "qk_nope_head_dim": dim, "qk_rope_head_dim": dim // 4, "v_head_dim": dim}
    sparse = {"num_experts": experts, "num_experts_per_token": min(2, experts), "moe_intermediate_size": hidden}
    tokens = {"bos_token_id": None, "eos_token_id": END[0], "pad_token_id": None}
    config = Config(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, linear_attn_config=linear, **sparse, **latent, **tokens,
    )  # fmt: skip
    return KimiLinear(config, seed=seed)


def bits(loss: float) -> float:
    """Of a loss in nats."""
    return loss / math.log(2)


def said(figures: dict) -> str:
    """Bits a byte."""
    held_out = f", held out {bits(figures['held_out_loss']):.3f}" if "held_out_loss" in figures else ""
    return f"{bits(figures['loss']):.3f} bits a byte{held_out}, accuracy {figures['accuracy']:.1%}"


def sample(model: KimiLinear, prompt: str, count: int, seed: int) -> str:
    """What the model writes after a prompt."""
    new = model.generate([list(prompt.encode())], count, temperature=0.8, top_p=0.95, seed=seed)[0]
    return prompt + bytes(new).rstrip(END).decode(errors="replace")


@click.command(help=__doc__.split("\n\n")[0], context_settings={"show_default": True})
@click.argument("text", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--pattern", default="*.py", help="of the files in a folder")
@click.option("--bytes", "most", type=click.IntRange(1), default=50_000_000, help="that are read, at most")
@click.option("--steps", type=int, default=400)
@click.option("--batch", type=int, default=8, help="sequences a step, of all processes together")
@click.option("--length", type=click.IntRange(2), default=256, help="bytes of a sequence")
@click.option("--lr", type=float, default=3e-3)
@click.option("--warmup", type=int, default=50, help="steps in which the rate rises")
@click.option("--hidden", type=click.IntRange(8), default=128, help="size")
@click.option("--layers", type=click.IntRange(1), default=4)
@click.option("--heads", type=click.IntRange(1), default=2, help="that divide the hidden size among them")
@click.option("--experts", type=click.IntRange(0), default=0, help="of all MLPs but the first; 0: they are dense")
@click.option("--mixer", default="kda", help="a name of the zoo, or file.py:name")
@click.option("--ratio", type=click.IntRange(0), default=3, help="linear layers to one of full attention")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--prompt", default="class ", help="what the sample begins with")
@click.option("--sample", "count", type=click.IntRange(0), default=300, help="bytes that it writes")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="runs/bytes", help="folder of the run")
@click.option("--evaluate-every", type=click.IntRange(1), default=50, help="steps")
@click.option("--save-every", type=click.IntRange(1), default=50, help="steps between checkpoints")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--threads", type=click.IntRange(1), default=1, help="of the CPU; more are faster where nothing else runs"
)
def main(out: Path, prompt: str, count: int, device: str, threads: int, **options) -> None:
    torch.set_num_threads(threads)
    try:
        figure_class()
        processes = Processes.join(device)
        run = trained(out, options, processes)
    except KdagenError as error:
        raise click.ClickException(str(error)) from None
    if processes.first:
        shown(run, out)
        click.echo(f"\n{sample(run.model, prompt, count, options['seed'])}")
    processes.leave()


def trained(out: Path, options: dict, processes: Processes):
    """The run, from its beginning or its checkpoint."""
    data = read(options["text"], options["pattern"], options["most"])
    text = Text(data, options["length"], options["seed"])
    if processes.first:
        click.echo(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out")
    settings = Settings(**{name: options[name] for name in ("steps", "batch", "lr", "warmup")})
    about = {"length": text.length, "seed": text.seed, "sha256": hashlib.sha256(data).hexdigest()}
    return train(
        model_of(*(options[name] for name in ("hidden", "layers", "heads", "experts", "mixer", "ratio", "seed"))),
        lambda step: text.batch(step, settings.batch), settings, out, about,
        held_out=text.evaluation(settings.batch), processes=processes, say=said, title=f"{options['mixer']} on bytes",
        **{name: options[name] for name in ("evaluate_every", "save_every")},
    )  # fmt: skip


def shown(run, out: Path) -> None:
    """What was learned, the plot and the model."""
    evaluated = [line for line in run.curve if "held_out_loss" in line]
    first, last = run.curve[0], evaluated[-1]
    click.echo(
        f"bits a byte: {bits(first['loss']):.2f} at step 1, {bits(last['loss']):.2f} at step {last['step']}; "
        f"held out {bits(last['held_out_loss']):.2f}; {run.ms:.0f} ms a step"
    )
    lines = {
        "trained on": ([line["step"] for line in run.curve], [bits(line["loss"]) for line in run.curve]),
        "held out": ([line["step"] for line in evaluated], [bits(line["held_out_loss"]) for line in evaluated]),
    }
    path = draw({"bits a byte": lines}, out / "bits.png", "")
    run.model.save_pretrained(out / "model")
    click.echo(f"wrote {path} and {out / 'model'}")


if __name__ == "__main__":
    main()
