"""What gpu.py prints and writes: a plan of cases, figures of each contender, and tables of both.

A label is that of a contender, or, after a colon, of a part of its work: a pass, or one kernel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import gpu_contenders as contenders
from kdagen.autotune import launches
from rich.table import Table

INFERENCE, TRAINING, DECODE = "inference", "training", "decode"


@dataclass(frozen=True)
class Case:
    """One op at one shape, with the kernels to time by label."""

    op: str
    shape: tuple[int, int, int]  # B, T, H
    kernels: dict
    purpose: str = INFERENCE
    gate: str = "mild"
    lengths: tuple[int, ...] = ()  # of a ragged batch's sequences

    @property
    def peer(self):
        """What it is measured beside, if that is installed and takes such a case."""
        found = contenders.peer(self.op, self.purpose)
        return None if found and self.lengths and not found.ragged else found

    @property
    def first(self):
        """Any of the kernels: arguments are the same for all."""
        return next(iter(self.kernels.values()))

    @property
    def least_bytes(self) -> dict[str, int]:
        """The least traffic by part."""
        return launches.least_bytes(self.first, self.shape)

    @property
    def size(self) -> str:
        """B, T, H and, of a ragged batch, how many sequences."""
        return " ".join(map(str, self.shape)) + (f" / {len(self.lengths)}" if self.lengths else "")

    def __str__(self):
        b, t, h = self.shape
        ragged = f" in {len(self.lengths)} sequences" if self.lengths else ""
        return f"{self.op}, {self.purpose}, {self.gate} gates, B = {b}, T = {t}{ragged}, H = {h}"


def rows(case: Case, mode: str, times: dict, peaks: dict, errors: dict, ceilings: dict, peer=None) -> list[dict]:
    """Figures of each contender and part, ready for JSON; ratios are of the same part. `errors`: worst, by label."""
    modelled, flops = _of_parts(case, "bytes"), _of_parts(case, "flops")
    own = {f"kdagen {label}": launches.least_bytes(kernels, case.shape) for label, kernels in case.kernels.items()}
    copy_rate, product_rate, found = ceilings["copy_bytes_a_second"], ceilings["bf16_flops_a_second"], []
    for label, t in times.items():
        contender, _, part = label.partition(": ")
        against = times.get(": ".join([peer.label, *filter(None, [part])])) if peer else None
        least = own.get(contender, case.least_bytes)  # states may be of other types
        moved, floor_ms = modelled.get(label), 1e3 * least[part] / copy_rate if part in least else None
        seconds, computed = t.median * 1e-3, flops.get(label)
        found.append(
            {
                "op": case.op,
                **dict(zip("BTH", case.shape)),
                "lengths": list(case.lengths),
                "size": case.size,
                "purpose": case.purpose,
                "gate": case.gate,
                "mode": mode,
                "contender": contender,
                "part": part,
                "ms": asdict(t),
                "times_faster_than_fla": against.median / t.median if against else None,
                "floor_ms": floor_ms,
                "of_floor": floor_ms / t.median if floor_ms else None,
                "modelled_bytes": moved,
                "bytes_a_second": moved / seconds if moved else None,
                "of_copy": moved / seconds / copy_rate if moved else None,
                "modelled_flops": computed,
                "flops_a_second": computed / seconds if computed else None,
                "of_product": computed / seconds / product_rate if computed else None,
                "peak_bytes": peaks.get(label),
                "error": errors.get(contender.removeprefix("kdagen ")),
            }
        )
    return found


def _of_parts(case: Case, what: str) -> dict[str, float]:
    """Modelled bytes or FLOPs by label, of whole ops, of passes and of single kernels."""
    parts = {label: contenders.modelled(kernels, case.shape, what) for label, kernels in case.kernels.items()}
    joined = {(label, part): amount for label, found in parts.items() for part, amount in found.items()}
    return {": ".join([f"kdagen {label}", *filter(None, [part])]): amount for (label, part), amount in joined.items()}


def table(measured: list[dict]) -> Table:
    """One line a contender and part."""
    made = Table(box=None, pad_edge=False, title_justify="left")
    titles = "op B,T,H for gate mode contender part ms p25 p75 xFLA floor copy GB/s product TFLOP/s peak,GB error"
    for i, title in enumerate(titles.split()):
        made.add_column(title.replace(",", " "), justify="right" if i > 6 else "left", no_wrap=True)
    for row in measured:
        ms = row["ms"]
        made.add_row(
            row["op"],
            row["size"],
            *(row[k] for k in ("purpose", "gate", "mode", "contender", "part")),
            *(f"{ms[k]:.3f}" for k in ("median", "p25", "p75")),
            _or_blank(row["times_faster_than_fla"], "{:.2f}"),
            _or_blank(row["of_floor"], "{:.0%}"),
            _or_blank(row["of_copy"], "{:.0%}"),
            _or_blank(row["bytes_a_second"] and row["bytes_a_second"] / 1e9, "{:.0f}"),
            _or_blank(row["of_product"], "{:.0%}"),
            _or_blank(row["flops_a_second"] and row["flops_a_second"] / 1e12, "{:.0f}"),
            _or_blank(row["peak_bytes"] and row["peak_bytes"] / 1e9, "{:.2f}"),
            _or_blank(row["error"], "{:.1e}"),
        )
    return made


def _or_blank(value, form: str) -> str:
    return "" if value is None else form.format(value)


def plan_table(todo: list[Case], modes, rounds: int) -> Table:
    """What would be measured."""
    made = Table(box=None, pad_edge=False)
    titles = ("op", "B T H", "for", "gate", "kernels", "decay, chunk", "bytes a token a head", "least", "GB", "beside")
    for i, title in enumerate((*titles, "calls")):
        made.add_column(title, justify="right" if i in (6, 7, 8, 10) else "left", no_wrap=True)
    for case in todo:
        tokens = case.shape[0] * case.shape[1] * case.shape[2]
        peer = contenders.known_peer(case.op, case.purpose)
        for label, kernels in case.kernels.items():
            schedule = kernels.plan["schedule"]
            moved = contenders.modelled(kernels, case.shape, "bytes")[""] / tokens
            roles = ("argument", "d_out", "state_pool", *launches.ALLOCATED)
            memory = launches.tensor_bytes(kernels, case.shape, *roles, sequences=len(case.lengths))
            made.add_row(
                case.op, case.size, case.purpose, case.gate, label,
                f"{schedule.get('decay', '')}, {kernels.plan['chunk_size']}",
                f"{moved:,.0f}", f"{case.least_bytes[''] / tokens:,.0f}", f"{memory / 1e9:.2f}",
                peer.label if peer else "", str(rounds * len(modes)),
            )  # fmt: skip
    return made
