"""Loads what `kdagen build` left and launches it: needs torch and apache-tvm-ffi, no compiler, no TileLang, no sympy.

`LoadedOp` is one folder of kernels: one target, dtype and head dims. Shapes of workspaces and outputs come from the
launch plan in the manifest. An op with all its folders is kdagen.runtime.package's.
"""

from __future__ import annotations

import ast
import operator
import platform
import threading
from functools import cached_property
from pathlib import Path

from kdagen import debug
from kdagen.errors import ArgumentError, ArtefactError, LaunchError
from kdagen.runtime import manifest as manifests

# Roles of the tensors that a launch makes itself, and of those that are zero where none is given.
ALLOCATED = ("workspace", "out", "final_state", "gradient", "partial_gradient", "d_initial_state")
ZERO = ("initial_state", "d_out", "d_final_state")
# Which state is which other one where there is no token.
UNCHANGED = {"final_state": "initial_state", "d_initial_state": "d_final_state"}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(size: int | str, dims: dict[str, int]) -> int:
    """A size of a plan, such as 64, "T" or "B*H", in numbers."""

    def value(node) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return dims[name]
            case ast.BinOp(left, op, right):
                return _OPERATORS[type(op)](value(left), value(right))
        raise ArtefactError(f"cannot read the size '{size}' of a launch plan: expected names, integers, +, -, * and //")

    if isinstance(size, int) or size in dims:
        return size if isinstance(size, int) else dims[size]
    return value(ast.parse(size, mode="eval").body)


class LoadedOp:
    """The kernels of one built folder, loaded at the first launch."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.plan = folder, manifest, manifest["plan"]
        self._functions: dict | None = None
        self._last: dict = {}  # of each pass: shapes that a call was given, and what follows from them
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
        """The kernels of "forward" and, in training, "backward", in launch order."""
        kernels = {k["name"]: k for k in self.plan["kernels"]}
        passes = self.plan.get("passes") or {"forward": list(kernels)}  # plans of older builds have the forward only
        return {which: [kernels[name] for name in names] for which, names in passes.items()}

    @property
    def training(self) -> bool:
        """Whether these kernels are those of a forward and of its backward."""
        return "backward" in self.passes

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
            if spec and str(tensor.dtype) != f"torch.{spec['dtype']}":
                return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {spec['dtype']}"
            if spec and any(isinstance(n, int) and n != size for n, size in zip(spec["shape"], tensor.shape)):
                return f"{name} has shape {list(tensor.shape)}, expected {_formula(spec)}"
        return None

    def dims(self, tensors: dict) -> dict[str, int]:
        """B, T, H, NC, NE and the like, read off the shapes of the arguments; each argument's shape is checked."""
        arguments = [t for t in self.plan["tensors"].values() if t["role"] == "argument"]
        dims = dict(self.plan["dims"])
        for spec in arguments:
            if (rank := len(tensors[spec["name"]].shape)) != len(spec["shape"]):
                raise ArgumentError(f"{spec['name']} has {rank} dimensions, expected {_formula(spec)}")
            symbols = [(s, n) for s, n in zip(spec["shape"], tensors[spec["name"]].shape) if str(s).isidentifier()]
            dims = {**dict(symbols), **dims}
        return dims | counts(dims["T"], self.plan["chunk_size"], self.plan["schedule"])

    def shape(self, name: str, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape of one of the plan's tensors."""
        return tuple(evaluate(size, dims) for size in self.plan["tensors"][name]["shape"])

    def layout(self, tensors: dict, which: str = "forward") -> tuple[dict[str, int], dict[str, tuple]]:
        """The sizes of a call, and (shape, dtype, whether it is zero) of each tensor that a launch may have to make."""
        shapes = [(name, t.shape) for name, t in tensors.items()]
        known = self._last.get(which)  # read once, for threads
        if not known or known[0] != shapes:
            dims = self.dims(tensors)
            known = shapes, dims, {name: self._made(name, dims) for name in self._may_be_made[which]}
            self._last = {**self._last, which: known}
        return known[1:]

    @cached_property
    def _may_be_made(self) -> dict[str, list[str]]:
        roles = {name: spec["role"] for name, spec in self.plan["tensors"].items()}
        touched = {which: dict.fromkeys(n for k in ks for n in k["params"]) for which, ks in self.passes.items()}
        kept = {"backward": self.kept}  # given to it
        return {
            which: [n for n in names if roles[n] in (*ALLOCATED, *ZERO) and n not in kept.get(which, ())]
            for which, names in touched.items()
        }

    def _made(self, name: str, dims: dict[str, int]) -> tuple:
        spec = self.plan["tensors"][name]
        return self.shape(name, dims), spec["dtype"], spec["role"] in ZERO

    def launch(self, tensors: dict, which: str = "forward", allocate=None) -> dict:
        """Runs the kernels of a pass in order on torch's current stream; returns all tensors, results among them.

        `tensors` holds the arguments by name, and may hold results. The backward also takes the tensors that the
        forward `kept`, d_o and d_final_state (by their names in `by_role`). A missing state, or cotangent, is zero.
        `allocate(shape, dtype, device, zero)` makes the rest; torch by default.
        """
        allocate = allocate or _allocate
        tensors = {name: t for name, t in tensors.items() if t is not None}
        if which == "backward" and (missing := [name for name in self.kept if name not in tensors]):
            raise ArgumentError(
                f"{self.plan['name']}: the backward lacks {', '.join(missing)}: expected what the forward's launch "
                f"returned under {'this name' if len(missing) == 1 else 'these names'}"
            )
        dims, made = self.layout(tensors, which)
        device = next(iter(tensors.values())).device
        for name, (shape, dtype, zero) in made.items():
            if name not in tensors:
                tensors[name] = allocate(shape, dtype, device, zero)
        if dims["T"] == 0:
            self._keep_states(tensors)
            return tensors
        functions = self.functions()
        for kernel in self.passes[which]:
            self._run(functions[kernel["name"]], [tensors[name] for name in kernel["params"]])
        return tensors

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
            spec["of"]: results[name].sum((0, 2)) if spec["role"] == "partial_gradient" else results[name]
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


def counts(tokens: int, chunk_size: int, schedule: dict) -> dict[str, int]:
    """NC, the number of chunks, and, in training, NE, that of ends of segments."""
    chunks = -(-tokens // chunk_size)
    return {"NC": chunks} | ({"NE": -(-chunks // schedule["segment"]) + 1} if "segment" in schedule else {})


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _formula(spec: dict) -> str:
    return "[" + ", ".join(map(str, spec["shape"])) + "]"


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
    places = [Path(f) / source.name / manifests.variant(plan) for f in folders or [debug.build_dir()]]
    for place in [*places, cached_op_folder(wanted)]:
        if (place / manifests.MANIFEST).exists() and manifests.read(place)["digest"] == wanted:
            return place
    return None


def cached_op_folder(digest: str) -> Path:
    """Where the cache keeps the op of this digest."""
    return debug.cache_dir() / "ops" / digest[:32]
