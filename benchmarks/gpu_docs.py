"""Pages about a GPU from gpu.py's JSON alone: tables and a plot in docs/gpu/<GPU>.md and .svg.

    python benchmarks/gpu_docs.py                           # the last file of each GPU in benchmarks/results
    python benchmarks/gpu_docs.py results/H100-2026-01-02.json --out docs/gpu

What the pages say is in the files, so they can be made again anywhere. The same files make the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
from gpu_experiments import EXPERIMENTS, WORDS

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs" / "gpu"
NAMED = re.compile(r"(.+)-(\d{4}-\d\d-\d\d)\.json")
PURPOSES = {
    "inference": "Forward",
    "training": "Forward and backward",
    "decode": "Decoding a token for each sequence",
}
TOP = 14  # cases of the plot


def last_files(folder: Path) -> list[Path]:
    """The last file of each GPU."""
    found = {m[1]: path for path in sorted(folder.glob("*.json")) if (m := NAMED.fullmatch(path.name))}
    return list(found.values())


class Found:
    """The records of a file, as pages want them."""

    def __init__(self, path: Path):
        self.path, self.data = path, json.loads(path.read_text())
        self.gpu, self.date = NAMED.fullmatch(path.name).groups()

    def records(self, stage: str) -> list[dict]:
        return [r for r in self.data["records"] if r["stage"] == stage]

    def run(self, record: dict) -> dict:
        return self.data["runs"][record["run"]]

    @property
    def rows(self) -> list[dict]:
        """Figures of whole ops and passes beside peers, by contender."""
        return [row for r in self.records("time") for row in r.get("figures", {}).get("rows", [])]

    @property
    def ceilings(self) -> list[dict]:
        return [run["ceilings"] for run in self.data["runs"] if run.get("ceilings")]


def page(found: Found) -> str:
    """The Markdown of a GPU."""
    parts = [_head(found), _correct(found), _sanitizer(found)]
    parts += [_times(found, purpose) for purpose in PURPOSES]
    parts += [_experiment(found, name) for name in EXPERIMENTS]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Found) -> str:
    facts = found.data["runs"][-1]["facts"] if found.data["runs"] else {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.get("versions", {}).items()))
    lines = [
        f"# {found.data['gpu'] or found.gpu}, {found.date}",
        f"Made by `benchmarks/gpu_docs.py` from [`{found.path.name}`](../../benchmarks/results/{found.path.name}).",
        f"{facts.get('multiprocessors', '?')} multiprocessors; {versions}. How figures are taken: "
        f"[`benchmarks/README.md`](../../benchmarks/README.md).",
    ]
    if found.ceilings:
        copies = [c["copy_bytes_a_second"] / 1e12 for c in found.ceilings]
        products = [c["bf16_flops_a_second"] / 1e12 for c in found.ceilings]
        lines.append(
            f"Measured in the same processes: a large copy at {_span(copies, 2)} TB/s, a large bf16 product at "
            f"{_span(products, 0)} TFLOP/s."
        )
    if found.rows:
        lines.append(f"![Forward times beside flash-linear-attention]({found.gpu}.svg)")
    return "\n\n".join(lines)


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _correct(found: Found) -> str:
    records = [r for r in found.records("correct") if not _of_peer(r)]
    if not records:
        return ""
    right = [r for r in records if r.get("figures", {}).get("ok")]
    lines = [
        "## Against the recurrence in float64",
        f"{len(right)} of {len(records)} sets of kernels are right: on adversarial inputs, twice, then in replays of "
        "launches and of CUDA graphs without a bit that moves.",
    ]
    off = [f"* {r['name']}: {r.get('failed') or r['figures']['reason']}" for r in records if r not in right]
    return "\n\n".join([*lines, "\n".join(off)] if off else lines)


def _of_peer(record: dict) -> bool:
    return record["name"].rpartition(", ")[2].startswith("fla ")


def _sanitizer(found: Found) -> str:
    records = found.records("sanitizer")
    if not records:
        return ""
    rows = [(*r["name"].split(", "), r["figures"]["verdict"], _first(r["figures"]["said"])) for r in records]
    return "## compute-sanitizer\n\n" + _table(("tool", "op", "found", "said"), rows)


def _first(text: str) -> str:
    return text.strip().splitlines()[-1].strip("= ") if text.strip() else ""


def _times(found: Found, purpose: str) -> str:
    rows = [r for r in found.rows if r["purpose"] == purpose and r["part"] in ("", "forward", "backward")]
    if not rows:
        return ""
    titles = ("op", "B T H", "gates", "contender", "ms", "quartiles", "times FLA", "floor", "of copy", "of products")
    lines = [_line(row) for row in rows]
    return f"## {PURPOSES[purpose]}\n\n{_table(titles, lines, right=4)}"


def _line(row: dict) -> tuple:
    ms, part = row["ms"], f", {row['part']}" if row["part"] else ""
    parts = [_or_blank(row[name], "{:.0%}") for name in ("of_floor", "of_copy", "of_product")]
    times = (
        f"{ms['median']:.3f}",
        f"{ms['p25']:.3f} to {ms['p75']:.3f}",
        _or_blank(row["times_faster_than_fla"], "{:.2f}"),
    )
    return row["op"], row["size"], row["gate"], f"{row['contender']}{part}", *times, *parts


def _or_blank(value, form: str) -> str:
    return "" if value is None else form.format(value)


def _experiment(found: Found, name: str) -> str:
    records = [r for r in found.records(name) if "figures" in r]
    if not records:
        return ""
    lines = []
    for record in records:
        for row in record["figures"]["table"]:
            bits = {True: "same bits", False: "**other bits**", None: ""}[row.get("same_bits")]
            times = f"{row['times_the_first']:.2f}"
            lines.append((record["name"], words(row["contender"]), f"{row['ms']:.3f}", times, bits))
    titles = ("call", "contender", "ms", "times as fast as the first", "")
    titles, lines = (titles, lines) if any(line[4] for line in lines) else (titles[:4], [line[:4] for line in lines])
    return f"## {EXPERIMENTS[name].question}\n\n{_table(titles, lines, right=2)}"


def words(contender: str) -> str:
    """What a contender is, where its package's name says little."""
    label = contender.removeprefix("kdagen ")
    return f"{label} ({WORDS[label]})" if label in WORDS and WORDS[label] != label else label


