"""What a generation tells people while it runs: on a terminal a display that stands below the text, elsewhere one line.

Text goes to stdout as it comes, all else to stderr. `reading` is for the time in which a model is read.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext


class Brief:
    """Text as it comes; when it is over, how fast it came."""

    def __init__(self, prompt: int, new: int, sequences: int = 1, out=None, err=None, clock=time.perf_counter):
        self.out, self.err, self.clock = out or sys.stdout, err or sys.stderr, clock
        self.prompt, self.new, self.sequences = prompt, new, sequences
        self.was_read, self.was_written = 0, 0
        self.began, self.first, self.last = clock(), None, None
        self.within_line = False

    def read(self, tokens: int) -> None:
        """So many more tokens of prompts were read."""
        self.was_read += tokens

    def wrote(self, tokens: int) -> None:
        """So many new tokens came, at once."""
        self.last = self.clock()
        self.first = self.last if self.first is None else self.first
        self.was_written += tokens

    def text(self, piece: str) -> None:
        """More of the text."""
        self.out.write(piece)
        self.out.flush()
        self.within_line = not piece.endswith("\n") if piece else self.within_line

    @property
    def counts(self) -> str:
        """How much was read and written, and how fast."""
        if self.first is None:
            return f"read {self.was_read:,} of {self.prompt:,} tokens{_rate(self.was_read, self.clock() - self.began)}"
        later = max(0, self.was_written - self.sequences)  # the first token of each comes with its prompt
        read = f"read {self.was_read:,} tokens{_rate(self.was_read, self.first - self.began)}"
        return f"{read}; wrote {self.was_written:,}{_rate(later, self.last - self.first)}"

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Ends the last line."""
        if self.within_line:
            Brief.text(self, "\n")
        print(self.counts, file=self.err, flush=True)


class Live(Brief):
    """A bar and figures that stand still. Where text goes to the same terminal it is held back to whole lines, and the
    line that is being written stands above the bar."""

    def __init__(self, *sizes, console=None, beside: bool = False, **options):
        from rich.console import Console
        from rich.live import Live as Display

        super().__init__(*sizes, **options)
        self.console, self.beside, self.line = console or Console(stderr=not beside), beside, ""
        self._display = Display(
            console=self.console,
            get_renderable=self.picture,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
        )

    def text(self, piece: str) -> None:
        if not self.beside:
            return super().text(piece)
        from rich.cells import cell_len, chop_cells

        *whole, line = (self.line + piece).split("\n")
        while cell_len(line) > self.console.width:
            first = chop_cells(line, self.console.width)[0]
            whole, line = [*whole, first], line[len(first) :]
        self.line = line
        for text in whole:
            self._print(text)

    def _print(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text), soft_wrap=True)

    def picture(self):
        """What is shown now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        reading = self.first is None
        done, total = (self.was_read, self.prompt) if reading else (self.was_written, self.new)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            ProgressBar(total=max(1, total), completed=done, width=20),
            Text(self.counts, "", overflow="ellipsis", no_wrap=True),
        )
        return Group(*([Text(self.line)] if self.line else []), row)

    def __enter__(self):
        self._display.start(refresh=True)
        return self

    def __exit__(self, *_) -> None:
        self._display.stop()
        if self.line:
            self._print(self.line)
        super().__exit__()


def _rate(tokens: int, seconds: float) -> str:
    return f" in {seconds:.1f} s ({tokens / seconds:,.0f} a second)" if tokens and seconds > 0 else ""


def show(prompt: int, new: int, sequences: int = 1) -> Brief:
    """What suits where stdout and stderr go."""
    if not sys.stderr.isatty():
        return Brief(prompt, new, sequences)
    return Live(prompt, new, sequences, beside=sys.stdout.isatty())


def reading(what):
    """A word on what is being read, for as long as it takes, on a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(f"reading {what}")
