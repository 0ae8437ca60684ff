"""The plot at the end of runs: figures over steps or lengths, a line a run. Drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from kdagen.errors import TrainingError


def figure_class():
    """matplotlib's Figure; asked for before a run, so that none is trained for nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainingError(
            "matplotlib is missing, which draws the plot at the end of a run: pip install 'kdagen[report]'"
        ) from None
    return Figure


def draw(panels: dict[str, dict[str, tuple]], path, title: str, along: str = "step") -> Path:
    """Writes a PNG.

    Args:
        panels: by what each shows, such as "loss": for each line its name, numbers along and numbers up.
    """
    figure = figure_class()(figsize=(4.2 * len(panels), 3.2), dpi=150, layout="constrained")
    for axes, (what, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=name, linewidth=1.2, marker="o" if len(x) < 10 else None)
        axes.set(xlabel=along, title=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)
    return Path(path)