def _table(titles, rows, right: int = 99) -> str:
    """Markdown; columns from `right` on are figures."""
    marks = ["---:" if i >= right else "---" for i in range(len(titles))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (titles, marks, *rows))


def plot(found: Found, path: Path) -> None:
    """Forward times of default kernels and of peers, and each case's floor."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kdagen"
    import matplotlib.pyplot as plt

    bars = _bars(found)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(bars)), layout="constrained")
    for i, (_, ours, theirs, floor) in enumerate(bars):
        axes.barh(i - 0.2, ours, 0.38, color="#2f6f9f", label=None if i else "kdagen")
        if theirs:
            axes.barh(i + 0.2, theirs, 0.38, color="#c9c9c9", label=None if i else "flash-linear-attention")
        axes.plot([floor, floor], [i - 0.4, i + 0.4], color="#b03030", label=None if i else "floor: least traffic")
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms, forward, {found.data['gpu']}, {found.date}")
    axes.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _bars(found: Found) -> list[tuple]:
    bars = []
    for record in found.records("time"):
        rows = [r for r in record.get("figures", {}).get("rows", []) if not r["part"] and r["purpose"] == "inference"]
        ours = next((r for r in rows if r["contender"] == "kdagen default"), None)
        theirs = next((r["ms"]["median"] for r in rows if not r["contender"].startswith("kdagen")), None)
        if ours and ours["gate"] == "mild":
            bars.append((f"{ours['op']}  {ours['size']}", ours["ms"]["median"], theirs, ours["floor_ms"]))
    return bars[:TOP]


def write(path: Path, out: Path) -> list[Path]:
    """The page of a file, and its plot if there is something to be seen."""
    found = Found(path)
    out.mkdir(parents=True, exist_ok=True)
    made = [out / f"{found.gpu}.md"]
    made[0].write_text(page(found))
    if _bars(found):
        made.append(out / f"{found.gpu}.svg")
        plot(found, made[1])
    return made


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, show_default=True)
def main(files, out) -> None:
    """Write the pages of FILES, by default of the last file of each GPU."""
    files = files or last_files(RESULTS)
    if not files:
        raise click.ClickException(f"no <GPU>-<date>.json in {RESULTS}: measure some with benchmarks/gpu.py")
    for path in files:
        click.echo("\n".join(map(str, write(path, out))))


if __name__ == "__main__":
    main()
