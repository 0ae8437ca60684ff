"""Pages, plots and notes about a GPU from result files: all figures here are made up, and stay in tests' folders."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

FACTS = {"gpu": "A made-up GPU", "multiprocessors": 7, "versions": {"torch": "2.13"}}
CEILINGS = {"copy_bytes_a_second": 3.01e12, "bf16_flops_a_second": 790e12}


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def row(
    contender="kdagen default", ms=0.5, faster=None, op="kda", purpose="inference", shape=(1, 8192, 64), part="", **more
):
    return {
        "op": op, **dict(zip("BTH", shape)), "lengths": [], "size": " ".join(map(str, shape)), "purpose": purpose,
        "gate": "mild", "mode": "device", "contender": contender, "part": part,
        "ms": {"median": ms, "p25": ms - 0.01, "p75": ms + 0.02, "least": ms, "calls": 30},
        "times_faster_than_fla": faster, "floor_ms": 0.224, "of_floor": 0.224 / ms, "of_copy": 0.9, "of_product": None,
        **more,
    }  # fmt: skip


def timed(*rows) -> dict:
    return {"stage": "time", "name": "kda", "kernels": "k", "run": 0, "figures": {"rows": list(rows)}}


def ratio(kda: float, dplr: float) -> dict:
    table = [{"contender": "kda default", "ms": kda, "times_the_first": 1.0}]
    table.append({"contender": "dplr default", "ms": dplr, "times_the_first": kda / dplr})
    return {"stage": "ratio", "name": "kda, beside dplr", "kernels": "k", "run": 0, "figures": {"table": table}}


OVERLAP = [
    {"contender": "whole", "ms": 0.8, "times_the_first": 1.0, "same_bits": True},
    {"contender": "4 segments, side by side", "ms": 0.5, "times_the_first": 1.6, "same_bits": False},
]
ROLES = [{"contender": "kdagen default", "ms": 0.8, "times_the_first": 1.0},
         {"contender": "kdagen plain", "ms": 1.0, "times_the_first": 0.8}]  # fmt: skip
RECORDS = [
    {"stage": "correct", "name": "kda, inference, default", "figures": {"ok": True, "reason": "", "errors": {}}},
    {
        "stage": "correct",
        "name": "gla, inference, default",
        "figures": {"ok": False, "reason": "out is off", "errors": {}},
    },
    {"stage": "correct", "name": "dplr, inference, default", "failed": "hang: no answer within 240 s"},
    {"stage": "correct", "name": "kda, inference, fla chunk_kda", "figures": {"ok": True, "reason": "", "errors": {}}},
    {"stage": "sanitizer", "name": "memcheck, kda", "figures": {"verdict": "clean", "said": "ERROR SUMMARY: 0 errors"}},
    timed(row(faster=3.2), row("fla chunk_kda", 1.6), row(ms=0.2, part="prepare")),
    timed(row(ms=1.2, faster=2.5, purpose="training"), row(ms=0.4, purpose="training", part="forward")),
    timed(row(ms=0.3, purpose="decode", shape=(64, 1, 32), of_copy=0.85)),
    {"stage": "overlap", "name": "kda at 64 heads", "figures": {"table": OVERLAP}},
    {"stage": "roles", "name": "kda at 12 heads", "figures": {"table": ROLES}},
    ratio(0.5, 1.3),
]


def file(folder, name="H100-2026-01-02.json", records=RECORDS) -> Path:
    folder.mkdir(exist_ok=True)
    runs = [
        {"facts": FACTS, "ceilings": CEILINGS},
        {"facts": FACTS, "ceilings": {**CEILINGS, "copy_bytes_a_second": 3.05e12}},
    ]
    made = [{"kernels": "k", "run": 0, **r} for r in records]
    (folder / name).write_text(json.dumps({"gpu": "A made-up GPU", "left": [], "runs": runs, "records": made}))
    return folder / name


def test_a_page_says_what_is_in_the_file(tmp_path):
    import gpu_docs

    made = gpu_docs.write(file(tmp_path / "results"), tmp_path / "docs")
    assert [path.name for path in made] == ["H100.md", "H100.svg"]
    page = made[0].read_text()
    assert page.startswith("# A made-up GPU, 2026-01-02\n")
    assert "a large copy at 3.01 to 3.05 TB/s, a large bf16 product at 790 TFLOP/s" in page
    assert "1 of 3 sets of kernels are right" in page and "fla chunk_kda: " not in page
    assert "* gla, inference, default: out is off\n* dplr, inference, default: hang: no answer within 240 s" in page
    assert "| memcheck | kda | clean | ERROR SUMMARY: 0 errors |" in page
    assert "| kda | 1 8192 64 | mild | kdagen default | 0.500 | 0.490 to 0.520 | 3.20 | 45% | 90% |  |" in page
    assert "kdagen default, forward | 0.400" in page and "prepare" not in page.split("## ")[3]
    assert "| kda at 64 heads | 4 segments, side by side | 0.500 | 1.60 | **other bits** |" in page
    assert "| kda at 12 heads | plain (no roles, a chunk ahead) | 1.000 | 0.80 |" in page
    assert f"]({made[1].name})" in page and "<svg" in made[1].read_text()


def test_the_same_file_makes_the_same_bytes(tmp_path):
    import gpu_docs

    path = file(tmp_path / "results")
    first, second = (gpu_docs.write(path, tmp_path / name) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_file_without_times_makes_a_page_without_a_plot(tmp_path):
    import gpu_docs

    (made,) = gpu_docs.write(file(tmp_path / "results", records=RECORDS[:2]), tmp_path / "docs")
    assert "svg" not in made.read_text() and "1 of 2 sets" in made.read_text()


def test_pages_are_of_the_last_file_of_each_gpu(tmp_path, monkeypatch):
    import gpu_docs

    for name in ("H100-2026-01-02.json", "H100-2026-02-01.json", "H200-2026-01-01.json", "build.json"):
        file(tmp_path / "results", name)
    found = gpu_docs.last_files(tmp_path / "results")
    assert [path.name for path in found] == ["H100-2026-02-01.json", "H200-2026-01-01.json"]
    monkeypatch.setattr(gpu_docs, "RESULTS", tmp_path / "none")
    result = CliRunner().invoke(gpu_docs.main, [])
    assert (
        result.exit_code == 1
        and "expected" not in result.output
        and "measure some with benchmarks/gpu.py" in result.output
    )


SMALL = {"ops": ("kda",), "purposes": ("inference",)}


@pytest.fixture
def no_questions(monkeypatch):
    import gpu_predicted

    monkeypatch.setattr(gpu_predicted, "EXPERIMENTS", {})


def test_notes_without_any_measurement_say_so(no_questions):
    import gpu_notes

    made = gpu_notes.text([], **SMALL)
    lines = [line for line in made.splitlines() if line.startswith("| kda, inference")]
    assert len(lines) == 18 and all(gpu_notes.NEVER in line for line in lines)
    assert "Both are predicted, not measured" in made and "floor ms, not measured" in made
    first = next(line for line in lines if "B = 1, T = 8192, H = 64" in line).split(" | ")
    assert float(first[1]) == pytest.approx(1282 * 8192 * 64 / 1e6, abs=0.1)
    assert float(first[2]) == pytest.approx(1e3 * 1282 * 8192 * 64 / 3.35e12, abs=1e-3) and float(first[3]) > float(
        first[2]
    )
    assert not re.search(r"\| (reached|missed)", made)


def test_notes_have_a_line_for_each_file_of_a_case(tmp_path, no_questions):
    import gpu_docs
    import gpu_notes

    slow = [timed(row(ms=0.9, faster=1.8))]
    files = [file(tmp_path / "r", "H100-2026-01-01.json", slow), file(tmp_path / "r")]
    made = gpu_notes.text([gpu_docs.Found(path) for path in files], **SMALL)
    lines = [line.split(" | ") for line in made.splitlines() if "B = 1, T = 8192, H = 64 |" in line]
    assert [line[5] for line in lines] == ["0.900", "0.500"] and [line[8] for line in lines] == ["1.80", "3.20"]
    predicted = float(lines[0][3])
    assert float(lines[0][7]) == pytest.approx(0.9 / predicted, abs=0.01) and lines[1][9] == "2026-01-02 |"
    assert "| KDA forward, T = 8192, 64 heads: at most 0.6 ms | reached: 0.500 ms |" in made
    assert "| KDA forward, T = 8192, 96 heads: at most 0.8 ms | not measured yet |" in made
    assert "| KDA forward + backward: at least 2x FLA | reached: 2.50x |" in made
    assert "| Decoding, batches of 64 on: at least 80% of a copy | reached: 85% |" in made
    assert "| KDA: at least 2x kdagen's own DPLR | 2.60x (kda, beside dplr) |" in made
    missed = gpu_notes.text([gpu_docs.Found(files[0])], **SMALL)
    assert "at most 0.6 ms | missed: 0.900 ms |" in missed


def test_questions_have_a_prediction_beside_what_was_found(tmp_path, monkeypatch):
    import gpu_docs
    import gpu_predicted
    from kdagen.autotune import gpus

    call = (("gated_deltanet",),), ((1, 64, 12),)
    asks = gpu_predicted.Experiment("Do roles pay?", ("default", "plain", "chunk32"), *call)
    alone = gpu_predicted.Experiment("Side by side?", ("default",), *call, alone=True)
    monkeypatch.setattr(gpu_predicted, "EXPERIMENTS", {"roles": asks, "overlap": alone})
    name = "gated_deltanet, inference, mild gates, B = 1, T = 64, H = 12"
    record = {"stage": "roles", "name": name, "figures": {"table": ROLES}}
    found = gpu_docs.Found(file(tmp_path / "r", records=[record]))
    assert gpu_predicted.questions(gpus.find("H100"), found, ("kda",)) == []
    title, table = gpu_predicted.questions(gpus.find("H100"), found, ("gated_deltanet",))
    assert title == "### Do roles pay?"
    first, plain = (line.split(" | ") for line in table.splitlines()[2:])  # chunks of 32 are its default
    assert plain[1] == "plain (no roles, a chunk ahead)" and plain[4:] == ["1.000", "0.80 |"]
    assert float(first[2]) / float(plain[2]) == pytest.approx(float(plain[3]), abs=0.02) and first[3:5] == [
        "1.00",
        "0.800",
    ]


def test_a_gpu_that_was_measured_has_notes_of_its_own(tmp_path, no_questions):
    import gpu_docs
    import gpu_notes

    found = [gpu_docs.Found(file(tmp_path / "r", name)) for name in ("H200-2026-01-01.json", "unknown-2026-01-01.json")]
    titles = [line for line in gpu_notes.text(found, **SMALL).splitlines() if line.startswith("## ")]
    assert titles == ["## H100", "## H200"]


def test_what_people_wrote_into_the_notes_stays(tmp_path):
    import gpu_notes

    page = tmp_path / "notes.md"
    gpu_notes.put(page, "one\n")
    page.write_text("before\n" + page.read_text() + "after\n")
    gpu_notes.put(page, "two\n")
    assert page.read_text() == f"before\n{gpu_notes.HEAD}{gpu_notes.BEGIN}\n\ntwo\n\n{gpu_notes.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(gpu_notes.click.ClickException, match="expected the marks"):
        gpu_notes.put(page, "three\n")
