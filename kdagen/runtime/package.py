"""An op as the package that `kdagen build` writes exposes it: `from my_ops import kda`.

Called like the op that `kdagen.compile` returns, and a torch op like it (kdagen.runtime.op), but nothing is compiled:
the manifests say what the op takes, and which GPU, dtypes and head dims each folder of kernels is for. On CPU tensors
it runs the CPU backend, on the recurrence as the manifest stores it.
"""

from __future__ import annotations

import contextlib
import sys
from functools import cached_property
from pathlib import Path

from kdagen.autotune.select import Entry, Selection, entry_of, select, tables
from kdagen.errors import ArgumentError, ArtefactError, KdagenError
from kdagen.purposes import PURPOSES
from kdagen.runtime import manifest as manifests
from kdagen.runtime.checks import short
from kdagen.runtime.loader import LoadedOp, load_op
from kdagen.runtime.tuned import Want
from kdagen.schedule import Keep
from kdagen.state import DEFAULT, StateType


class BuiltOp:
    """One op of a package, with all its folders of kernels; see kdagen.runtime.op.Op for what it takes."""

    def __init__(self, folder: str | Path, state: StateType | None = None, tuned: bool = True):
        """`state` chooses among kernels for several types of states; by default those of the first type.

        Unless `tuned`, all calls run by the default schedules.
        """
        self.folder, self.name, self._state, self._tuned = Path(folder), Path(folder).name, state, tuned
        self.choices: dict[Want, Selection] = {}  # what was chosen for the calls so far
        self._chosen: dict[Want, LoadedOp] = {}
        self._op = None
        if "torch" in sys.modules:  # at once, for torch.compile cannot trace the reading of files
            with contextlib.suppress(KdagenError):  # a damaged op keeps no other from loading: its first call says so
                self.load()

    def __call__(self, *args, **named):
        """(output [B, T, HV, V], final state [N, HV, K, V] or None); the options are those of Op."""
        if self._op is None:
            self.load()
        return self._op(*args, **named)

    def recurrent(self, *args, **named):
        """What a call gives, token by token: see Op.recurrent."""
        return (self._op or self.load()).recurrent(*args, **named)

    def decode(self, *args, **named):
        """The next tokens of sequences whose states are in a pool: see Op.decode."""
        return (self._op or self.load()).decode(*args, **named)

    def load(self):
        """Reads the manifests, checks their hashes, registers the torch op; returns the Op."""
        from kdagen.runtime import torch_op
        from kdagen.runtime.op import Op, shared
        from kdagen.runtime.signature import signature

        digests = [variant.manifest["digest"] for variant in self.variants]
        identity = torch_op.identity("built", str(self.folder.resolve()), digests, self._tuned)
        untuned = frozenset() if self._tuned else frozenset(PURPOSES)
        rest = self._canonical, self, self.keep, self.wide, self.state, untuned
        self._op = shared(identity, lambda: Op(signature(self.recurrence), identity, *rest))
        return self._op

    @cached_property
    def _every_variant(self) -> list[LoadedOp]:
        """Its folders of kernels, with hashes checked."""
        found = [load_op(path.parent) for path in sorted(self.folder.glob(f"[!.]*/{manifests.MANIFEST}"))]
        if not found:
            raise ArtefactError(
                f"{self.folder} holds no built kernels: rebuild it with `kdagen build --op {self.name}`"
            )
        return found

    @cached_property
    def variants(self) -> list[LoadedOp]:
        """Its folders of kernels for its type of states."""
        if found := [v for v in self._every_variant if v.state == self.state]:
            return found
        wanted, known = self.state, sorted({f"{v.state.layout}, {v.state.dtype}" for v in self._every_variant})
        raise ArgumentError(
            f"no kernels of {self.name} with states of {wanted.layout}, {wanted.dtype}: {self.folder} has "
            f"{'; '.join(known)}: build some with `kdagen build --op {self.name} --state-layout {wanted.layout} "
            f"--state-dtype {wanted.dtype}`"
        )

    @cached_property
    def state(self) -> StateType:
        """How its states are given and returned: the default, if it has kernels for that."""
        types = [v.state for v in self._every_variant] if self._state is None else [self._state]
        return DEFAULT if DEFAULT in types else types[0]

    def with_state(self, state_layout: str = DEFAULT.layout, state_dtype="float32") -> BuiltOp:
        """The op whose states are of another type, as `kdagen.compile(state_layout=, state_dtype=)` has it."""
        return BuiltOp(self.folder, StateType(state_layout, short(state_dtype)), self._tuned)

    def untuned(self) -> BuiltOp:
        """The op whose calls all run by the default schedules: no bit depends on what was tuned for which size."""
        return BuiltOp(self.folder, self._state, tuned=False)

    @property
    def keep(self) -> Keep:
        """What a forward in training leaves for its backward, as its kernels were built."""
        return next((Keep(v.plan["schedule"]["keep"]) for v in self.variants if v.training), Keep.STATES)

    @property
    def wide(self) -> set[str]:
        """The arguments a token that every variant takes in float32."""
        specs = [v.plan["tensors"].values() for v in self.variants]
        wide = [{t["name"] for t in tensors if "T" in t["shape"] and t["dtype"] == "float32"} for tensors in specs]
        return set.intersection(*wide)

    @property
    def recurrence(self) -> dict:
        """What all its kernels compute, as the manifests store it."""
        first, *others = (variant.plan["recurrence"] for variant in self.variants)
        if first is None or any(other != first for other in others):
            names = ", ".join(variant.folder.name for variant in self.variants)
            raise ArtefactError(
                f"{self.folder}: {names} do not say that they compute one and the same recurrence: "
                f"rebuild all of them with `kdagen build --op {self.name}`"
            )
        return first

    def _canonical(self):
        from kdagen.ir.canonical_json import from_json

        return from_json(self.recurrence["canonical"])

    @property
    def arguments(self) -> list[str]:
        """The names of its tensors, in order."""
        return self.variants[0].plan["arguments"]

    def fitting(self, tensors: dict, capability: str, purpose: str = "inference", want: Want | None = None) -> LoadedOp:
        """The variant for a compute capability ("9.0") and tensors; says why each other does not fit.

        `purpose` is "inference", "training" or "decode"; by `want` one with a tuned schedule is chosen, and what was
        chosen is put into `choices`.
        """
        if (chosen := self._chosen.get(want)) and chosen.mismatch(tensors, capability) is None:
            return chosen
        reasons, fits = [], []
        for variant in self._variants_for(purpose):
            if reason := variant.mismatch(tensors, capability):
                reasons.append(f"{variant.folder.name}: {reason}")
            else:
                fits.append(variant)
        if not fits:
            listed = f" fit ({'; '.join(reasons)})" if reasons else f" are in {self.folder}"
            raise ArgumentError(
                f"no kernels of {self.name}{'' if purpose == 'inference' else f' for {purpose}'}{listed}: "
                f"build some with `kdagen build --op {self.name}`"
            )
        return self._choose(want, fits) if want else fits[0]

    def _choose(self, want: Want, fits: list[LoadedOp]) -> LoadedOp:
        """The variant with exactly the schedule that tables have for this call, else the untuned one."""
        found = select(want.key, self.entries, want.usable)
        same = [v for v in fits if found.schedule and found.schedule == v.plan["schedule"]]
        if found.schedule and not same:
            found = Selection(None, "default", f"kernels {found.words} are not in {self.folder}")
        self.choices[want] = found
        self._chosen[want] = (same or fits)[0]
        return self._chosen[want]

    @cached_property
    def entries(self) -> list[Entry]:
        """Tables as they were when its kernels were built; where these know nothing of a key, those that are here."""
        built = {}
        for variant in self.variants:
            built |= {(e := entry_of(line)).key: e for line in variant.manifest.get("tuned", ())}
        return [*built.values(), *(e for e in tables() if e.key not in built)]

    def _variants_for(self, purpose: str) -> list[LoadedOp]:
        """Those of a purpose, untuned ones first."""
        return sorted((v for v in self.variants if v.purpose == purpose), key=lambda v: v.tuned)

    def planned(
        self, tensors: dict, capability: str | None = None, purpose: str = "training", want: Want | None = None
    ) -> LoadedOp:
        """The variant that these tensors would run on, whatever the GPU if no capability is given."""
        if capability:
            return self.fitting(tensors, capability, purpose, want)
        variants = self._variants_for(purpose)
        archs = dict.fromkeys(c for v in variants for c in v.manifest["target"]["runs_on"])
        found = [v for c in archs for v in variants if v.mismatch(tensors, c) is None]
        return found[0] if found else self.fitting(tensors, "unknown", purpose)

    def describe(self) -> list[tuple[str, str]]:
        """Rows of `explain`: each folder of kernels, those of inference first."""
        from kdagen.runtime import explain

        how = {
            "inference": explain.describe_plan,
            "training": explain.describe_trained,
            "decode": explain.describe_decoding,
        }
        rows, untuned = [], {manifests.variant(v.plan): v.plan for v in self.variants if not v.tuned}
        for variant in sorted(self.variants, key=lambda v: PURPOSES.index(v.purpose)):
            default = untuned.get(manifests.variant(variant.plan))
            tuned = explain.describe_tuned(variant.plan, default) if variant.tuned and default else None
            rows += tuned or how[variant.purpose](variant.plan)
            rows += explain.describe_kernels(variant.folder, "this package")
        return rows

    def explain(self) -> str:
        """What would run on CPU and on CUDA tensors, and what ran last."""
        return (self._op or self.load()).explain()

    def __deepcopy__(self, memo) -> BuiltOp:
        """A module that is copied shares its ops: they hold no parameters."""
        return self

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.arguments)}) built for {', '.join(v.folder.name for v in self.variants)}"
