"""What gpu_forward.py prints and writes: a plan of cases, figures of each contender, and tables of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import gpu_contenders as contenders
from rich.table import Table


@dataclass(frozen=True)
class Case:
    """One op at one shape, with the kernels to time by label."""

    op: str
    shape: tuple[int, int, int]  # B, T, H
    kernels: dict

    @property
    def first(self):
        """Any of the kernels: arguments are the same for all."""
        return next(iter(self.kernels.values()))

    @property
    def floor_bytes(self) -> int:
        return contenders.floor_bytes(self.first, self.shape)

    def __str__(self):
        return f"{self.op}, B = {self.shape[0]}, T = {self.shape[1]}, H = {self.shape[2]}"


def rows(case: Case, mode: str, times: dict, errors: dict, copy_rate: float) -> list[dict]:
    """Figures of each contender, ready for JSON."""
    peer = contenders.peer(case.op)
    against = times.get(peer.label) if peer else None
    modelled = _modelled(case)
    floor_ms = 1e3 * case.floor_bytes / copy_rate
    found = []
    for label, t in times.items():
        moved = modelled.get(label)
        found.append(
            {
                "op": case.op,
                **dict(zip("BTH", case.shape)),
                "mode": mode,
                "contender": label,
                "ms": asdict(t),
                "times_faster_than_fla": against.median / t.median if against and ":" not in label else None,
                "floor_ms": floor_ms,
                "of_floor": floor_ms / t.median if ":" not in label else None,
                "modelled_bytes": moved,
                "bytes_a_second": moved / (t.median * 1e-3) if moved else None,
                "error": errors.get(label.removeprefix("kdagen ")),
            }
        )
    return found


def _modelled(case: Case) -> dict[str, float]:
    """Bytes by label, of whole ops and of single kernels."""
    found = {}
    for label, kernels in case.kernels.items():
        parts = contenders.modelled_bytes(kernels, case.shape)
        found[f"kdagen {label}"] = sum(parts.values())
        found |= {f"kdagen {label}: {family}": moved for family, moved in parts.items()}
    return found


def table(measured: list[dict]) -> Table:
    """One line a contender."""
    made = Table(box=None, pad_edge=False, title_justify="left")
    for i, title in enumerate(
        ("op", "B T H", "mode", "contender", "ms", "p25", "p75", "x FLA", "of floor", "GB/s", "error")
    ):
        made.add_column(title, justify="right" if i > 3 else "left", no_wrap=True)
    for row in measured:
        ms = row["ms"]
        made.add_row(
            row["op"],
            f"{row['B']} {row['T']} {row['H']}",
            row["mode"],
            row["contender"],
            *(f"{ms[k]:.3f}" for k in ("median", "p25", "p75")),
            _or_blank(row["times_faster_than_fla"], "{:.2f}"),
            _or_blank(row["of_floor"], "{:.0%}"),
            _or_blank(row["bytes_a_second"] and row["bytes_a_second"] / 1e9, "{:.0f}"),
            _or_blank(row["error"], "{:.1e}"),
        )
    return made


def _or_blank(value, form: str) -> str:
    return "" if value is None else form.format(value)


def plan_table(todo: list[Case], modes, rounds: int) -> Table:
    """What would be measured."""
    made = Table(box=None, pad_edge=False)
    for i, title in enumerate(
        ("op", "B T H", "kernels", "decay, chunk", "bytes a token a head", "least", "GB", "beside", "calls")
    ):
        made.add_column(title, justify="right" if i > 3 and i != 7 else "left", no_wrap=True)
    for case in todo:
        tokens = case.shape[0] * case.shape[1] * case.shape[2]
        peer = contenders.PEERS.get(case.op)
        for label, kernels in case.kernels.items():
            schedule = kernels.plan["schedule"]
            moved = sum(contenders.modelled_bytes(kernels, case.shape).values()) / tokens
            memory = contenders.tensor_bytes(kernels, case.shape, "argument", *contenders.ALLOCATED)
            made.add_row(
                case.op, " ".join(map(str, case.shape)), label,
                f"{schedule.get('decay', '')}, {kernels.plan['chunk_size']}",
                f"{moved:,.0f}", f"{case.floor_bytes / tokens:,.0f}", f"{memory / 1e9:.2f}",
                peer.label if peer else "", str(rounds * len(modes)),
            )  # fmt: skip
    return made
