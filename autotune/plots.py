"""The plots of a report, as SVG text: drawn by matplotlib, the same bytes for the same log."""

from __future__ import annotations

import datetime
import io
import math
from collections import defaultdict

from kdagen.autotune.standing import Place, Step, StudyStanding

from kdagen.errors import ToolchainError

COLOURS = {"kept": "#2a7f62", "rejected": "#c9c9c9", "failed": "#c1443c"}
STYLE = {"svg.hashsalt": "kdagen", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False}


def _figure(height: float = 3.2):
    from matplotlib.figure import Figure

    return Figure(figsize=(4.8, height), layout="constrained")


def drawn(draw, *arguments) -> str | None:
    """The SVG of draw(figure's axes, *arguments); None where that says there is nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        raise ToolchainError(
            "matplotlib is missing, which draws the plots of a report: pip install 'kdagen[report]' "
            "(`kdagen tune why` says the same as text, without it)"
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = _figure()
        if draw(figure.subplots(), *arguments) is False:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def funnel(axes, steps: list[Step]) -> None:
    """How many candidates came to each rung, and what it said to them."""
    names = [step.rung for step in steps]
    left = [0] * len(steps)
    for verdict, colour in COLOURS.items():
        widths = [step.verdicts.get(verdict, 0) for step in steps]
        axes.barh(names, widths, left=left, color=colour, label=verdict)
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("candidates")
    axes.legend(frameon=False)


def predicted(axes, study: StudyStanding, place: Place, workload: str) -> bool | None:
    """The model's time against the measured one: on the line it was right; audited rejects are marked."""
    from matplotlib.ticker import LogLocator, NullFormatter

    points = {False: [], True: []}
    for candidate, time in study.times(place, workload).items():
        if ms := (study.model(candidate).get("predicted_ms") or {}).get(workload):
            points[candidate in study.audited].append((ms, time.ms))
    if not (every := points[False] + points[True]):
        return False
    for audited, found in points.items():
        label, marker = ("rejected by the model, audited", "x") if audited else ("kept by the model", "o")
        if found:
            axes.loglog(*zip(*found), marker, color="#c1443c" if audited else "#2a5a8c", label=label, markersize=5)
    ends = [0.9 * min(map(min, every)), 1.1 * max(map(max, every))]
    axes.plot(ends, ends, color="#888888", linewidth=0.8, label="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("predicted, ms")
    axes.set_ylabel("measured, ms")
    axes.legend(frameon=False)


def heat(axes, study: StudyStanding, place: Place, workload: str) -> bool | None:
    """The best time for each pair of values of the two axes of the space that matter most."""
    times = study.times(place, workload)
    points = [(study.model(c).get("schedule", {}), t.ms) for c, t in times.items()]
    names = matter(points)[:2]
    if not names:
        return False
    cells = defaultdict(lambda: math.inf)
    for schedule, ms in points:
        where = tuple(schedule.get(name) for name in names)
        cells[where] = min(cells[where], ms)
    values = [sorted({where[i] for where in cells}, key=_order) for i in range(len(names))] + [[None]]
    rows, columns = values[0], values[1]
    grid = [[cells.get((r, c) if len(names) == 2 else (r,), math.nan) for c in columns] for r in rows]
    axes.figure.colorbar(axes.imshow(grid, cmap="YlGnBu", aspect="auto"), label="best, ms")
    axes.set_yticks(range(len(rows)), map(str, rows))
    axes.set_ylabel(names[0])
    axes.set_xticks(range(len(columns)), map(str, columns) if len(names) == 2 else [""])
    axes.set_xlabel(names[1] if len(names) == 2 else "")
    for r, c in ((r, c) for r in range(len(rows)) for c in range(len(columns)) if not math.isnan(grid[r][c])):
        colour = "white" if 2 * grid[r][c] > min(cells.values()) + max(cells.values()) else "black"
        axes.text(c, r, f"{grid[r][c]:.3g}", ha="center", va="center", color=colour, fontsize=8)


def matter(points: list[tuple[dict, float]]) -> list[str]:
    """The fields of schedules that differ, that which explains most of the variance of log time first."""
    values = {name: {str(schedule.get(name)) for schedule, _ in points} for schedule, _ in points for name in schedule}
    effects = {name: _explained(points, name) for name in values if len(values[name]) > 1}
    return sorted(effects, key=lambda name: (-effects[name], name))


def _explained(points: list[tuple[dict, float]], name: str) -> float:
    """The variance between the means of groups that share a value."""
    groups = defaultdict(list)
    for schedule, ms in points:
        groups[str(schedule.get(name))].append(math.log(ms))
    mean = sum(map(sum, groups.values())) / len(points)
    return round(sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values()) / len(points), 9)


def _order(value) -> tuple:
    """Numbers by size, then words."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def best_so_far(axes, study: StudyStanding, place: Place, workload: str) -> bool | None:
    """The best time yet, as the sweep went on; the default's for comparison."""
    times = study.times(place, workload)
    seen = sorted((_seconds(study, c, place, workload), t.ms) for c, t in times.items())
    if not seen:
        return False
    start, best = seen[0][0], math.inf
    steps = [(at - start, best := min(best, ms)) for at, ms in seen]
    axes.step(*zip(*steps), where="post", color="#2a5a8c", marker=".", label="best so far")
    if default := times.get(study.twin(study.default)):
        axes.axhline(default.ms, color="#888888", linewidth=0.8, linestyle="--", label="default")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the first was timed")
    axes.set_ylabel("ms")
    axes.legend(frameon=False)


def _seconds(study: StudyStanding, candidate: str, place: Place, workload: str) -> float:
    """When it was first timed."""
    lines = (study.lines[rung].get(candidate, {}).get((place, workload)) for rung in ("screen", "final"))
    return datetime.datetime.fromisoformat(next(line["at"] for line in lines if line)).timestamp()
