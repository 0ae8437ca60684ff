"""What a run shows while it trains: a line that lives on a terminal; elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import Callable


def usual(figures: dict) -> str:
    """Loss and accuracy."""
    held_out = f", held out {figures['held_out_loss']:.4f}" if "held_out_loss" in figures else ""
    return f"loss {figures['loss']:.4f}, accuracy {figures['accuracy']:6.1%}{held_out}"


class Display:
    """A context; `show` is given the figures of each step."""

    def __init__(self, title: str, steps: int, wanted: bool, say: Callable[[dict], str], console=None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console or Console(quiet=not wanted)
        self.title, self.steps, self.say = title, steps, say
        self.live = wanted and self.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.live)
        self.every = max(1, steps // 10)
        self.evaluated: dict = {}  # the last figures of what is held out

    def __enter__(self):
        self.progress.start()
        self.bar = self.progress.add_task(self.title, total=self.steps, said="")
        return self

    def __exit__(self, *exception):
        self.progress.stop()

    def show(self, figures: dict, note: str = "") -> None:
        """The figures of a step, live; a line of the first, of every tenth part and of what is noted."""
        self.evaluated |= {name: x for name, x in figures.items() if name.startswith("held_out")}
        step, words = figures["step"], (self.say(self.evaluated | figures), f"{figures['ms']:.0f} ms", note)
        said = ", ".join(filter(None, words))
        self.progress.update(self.bar, completed=step, said=said)
        if not self.live and (step in (1, self.steps) or step % self.every == 0 or note):
            self.console.print(f"{self.title}  step {step} of {self.steps}: {said}", highlight=False, soft_wrap=True)
