"""Builds ops, and variants of their schedules, into one small folder: for a GPU machine without a compiler.

    python benchmarks/pack_for_device.py --out device_ops
    # carry kdagen's checkout and device_ops there, then:
    PYTHONPATH=. python benchmarks/gpu.py device_ops

Each sub-folder is a package as `kdagen build` writes it: `default`, with kernels of inference, training and decoding;
one for each variant of inference's schedule that an experiment of gpu.py asks for; for training, one for each other
choice of what a forward keeps; and, for inference and decoding, one for each other type of states.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
from gpu_experiments import VARIANTS, asked_of

from kdagen import zoo
from kdagen.build.builder import build
from kdagen.build.progress import Progress, summary
from kdagen.errors import ScheduleError
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.schedule import Keep
from kdagen.state import StateType

MIB = 1 << 20
TRAINED = zoo.names()
EVERY_POLICY = ("kda",)
STATE_TYPES = (StateType("VK"), StateType("KV", "bfloat16"), StateType("VK", "bfloat16"))
EVERY_STATE = ("kda",)


def sources(arch: str, ops: list[str], varied: list[str], variants: list[str]) -> dict[str, list]:
    """What to build of inference by package: defaults of all ops, then what differs from them, where it can be.

    That is built of the `varied` ops; where none are named, of those that an experiment asks for.
    """
    made = {"default": [compile_op(zoo.get(op), arch=arch) for op in ops]}
    for name in variants:
        for default in (s for s in made["default"] if s.name in (varied or asked_of(name))):
            source = _attempt(name, compile_op, default.name, arch, VARIANTS[name])
            if source and source.kernels != default.kernels:
                made.setdefault(name, []).append(source)
    return made


def training_sources(arch: str, ops: list[str], every_policy: list[str]) -> dict[str, list]:
    """The same of training: the default keeps states; what keeps something else has a package of its own."""
    made = {"default": [_attempt("training", compile_training, op, arch, {}) for op in ops]}
    for keep in (k.value for k in Keep if k != Keep.STATES):
        name, some = f"keep_{keep}", [op for op in ops if op in every_policy]
        made[name] = [_attempt(name, compile_training, op, arch, {"keep": keep}) for op in some]
    return {package: [s for s in found if s] for package, found in made.items() if any(found)}


def decode_sources(arch: str, ops: list[str], every_state: list[str]) -> dict[str, list]:
    """The same of decoding; types of states other than the default, in inference too, have packages of their own."""
    made = {"default": [compile_decode(zoo.get(op), arch=arch) for op in ops]}
    for state in STATE_TYPES:
        some = [zoo.get(op) for op in ops if op in every_state]
        makers = (compile_op, compile_decode)
        made[f"state_{state.name.replace('.', '_')}"] = [
            make(r, arch=arch, state=state) for r in some for make in makers
        ]
    return {package: found for package, found in made.items() if found}


def _attempt(what: str, make, op: str, arch: str, schedule: dict):
    """A source; None where no such schedule fits."""
    try:
        return make(zoo.get(op), arch=arch, schedule=schedule)
    except ScheduleError as error:
        click.echo(f"{what} of {op} left out: {error}")


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


def words(name: str, default, text: str):
    """An option that takes words."""
    return click.option(
        name, default=",".join(default), callback=lambda _, __, v: [w for w in v.split(",") if w], help=text
    )


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("device_ops"), show_default=True)
@click.option("--arch", default="sm90", show_default=True)
@words("--ops", zoo.names(), "Entries of the zoo, comma-separated.  [default: all]")
@words("--varied", (), "Those built for inference in every variant.  [default: as the experiments of gpu.py ask]")
@words("--variants", VARIANTS, f"Variants of inference's schedule.  [default: {','.join(VARIANTS)}]")
@words("--training", TRAINED, "Those of --ops that are built for training too, keeping states.  [default: all]")
@words(
    "--every-policy", EVERY_POLICY,
    "Those of --training also built to keep the inputs alone, and all: a few more kernels each, for what they share is "
    f"compiled once.  [default: {','.join(EVERY_POLICY)}]",
)  # fmt: skip
@words("--every-state", EVERY_STATE, f"Those for every type of states too.  [default: {','.join(EVERY_STATE)}]")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once.  [default: the number of cores]")
@click.option("--limit", default=50, show_default=True, help="MiB that the folder may have.")
def main(
    out: Path, arch: str, ops, varied, variants, training, every_policy, every_state, jobs: int | None, limit: int
) -> None:
    """Build what benchmarks/gpu.py and `pytest -m gpu` need on a GPU machine without a compiler.

    Every op's kernels for training take a minute or two of one core to compile: narrow --training where that is long.
    """
    started = time.perf_counter()
    training = [op for op in training if op in ops]
    kinds = (
        sources(arch, ops, varied, variants),
        training_sources(arch, training, every_policy),
        decode_sources(arch, ops, every_state),
    )
    for kind in kinds:
        for package, found in kind.items():
            click.echo(f"{package}:\n{summary(build_each(found, out / package, jobs))}", nl=False)
    total = size(out) / MIB
    click.echo(f"{out}: {total:.1f} MiB in {time.perf_counter() - started:.0f} s")
    if total > limit:
        raise click.ClickException(
            f"{out} has {total:.1f} MiB, expected at most {limit}: choose fewer --ops, --variants or --training"
        )


if __name__ == "__main__":
    main()
