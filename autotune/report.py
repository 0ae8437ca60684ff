"""`kdagen tune report`: one static HTML page with plots, which needs no network; what `why` says, and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from kdagen.autotune import plots
from kdagen.autotune.folder import Folder
from kdagen.autotune.standing import Place, Standing, StudyStanding
from kdagen.autotune.why import conditions, expected, failures, funnel, picks, shape

PAGE = "report.html"


def report(folder: Folder) -> Path:
    """Writes the page and returns its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    standing = Standing(folder.sweep, folder.log)
    studies = [(name, _study(study)) for name, study in standing.studies.items()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(sweep=folder.sweep, studies=studies)
    path = folder.path / PAGE
    path.write_text(text)
    return path


def _study(study: StudyStanding) -> dict:
    steps = study.funnel()
    return {
        "expected": list(expected(study)),
        "funnel": funnel(study),
        "plot": _image(plots.drawn(plots.funnel, steps)) if steps else None,
        "places": [_place(study, place) for place in study.places],
        "failures": failures(study),
    }


def _place(study: StudyStanding, place: Place) -> dict:
    shapes = [(w, list(shape(study, place, w)), list(_plots(study, place, w))) for w in map(str, study.study.workloads)]
    about = {"name": str(place), "conditions": conditions(study, place), "picks": picks(study, place)}
    return about | {"shapes": shapes}


def _plots(study: StudyStanding, place: Place, workload: str) -> Iterator[tuple[str, str]]:
    """Captions and images."""
    ratio = study.pick_ratio(place, workload)
    pick = f": the model's untuned pick is {ratio:.2f}x the best measured" if ratio else ""
    for caption, draw in (
        (f"Predicted against measured{pick}", plots.predicted),
        ("The two axes that matter most", plots.heat),
        ("Best so far", plots.best_so_far),
    ):
        if svg := plots.drawn(draw, study, place, workload):
            yield caption, _image(svg)


def _image(svg: str) -> str:
    """An SVG within the page: an image of its own, so that names in one do not meet those of another."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
