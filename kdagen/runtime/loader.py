"""Loads what `kdagen build` left and launches it: needs torch and apache-tvm-ffi, no compiler, no TileLang, no sympy.

`LoadedOp` is one folder of kernels: one target, dtype, head dims and state type. What a launch must know of its tensors
is in kdagen.runtime.layout; an op with all its folders is kdagen.runtime.package's.
"""

from __future__ import annotations

import platform
import threading
from functools import cached_property
from pathlib import Path

from kdagen import debug
from kdagen.errors import ArgumentError, ArtefactError, LaunchError
from kdagen.runtime import layout as layouts
from kdagen.runtime import manifest as manifests

# Which state is which other one where there is no token.
UNCHANGED = {"final_state": "initial_state", "d_initial_state": "d_final_state"}
REMEMBERED = 64  # layouts of calls, by their shapes


class LoadedOp:
    """The kernels of one built folder, loaded at the first launch."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.plan = folder, manifest, manifest["plan"]
        self._functions: dict | None = None
        self._layouts: dict = {}  # of calls, by what they follow from; no tensor of theirs
        self._lock = threading.Lock()

    def functions(self) -> dict:
        """The launcher of each kernel by name; the libraries are opened once, whichever thread comes first."""
        with self._lock:
            if self._functions is None:
                self._functions = {k["name"]: self._open(k) for k in self.manifest["kernels"]}
            return self._functions

    def _open(self, kernel: dict):
        import tvm_ffi

        if not kernel["library"]:
            raise ArtefactError(f"{self.folder} holds source only: kdagen does not compile for {self.plan['target']}")
        path, host = self.folder / kernel["library"], self.manifest["host"]
        if host != platform.machine():
            raise ArtefactError(
                f"{path} was built for {host} hosts, this one is {platform.machine()}: build it on such a host"
            )
        try:
            return tvm_ffi.load_module(str(path))[kernel["name"]]
        except Exception as error:  # what dlopen says arrives as one of several types
            raise ArtefactError(
                f"{path} does not load here: {_first_line(error)}: build it on a host like this one"
            ) from None

    @cached_property
    def by_role(self) -> dict[str, str]:
        """The tensor that plays each role (the last, where several do)."""
        return {spec["role"]: name for name, spec in self.plan["tensors"].items()}

    @cached_property
    def passes(self) -> dict[str, list[dict]]:
        """The kernels of "forward", in training of "backward" too, or of "decode", in launch order."""
        kernels = {k["name"]: k for k in self.plan["kernels"]}
        passes = self.plan.get("passes") or {"forward": list(kernels)}  # plans of older builds have the forward only
        return {which: [kernels[name] for name in names] for which, names in passes.items()}

    @property
    def purpose(self) -> str:
        """What these kernels are for: "inference", "training" or "decode"."""
        return manifests.purpose(self.plan)

    @property
    def tuned(self) -> bool:
        """Whether its schedule is another than that of the kernels that `kdagen build` leaves in any case."""
        return bool(manifests.TUNED.search(self.folder.name))

    @property
    def training(self) -> bool:
        """Whether these kernels are those of a forward and of its backward."""
        return self.purpose == "training"

    @property
    def state(self):
        """The type of the states that these kernels take and give."""
        return manifests.state_type(self.plan)

    @property
    def kept(self) -> tuple[str, ...]:
        """The workspaces that a forward leaves for its backward."""
        return tuple(self.plan.get("kept", ()))

    def mismatch(self, tensors: dict, capability: str) -> str | None:
        """Why these kernels cannot take these arguments on a GPU of this compute capability; None if they can."""
        target = self.manifest["target"]
        if capability not in target["runs_on"]:
            return f"for compute capability {' or '.join(target['runs_on'])}, the GPU has {capability}"
        for name, tensor in tensors.items():
            spec = self.plan["tensors"].get(name)
            if not spec or spec["dtype"] == "int32":  # integers are converted
                continue
            if str(tensor.dtype) != f"torch.{spec['dtype']}":
                return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {spec['dtype']}"
            if any(isinstance(n, int) and n != size for n, size in zip(layouts.as_called(spec), tensor.shape)):
                return f"{name} has shape {list(tensor.shape)}, expected {layouts.formula(spec)}"
        return None

    def dims(self, tensors: dict, every: int = 0) -> dict[str, int]:
        """The values of the symbols in shapes, from those of a call's tensors, as for `launch`; ranks are checked.

        States are returned after each `every` chunks, or not at all.
        """
        return layouts.dims_of(self.plan, tensors, every)

    def shape(self, name: str, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape of one of the plan's tensors, as kernels see it."""
        return layouts.sized(self.plan["tensors"][name]["shape"], dims)

    def layout(self, tensors: dict, which: str, every: int = 0) -> layouts.Layout:
        """What a pass must make for a call: follows from shapes alone, and so is worked out once for each."""
        key = which, every, tuple((name, t.shape) for name, t in tensors.items())
        known = self._layouts  # read once, for threads
        if key not in known:
            found = layouts.layout(self.plan, self._names[which], tensors, every)
            self._layouts = known = {**(known if len(known) < REMEMBERED else {}), key: found}
        return known[key]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """The tensors and integers that the kernels of each pass take, each once."""
        return {w: list(dict.fromkeys(n for k in kernels for n in k["params"])) for w, kernels in self.passes.items()}

    def launch(self, tensors: dict, which: str = "forward", allocate=None, scalars: dict | None = None) -> dict:
        """Runs the kernels of a pass in order on torch's current stream; returns all tensors, results among them.

        `tensors` holds by name what the op was called with, at the op's shapes ([B, T, ..]): arguments and, where
        given, initial_state, cu_seqlens, state_pool, state_indices, num_accepted_tokens (integers of 32 or 64 bits);
        perhaps results, at the kernels' shapes. The backward also takes the tensors that the forward `kept`, d_o and
        d_final_state (by their names in `by_role`). A missing state, or cotangent, is zero. Results are at the op's
        shapes. `scalars` gives "every", in chunks, where states are wanted, and "null_below".
        `allocate(shape, dtype, device, zero)` makes the rest; torch by default.

        Nothing here waits for the GPU or looks at a value, and all that is made has a shape that follows from shapes:
        a launch can be captured in a CUDA graph, whose replays see new values of cu_seqlens and indices.
        """
        allocate, scalars = allocate or _allocate, scalars or {}
        given = {name: t for name, t in tensors.items() if t is not None}
        if which == "backward" and (missing := [name for name in self.kept if name not in given]):
            raise ArgumentError(
                f"{self.plan['name']}: the backward lacks {', '.join(missing)}: expected what the forward's launch "
                f"returned under {'this name' if len(missing) == 1 else 'these names'}"
            )
        form = self.layout(given, which, scalars.get("every", 0))
        made = self._make(form, given, allocate)
        if form.empty:
            self._keep_states({**given, **made})
        else:
            memory = layouts.packed(self.plan, self._names[which], {**given, **made}, form.dims, scalars)
            functions = self.functions()
            for kernel in self.passes[which]:
                self._run(functions[kernel["name"]], [memory[name] for name in kernel["params"]])
        return {**given, **{name: form.returned(name, x) for name, x in made.items()}}

    def memory(self, tensors: dict, which: str, allocate) -> dict:
        """What the kernels of a pass would take in a launch, by name: to launch them one by one."""
        form = self.layout(tensors, which)
        everything = {**tensors, **self._make(form, tensors, allocate)}
        return layouts.packed(self.plan, self._names[which], everything, form.dims, {})

    def _make(self, form: layouts.Layout, given: dict, allocate) -> dict:
        device = next(iter(given.values())).device
        return {n: allocate(m.shape, m.dtype, device, m.zero) for n, m in form.made.items() if n not in given}

    def _keep_states(self, tensors: dict) -> None:
        """No token, no kernel: the state, or its cotangent, stays as it was."""
        for to, source in UNCHANGED.items():
            if (name := self.by_role.get(to)) in tensors:
                tensors[name].copy_(tensors[self.by_role[source]])

    def gradients(self, results: dict) -> dict:
        """The gradient of each argument that has one, from what a launch of the backward returned.

        A head's parameter has a part from each chunk: these are added up, in an order that does not change.
        """
        specs = {name: spec for name, spec in self.plan["tensors"].items() if spec.get("of")}
        return {
            spec["of"]: results[name].sum(1) if spec["role"] == "partial_gradient" else results[name]
            for name, spec in specs.items()
        }

    @staticmethod
    def _run(function, arguments: list) -> None:
        try:
            function(*arguments)
        except (ValueError, TypeError) as error:
            raise ArgumentError(_first_line(error)) from None
        except RuntimeError as error:
            raise LaunchError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _allocate(shape: tuple[int, ...], dtype: str, device, zero: bool):
    import torch

    return (torch.zeros if zero else torch.empty)(shape, dtype=getattr(torch, dtype), device=device)


def load_op(folder: str | Path) -> LoadedOp:
    """The op in one built folder (the one that holds manifest.json), its hashes checked."""
    folder = Path(folder)
    return LoadedOp(folder, manifests.read(folder))


def find_built(source, folders: list[Path] | None = None) -> Path | None:
    """The folder of kernels built from exactly this OpSource: of the build folder, else of the cache, else None."""
    wanted = manifests.digest(source)
    plan = source.plan()
    names = manifests.variant(plan), manifests.tuned_variant(plan)
    places = [Path(f) / source.name / name for f in folders or [debug.build_dir()] for name in names]
    for place in [*places, cached_op_folder(wanted)]:
        if (place / manifests.MANIFEST).exists() and manifests.read(place)["digest"] == wanted:
            return place
    return None


def cached_op_folder(digest: str) -> Path:
    """Where the cache keeps the op of this digest."""
    return debug.cache_dir() / "ops" / digest[:32]
