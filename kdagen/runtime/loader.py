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

ALLOCATED = ("workspace", "out", "final_state")  # roles of the tensors that a launch makes itself
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
        self._last: tuple = ([], {}, {})  # shapes that a call was given, and what follows from them
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
        """B, T, H, NC and the like, read off the shapes of the arguments; each argument's shape is checked."""
        arguments = [t for t in self.plan["tensors"].values() if t["role"] == "argument"]
        dims = dict(self.plan["dims"])
        for spec in arguments:
            if (rank := len(tensors[spec["name"]].shape)) != len(spec["shape"]):
                raise ArgumentError(f"{spec['name']} has {rank} dimensions, expected {_formula(spec)}")
            symbols = [(s, n) for s, n in zip(spec["shape"], tensors[spec["name"]].shape) if str(s).isidentifier()]
            dims = {**dict(symbols), **dims}
        dims["NC"] = -(-dims["T"] // self.plan["chunk_size"])
        return dims

    def shape(self, name: str, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape of one of the plan's tensors."""
        return tuple(evaluate(size, dims) for size in self.plan["tensors"][name]["shape"])

    def layout(self, tensors: dict) -> tuple[dict[str, int], dict[str, tuple]]:
        """The sizes of a call, and (shape, dtype, whether it is zero) of each tensor that a launch may have to make."""
        shapes = [(name, t.shape) for name, t in tensors.items()]
        known = self._last  # read once, for threads
        if known[0] != shapes:
            dims = self.dims(tensors)
            self._last = known = shapes, dims, {name: self._made(name, dims) for name in self._may_be_made}
        return known[1:]

    @cached_property
    def _may_be_made(self) -> list[str]:
        roles = (*ALLOCATED, "initial_state")
        return [name for name, spec in self.plan["tensors"].items() if spec["role"] in roles]

    def _made(self, name: str, dims: dict[str, int]) -> tuple:
        spec = self.plan["tensors"][name]
        return self.shape(name, dims), spec["dtype"], spec["role"] == "initial_state"

    def launch(self, tensors: dict, allocate=None) -> dict:
        """Runs the kernels in order on torch's current stream; returns all tensors, outputs among them.

        `tensors` holds the arguments by name, and may hold outputs. A missing initial_state is zero. `allocate(shape,
        dtype, device, zero)` makes the rest; torch by default.
        """
        allocate = allocate or _allocate
        tensors = {name: t for name, t in tensors.items() if t is not None}
        dims, made = self.layout(tensors)
        device = next(iter(tensors.values())).device
        for name, (shape, dtype, zero) in made.items():
            if name not in tensors:
                tensors[name] = allocate(shape, dtype, device, zero)
        if dims["T"] == 0:
            self._keep_state(tensors)
            return tensors
        functions = self.functions()
        for kernel in self.plan["kernels"]:
            self._run(functions[kernel["name"]], [tensors[name] for name in kernel["params"]])
        return tensors

    def _keep_state(self, tensors: dict) -> None:
        """No token, no kernel: the state stays as it was."""
        if "final_state" in self.by_role:
            tensors[self.by_role["final_state"]].copy_(tensors[self.by_role["initial_state"]])

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
