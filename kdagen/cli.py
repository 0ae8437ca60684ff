"""The `kdagen` command: a thin group; each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import importlib.util

import click

from kdagen import debug
from kdagen.errors import KdagenError

# Where each command stands, and its one line in `kdagen --help`.
COMMANDS = {
    "build": ("kdagen.cli_build", "Compile an op's kernels for GPUs; needs none."),
    "explain": ("kdagen.cli_explain", "Show how a recurrence is derived, what it costs, how its decays stay finite."),
    "show": ("kdagen.cli_show", "Print what one stage of the compiler makes of a recurrence."),
    "tune": ("kdagen.cli_tune", "Find the fastest schedules: compile anywhere, measure on a device, keep the winners."),
    "generate": ("kdagen.cli_generate", "Generate text from a saved model; a cache can be kept and gone on from."),
    "simulate": ("kdagen.cli_simulate", "Execute an op's generated GPU program on the CPU."),
}
ENVIRONMENT = "\n".join(f"  {name}  {meaning}" for name, meaning in debug.VARIABLES.items())


class Commands(click.Group):
    """Loads a command's module when it is called, and prints kdagen's own errors as one line."""

    def list_commands(self, ctx) -> list[str]:
        return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx, name: str):
        return importlib.import_module(COMMANDS[name][0]).command if name in self.list_commands(ctx) else None

    def format_commands(self, ctx, formatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KdagenError as error:
            if debug.level():
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, epilog=f"\b\nEnvironment:\n{ENVIRONMENT}")
@click.version_option(package_name="kdagen")
def main() -> None:
    """From a linear-attention recurrence to GPU kernels and a PyTorch op."""


if __name__ == "__main__":
    main()
