"""Finds the kernels that an op runs on a GPU: in the build folder, in the cache, or built just in time.

They are looked for by the hash of their generated sources, so what is found computes exactly this recurrence. When
they are neither there nor can be built, that is an error: nothing falls back to anything else.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from pathlib import Path

from kdagen import debug
from kdagen.autotune.select import Selection
from kdagen.errors import ArgumentError, TargetError, ToolchainError
from kdagen.runtime import manifest as manifests
from kdagen.runtime.loader import LoadedOp, cached_op_folder, find_built, load_op
from kdagen.runtime.options import Options
from kdagen.runtime.tuned import Want
from kdagen.target import TARGETS, Target, running, target

log = logging.getLogger("kdagen")


class JustInTime:
    """The kernels of one recurrence under one set of options, for whichever GPU asks."""

    def __init__(self, recurrence, options: Options, spec: str):
        self.recurrence, self.options, self.spec = recurrence, options, spec
        self.choices: dict[Want, Selection] = {}  # what was chosen for the calls so far
        self._sources: dict[tuple[str, str, str], object] = {}
        self._loaded: dict[tuple[str, str, str], LoadedOp] = {}
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """The build folder that is looked in."""
        return Path(self.options.build_dir) if self.options.build_dir else debug.build_dir()

    def source(self, gpu: Target, purpose: str = "inference", schedule: dict | None = None):
        """The OpSource for a target, by a whole schedule's fields or as the options have it; generated once."""
        which = _which(gpu, purpose, schedule)
        if which not in self._sources:
            o, (make, chosen) = self.options, self._compiler(purpose)
            self._sources[which] = make(
                self.recurrence, o.head_dim, o.dtype, gpu.name, chosen if schedule is None else schedule, o.gate_dtype,
                template_folders=o.templates, state=o.state,
            )  # fmt: skip
        return self._sources[which]

    def _compiler(self, purpose: str) -> tuple:
        """What makes the kernels of a purpose, and the fields of their schedule that were chosen."""
        from kdagen import pipeline

        o = self.options
        chosen = {"inference": o.schedule, "training": training_schedule(o), "decode": o.decode_schedule}
        return pipeline.COMPILERS[purpose], chosen[purpose]

    def fitting(self, tensors: dict, capability: str, purpose: str = "inference", want: Want | None = None) -> LoadedOp:
        """The kernels for these arguments on a GPU of compute capability "9.0"; built if they are nowhere.

        `purpose` is "inference", "training" or "decode"; by `want` a tuned schedule is chosen, and put into `choices`.
        """
        gpu = self.target(capability)
        schedule = self.chosen(gpu, want)
        which = _which(gpu, purpose, schedule)
        if problem := (self._loaded.get(which) or self._unbuilt(gpu, purpose, schedule)).mismatch(tensors, capability):
            raise ArgumentError(
                f"{self.recurrence.name}: {problem}. Convert it, or compile for it: kg.compile(..., head_dim=(K, V), "
                f"dtype=..., gate_dtype=...) gives {manifests.variant(self.source(gpu, purpose).plan())} now"
            )
        with self._lock:
            if which not in self._loaded:
                place = self.find(gpu, purpose, schedule) or self.build(gpu, purpose, schedule)
                self._loaded[which] = load_op(place)
            return self._loaded[which]

    def planned(
        self, tensors: dict, capability: str | None = None, purpose: str = "training", want: Want | None = None
    ) -> LoadedOp:
        """The kernels as they are, or would be, built: for their shapes; nothing is built."""
        gpu = self.target(capability) if capability else self._likely_target()
        schedule = self.chosen(gpu, want)
        return self._loaded.get(_which(gpu, purpose, schedule)) or self._unbuilt(gpu, purpose, schedule)

    def _unbuilt(self, gpu: Target, purpose: str, schedule: dict | None) -> LoadedOp:
        """The kernels as they would be built: arguments that these do not take are refused before that."""
        plan = self.source(gpu, purpose, schedule).plan()
        return LoadedOp(Path(), {"target": {"runs_on": gpu.runs_on}, "plan": plan})

    def chosen(self, gpu: Target, want: Want | None) -> dict | None:
        """The schedule for a call; None for the one that the options have."""
        if want is None:
            return None
        if want not in self.choices:
            self.choices[want] = self._choice(gpu, want)
        return self.choices[want].schedule

    def _choice(self, gpu: Target, want: Want) -> Selection:
        """What is chosen, and can be had: what is built already comes before what no table knows, or no nvcc makes."""
        from kdagen.autotune.choose import choose
        from kdagen.autotune.sweep import Task

        key, o = want.key, self.options
        if (key.head_dim, key.dtype, key.gate_dtype) != (o.head_dim, o.dtype, o.gate_dtype or o.dtype):
            return Selection(None, "default", "compiled for other dtypes or head dims")
        task = Task(self.recurrence, key.purpose, gpu.name, key.device, o.head_dim, o.dtype, o.gate_dtype, o.state)
        found = choose(key, lambda schedule: self.source(gpu, key.purpose, schedule), task, want.usable, want.keep)
        if found.schedule is None or self.find(gpu, key.purpose, found.schedule):
            return found
        if (found.how == "model" or not _has_nvcc()) and self.find(gpu, key.purpose):
            return Selection(None, "default", f"built already, unlike those {found.words}")
        return found

    def target(self, capability: str) -> Target:
        """The target of the GPU at hand; an arch that was asked for must run on it."""
        name, fits = self.recurrence.name, running(capability)
        if not self.options.arch:
            if not fits:
                known = ", ".join(f"{t.runs_on[0]} ({t.example})" for t in TARGETS.values() if t.compiles)
                raise TargetError(
                    f"{name}: kdagen does not compile for compute capability {capability}: expected one of {known}"
                )
            return fits
        gpu = target(self.options.arch)
        if capability not in gpu.runs_on:
            advice = f"arch='{fits.name}', or leave arch out" if fits else "another GPU"
            raise TargetError(
                f"{name}: compiled for {gpu.name} (compute capability {' or '.join(gpu.runs_on)}), but the GPU has "
                f"{capability}; {self.holdings()}. Expected {advice}"
            )
        return gpu

    def find(self, gpu: Target, purpose: str = "inference", schedule: dict | None = None) -> Path | None:
        """The folder of kernels that were built already."""
        return find_built(self.source(gpu, purpose, schedule), [self.folder])

    def where(self, place: Path) -> str:
        """How people call the place in which kernels were found."""
        return "build folder" if self.folder in place.parents else "cache"

    def build(self, gpu: Target, purpose: str = "inference", schedule: dict | None = None) -> Path:
        """Compiles the kernels into the cache; another process that wants the same waits for it."""
        source = self.source(gpu, purpose, schedule)
        self._check_toolchain(gpu, source)
        from kdagen.build.builder import build_cached

        what = f"{self.recurrence.name} for {manifests.variant(source.plan())}"
        log.warning(
            "%s: not built yet (%s): compiling now. Ahead of time: %s", what, self.holdings(), self.command(gpu)
        )
        started = time.perf_counter()
        place = build_cached(source)
        log.info("%s: compiled in %.1f s, into %s", what, time.perf_counter() - started, place)
        return place

    def _check_toolchain(self, gpu: Target, source) -> None:
        from kdagen.build.toolchain import find_nvcc

        try:
            find_nvcc()
        except ToolchainError as error:
            looked = f"{self.folder} and {cached_op_folder(manifests.digest(source))}"
            raise ToolchainError(
                f"{self.recurrence.name}: no kernels for {gpu.name} in {looked} ({self.holdings()}), and none can be "
                f"built here: {error}\nor build them on another machine, which needs no GPU, and pass build_dir=DIR "
                f"to kg.compile (or set KDAGEN_BUILD_DIR):\n  {self.command(gpu)}"
            ) from None

    def describe(self) -> list[tuple[str, str]]:
        """Rows of `op.explain()`: for the arch that was asked for, else the GPU at hand, else sm90."""
        from kdagen.runtime import explain

        gpu = self._likely_target()
        rows = explain.describe_plan(self.source(gpu).plan())
        if place := self.find(gpu):
            return rows + explain.describe_kernels(place, self.where(place))
        return rows + explain.describe_missing(_has_nvcc(), self.holdings(), self.command(gpu))

    def _likely_target(self) -> Target:
        import torch

        if self.options.arch or not torch.cuda.is_available():
            return target(self.options.arch or "sm90")
        return self.target(".".join(map(str, torch.cuda.get_device_capability())))

    def holdings(self) -> str:
        """What the build folder has of this op."""
        folder = self.folder / self.recurrence.name
        found = sorted(path.parent.name for path in folder.glob(f"[!.]*/{manifests.MANIFEST}"))
        return f"{folder} holds {', '.join(found) if found else 'nothing'}"

    def command(self, gpu: Target) -> str:
        """The `kdagen build` that makes these kernels."""
        words = ["kdagen", "build", "--arch", gpu.name, "--op", self.spec, "--out", "DIR", *self.options.words()]
        return shlex.join(words)


def training_schedule(options: Options) -> dict:
    """The fields of the training kernels' schedule that were chosen: `schedule` itself speaks of inference only."""
    return {"keep": options.keep, **(options.training_schedule or {})}


def _which(gpu: Target, purpose: str, schedule: dict | None) -> tuple[str, str, str]:
    return gpu.name, purpose, manifests.canonical(schedule) if schedule else ""


def _has_nvcc() -> bool:
    from kdagen.build.toolchain import find_nvcc

    try:
        return bool(find_nvcc())
    except ToolchainError:
        return False
