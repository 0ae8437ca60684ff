"""`kdagen tune report`: one page that needs nothing else, the same for the same log."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import tune_logs
from kdagen.autotune import plots
from kdagen.autotune.report import report
from kdagen.autotune.standing import Place, Standing
from kdagen.autotune.why import why

NAME, SHAPE = tune_logs.INFERENCE.name, "1x8192x64"
VOID = {"meta", "img", "br"}
IMAGE = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """What a page refers to, its images by description, and its text; elements must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.tables, self.said = [], set(), [], {}, 0, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.open += [] if tag in VOID else [tag]
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs["href"]] if "href" in attrs else []
        self.tables += tag == "table"
        if tag == "img":
            assert attrs["alt"] not in self.images or "Funnel" in attrs["alt"]
            self.images[attrs["alt"]] = base64.b64decode(attrs["src"].removeprefix(IMAGE), validate=True).decode()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tune_logs.measured(tmp_path_factory.mktemp("tune") / "sweep")
    tune_logs.replace_dates(made)
    return made


@pytest.fixture(scope="module")
def page(folder):
    return Page(report(folder).read_text())


def drawn(text: str) -> str:
    """The words of a plot, which are words in it too."""
    return " ".join(
        "".join(e.itertext()) for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    )


def test_every_reference_is_within_the_page(page):
    assert page.links and {link.removeprefix("#") for link in page.links} <= page.ids
    for image in page.images.values():
        ids = set(re.findall(r'\bid="([^"]+)"', image))
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', image)) <= ids
        assert not re.search(r'(?:href|src)="(?!#|data:)', image) and "<script" not in image


def test_no_network(folder):
    text = report(folder).read_text()
    assert not re.search(r'(?:src|href|action)="(?!data:|#)', text) and "@import" not in text and "<script" not in text


def test_every_plot_is_there(page):
    plots = ("Predicted against measured: the model's untuned pick is 1.00x the best measured",)
    plots += ("The two axes that matter most", "Best so far")
    expected = {f"{plot}, {shape}" for plot in plots for shape in ("1x8192x64", "1x8192x12")} | {"Funnel"}
    assert set(page.images) == expected
    words = {alt: drawn(image) for alt, image in page.images.items()}
    assert "rejected by the model, audited" in words[f"{plots[0]}, {SHAPE}"]
    assert "chunk_size" in words[f"{plots[1]}, {SHAPE}"] and "0.433" in words[f"{plots[1]}, {SHAPE}"]
    assert "default" in words[f"{plots[2]}, {SHAPE}"]


def test_it_says_what_why_says(folder, page):
    for line in why(folder).splitlines():
        words = " ".join(line.removeprefix("  measured on").split(";")[0].split())
        if re.match(r" {6}\S", line) or "quarantined" in line:
            assert all(part in page.text for part in words.split(":")[0].split("  ")), line
    assert "A made-up GPU (132 processors), graph cold" in page.text
    assert (
        "The model's untuned picks are within 1.3x of the best measured on 2 of 2 shapes, 1.00x at worst." in page.text
    )
    assert "quarantined after 3 deaths" in page.text and "output is 0.31 from the recurrence" in page.text
    assert page.tables == 1


def test_conditions_are_those_of_finals(page):
    assert "clocks sm 1755" in page.text and "temperature 51 to 57" in page.text and "throttling none" in page.text
    assert "versions cuda 13.0, tilelang 0.1.15" in page.text


def test_the_same_log_gives_the_same_bytes(folder, page, monkeypatch):
    first = report(folder).read_bytes()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert report(folder).read_bytes() == first


def test_a_folder_that_was_only_planned(tmp_path):
    page = Page(report(tune_logs.planned(tmp_path / "sweep")).read_text())
    assert set(page.images) == {"Funnel"} and page.text.count("Not measured yet.") == 2 and not page.tables


def test_a_folder_with_an_empty_log(tmp_path):
    from kdagen.autotune.folder import Folder

    page = Page(report(Folder.create(tmp_path / "sweep", tune_logs.SWEEP)).read_text())
    assert not page.images and page.text.count("Nothing was planned yet.") == 2


def test_words_of_a_log_are_text_on_the_page(tmp_path):
    folder = tune_logs.planned(tmp_path / "sweep")
    folder.log.append(NAME, tune_logs.candidates()[0].id, "lowered", "failed", '<b>&amp; "a reason"</b>')
    assert '<b>&amp; "a reason"</b>' in Page(report(folder).read_text()).text


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_axes_that_matter_come_first():
    points = [({"a": a, "b": b, "c": c, "d": 7}, 10.0**a * 2.0**b) for a in (1, 2) for b in (1, 2) for c in "xy"]
    assert plots.matter(points) == ["a", "b", "c"]
    assert plots.matter(points[:1]) == plots.matter([]) == []


def test_a_heat_map_of_one_axis(folder):
    """Where schedules differ in one field alone, and where there is but one schedule."""
    study = Standing(folder.sweep, folder.log).studies[NAME]
    place, fields = next(iter(study.places)), {}
    for candidate in list(study.lines["screen"]):
        stages = study.schedule(candidate)["stages"]
        if stages in fields.values():
            for rung in ("screen", "final"):
                study.lines[rung].pop(candidate, None)
        fields[candidate] = stages
        study.lines["model"][candidate][()]["schedule"] = {"stages": stages}
    assert "stages" in drawn(plots.drawn(plots.heat, study, place, SHAPE))
    study.lines["screen"] = dict(list(study.lines["screen"].items())[:1])
    study.lines["final"] = {}
    assert plots.drawn(plots.heat, study, place, SHAPE) is None


def test_nothing_is_drawn_of_nothing(folder):
    study, nowhere = Standing(folder.sweep, folder.log).studies[NAME], Place("none", 1, "graph cold", "{}")
    for draw in (plots.predicted, plots.heat, plots.best_so_far):
        assert plots.drawn(draw, study, nowhere, SHAPE) is None
