"""Executes a PrimFunc after warp specialisation: roles side by side, barriers with phases, copies that land late.

program.py runs the same kernel in program order and so shows what it computes; this module shows whether its
synchronisation holds. A seed drives who runs next. A TMA copy poisons its target until it lands. wgmma's accumulator
is poisoned until the wait that retires it, and its operands must not change before then. Each role has its own
registers. The warps of one role run in step: what drifts apart within a role is not seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from kdagen.errors import SimulationError
from kdagen.simulate.asynchronous import LATE, Role
from kdagen.simulate.memory import Frame
from kdagen.simulate.program import Simulator
from kdagen.simulate.roles import RaceCompiler, misplaced_fragments

HASTE = (1, 4, 16)  # how much likelier one role, or memory, is to go next than another


class _Block:
    """The roles of one block, its copies in flight, and who goes next.

    In a patient block a wgmma retires only when nothing else can move: the worst that the hardware may do.
    """

    def __init__(self, f: Frame, body, roles: list[tuple[int, int]], rng: random.Random, patient: bool):
        self.rng, self.patient, self.transfers = rng, patient, []
        self.roles = [Role(f, *bounds, self.transfers) for bounds in roles]
        for role in self.roles:
            role.steps = body(role)
        self.haste = {id(who): rng.choice(HASTE) for who in [*self.roles, self]}

    def run(self):
        live = list(self.roles)
        while live:
            able = self._able(live)
            who = self.rng.choices(able, [self.haste[id(a)] for a in able])[0]
            if who is self:
                self.transfers.pop(self.rng.randrange(len(self.transfers)))()
            elif not self._step(who):
                live.remove(who)
        if self.transfers:
            raise SimulationError(f"the block ends with {len(self.transfers)} copies in flight: wait for each")

    def _able(self, live: list[Role]) -> list:
        able = [role for role in live if role.ready] + ([self] if self.transfers else [])
        if not able:
            raise SimulationError("deadlock: " + "; ".join(f"{role} {role.waiting}" for role in live))
        hasty = [who for who in able if who is self or who.waiting is not LATE]
        return hasty if hasty and self.patient else able

    @staticmethod
    def _step(role: Role) -> bool:
        try:
            role.waiting = next(role.steps)
        except StopIteration:
            if role.flights:
                raise SimulationError(f"{role} end with {len(role.flights)} wgmma in flight: add wait_wgmma") from None
            return False
        return True


class RaceSimulator(Simulator):
    """`RaceSimulator(prim_func_after_specialisation, seed)(*arrays)` runs in place; a hazard it meets is an error."""

    compiler = RaceCompiler

    def __init__(self, prim_func, seed: int = 0, tf32: bool = True):
        super().__init__(prim_func, tf32, seed)
        self.misplaced = misplaced_fragments(prim_func.body, self.program.role_test)

    def __call__(self, *arrays: np.ndarray):
        if self.misplaced:
            raise SimulationError(
                f"fragment '{self.misplaced[0]}' belongs to one role but code common to all roles reads it: "
                "move that statement into the role, or into its loop"
            )
        self.rng = random.Random(self.seed)
        super().__call__(*arrays)

    def _run_block(self, f: Frame):
        f.env.update((var, 0) for var in self.program.zero)
        _Block(f, self.body, self.program.roles, self.rng, patient=(self.seed + f.block) % 2 == 0).run()


@dataclass
class ScheduleReport:
    """Whether a kernel's synchronisation held, seed by seed."""

    kernel: str
    roles: list[tuple[int, int]]  # thread ranges
    seeds: tuple[int, ...]
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self):
        held = len(self.seeds) - len(self.failures)
        text = f"{self.kernel}: {len(self.roles)} roles, {held} of {len(self.seeds)} seeds hold"
        reasons = dict.fromkeys(self.failures.values())
        seeds = {why: ", ".join(str(s) for s, w in self.failures.items() if w == why) for why in reasons}
        return "\n".join([text, *(f"  seed {seeds[why]}: {why}" for why in reasons)])


def check_schedule(prim_func, target, arrays, seeds=range(6)) -> ScheduleReport:
    """Runs the kernel as `target` specialises it, once a seed, against program order; they must agree bit for bit.

    `prim_func` is as traced; the arrays stay as they are. Where there is but one role, one seed says it all.
    """
    from kdagen.build import adapter

    expected = _copies(arrays)
    Simulator(prim_func)(*expected)
    simulator = RaceSimulator(adapter.specialised(prim_func, target))
    roles = simulator.program.roles
    report = ScheduleReport(simulator.name, roles, tuple(seeds) if len(roles) > 1 else tuple(seeds)[:1])
    for seed in report.seeds:
        simulator.seed, given = seed, _copies(arrays)
        try:
            simulator(*given)
        except SimulationError as error:
            report.failures[seed] = str(error)
            continue
        if differing := _differences(prim_func, expected, given):
            report.failures[seed] = differing
    return report


def _copies(arrays) -> list:
    return [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]


def _differences(prim_func, expected, given) -> str:
    found = []
    for param, a, b in zip(prim_func.params, expected, given, strict=True):
        if isinstance(a, np.ndarray) and a.tobytes() != b.tobytes():
            wrong = ~((a == b) | ((a != a) & (b != b)))
            buffer = prim_func.buffer_map[param]
            found.append(f"'{buffer.name}' differs in {wrong.sum()} of {a.size} elements, {(b != b).sum()} are NaN")
    return "; ".join(found)
