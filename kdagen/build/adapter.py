"""The one place that touches TileLang: trace a module's text, lower it, and say what a launcher must know.

The rest of build/ (nvcc, the launcher, the artefact folder) sees only `Lowered`, which is plain data; the
simulators see the traced PrimFunc. Any failure inside TileLang becomes a one-line ToolchainError.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import sys
import tempfile
import threading
from dataclasses import dataclass

from kdagen import debug
from kdagen.errors import KdagenError, ToolchainError
from kdagen.target import Target

# The last of the passes that give the roles of a kernel (explicit WSSchedule or automatic) their own warps.
SPECIALISING_PASS = "tl.ProducerConsumerWarpSpecialized"
ALIKE = "tl.disable_warp_specialized"  # no automatic roles either: all warps do the same
# Attributes of a generated program, and TileLang's option for each
OPTIONS = {
    "merge_shared_memory": "tl.enable_aggressive_shared_memory_merge",
    "no_wgmma": "tl.disable_wgmma",
    "no_warp_roles": ALIKE,
}
DIMS = ("x", "y", "z")
_quiet_lock = threading.RLock()


@dataclass(frozen=True)
class Tensor:
    """A tensor that the caller passes, in order; `shape` entries are C expressions."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Scalar:
    """An integer that the caller passes by value."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor that the host encodes (cuTensorMapEncodeTiled's arguments); entries are C expressions."""

    name: str
    base: str  # name of the tensor
    dtype: int  # CUtensorMapDataType
    extents: tuple[str, ...]  # innermost first, as are the next three
    strides: tuple[str, ...]  # bytes; the driver takes strides[1:]
    box: tuple[str, ...]
    element_strides: tuple[str, ...]
    modes: tuple[int, int, int, int]  # interleave, swizzle, L2 promotion, out-of-bounds fill


@dataclass(frozen=True)
class Parameter:
    """What a kernel takes, in order: "tensor" (a pointer), "descriptor", or "scalar" (given, or a dimension)."""

    name: str
    kind: str
    ctype: str  # C type of a scalar; "" otherwise


@dataclass(frozen=True)
class Lowered:
    """One lowered kernel: its source and its launch. Dynamic dimensions appear by name in C expressions."""

    kernel: str  # symbol in the source
    source: str  # CUDA, or HIP
    arguments: tuple[Tensor | Scalar, ...]  # what the caller passes, in order
    symbols: tuple[str, ...]  # dynamic dimensions, as they first appear in `arguments`
    parameters: tuple[Parameter, ...]
    descriptors: tuple[Descriptor, ...]
    grid: tuple[str, str, str]
    threads: tuple[str, str, str]
    shared_bytes: int  # dynamic shared memory
    device_module: object
    host_module: object

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments that are tensors."""
        return tuple(a for a in self.arguments if isinstance(a, Tensor))


def trace(text: str, entry: str, filename: str):
    """The PrimFunc that `entry()` of the generated module `text` returns."""
    # TileLang reads a function's source through linecache, and speaks of it by its absolute name.
    for name in (filename, os.path.abspath(filename)):
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), filename)
    with _tilelang(f"tracing {entry} in {filename}"):
        module = {"__name__": entry, "__file__": filename}
        exec(compile(text, filename, "exec", dont_inherit=True), module)  # annotations are values
        return module[entry]()


def lower(prim_func, target: Target) -> Lowered:
    """The kernel's source for `target` (no GPU and no compiler needed), and its launch."""
    with _tilelang(f"lowering {_name(prim_func)} for {target.name}") as tilelang:
        tvm_target = _tvm_target(target)
        with tvm_target, tilelang.tvm.transform.PassContext(config=_config(prim_func)):
            artefact = tilelang.lower(prim_func, target=tvm_target)
        lowered = _lowered(prim_func, artefact)
        _check_offsets(lowered)
        return lowered


def _config(prim_func) -> dict:
    """Options of TileLang's passes that a generated program asks for."""
    return {option: True for name, option in OPTIONS.items() if name in (prim_func.attrs or {})}


def specialised(prim_func, target: Target):
    """The PrimFunc with its warps' roles told apart: barriers, asynchronous copies and one branch a role.

    Where the target or the program has no such roles, the program as it was.
    """
    if ALIKE in _config(prim_func):
        return prim_func
    with _tilelang(f"specialising {_name(prim_func)} for {target.name}") as tilelang:
        from tvm.ir.instrument import pass_instrument

        captured = []

        @pass_instrument
        class Capture:
            def run_after_pass(self, module, info):
                if info.name == SPECIALISING_PASS:
                    captured.append(module)
                    raise StopIteration  # the remaining passes are not needed

        tvm_target = _tvm_target(target)
        # TVM turns the StopIteration into an error of its own; only a missing capture is a failure.
        with contextlib.suppress(Exception), tilelang.tvm.transform.PassContext(instruments=[Capture()]), tvm_target:
            tilelang.lower(prim_func, target=tvm_target)
        if captured:
            return next(iter(captured[0].functions.values()))
        lower(prim_func, target)  # raises what went wrong before the pass, if anything did
        if target.warp_specialised:
            raise ToolchainError(f"this TileLang has no pass {SPECIALISING_PASS}: kdagen expects tilelang 0.1.15")
        return prim_func


def nodes(tree, wanted) -> list:
    """The nodes of a TVM statement or expression that `wanted` accepts, children first."""
    from tvm.tirx.stmt_functor import post_order_visit

    found = []
    post_order_visit(tree, lambda n: found.append(n) if wanted(n) else None)
    return found


def source_line(statement) -> str:
    """'file:line: text' of the TileLang statement that a TVM statement comes from; "" if it is not known."""
    from tilelang.ir import get_stmt_span

    span = get_stmt_span(statement)
    if span is None:
        return ""
    name = str(span.source_name.name)
    return f"{os.path.basename(name)}:{span.line}: {linecache.getline(name, span.line).strip()}"


def _name(prim_func) -> str:
    return str(prim_func.attrs["global_symbol"])


def _tvm_target(target: Target):
    from tilelang.backend.target import determine_target

    key = "mcpu" if target.backend == "hip" else "arch"
    return determine_target({"kind": target.backend, key: target.arch}, return_object=True)


def _lowered(prim_func, artefact) -> Lowered:
    (device,) = artefact.device_mod.functions.values()
    (host,) = artefact.host_mod.functions.values()
    descriptors = tuple(_descriptor(list(a)) for _, a in (host.attrs.get("tma_descriptor_args") or {}).items())
    buffers = prim_func.buffer_map
    extent = {str(k): _c(v) for k, v in device.attrs["thread_extent"].items()}
    return Lowered(
        kernel=str(device.attrs["global_symbol"]),
        source=artefact.kernel_source,
        arguments=tuple(_argument(p, buffers.get(p)) for p in prim_func.params),
        symbols=_symbols([buffers[p] for p in prim_func.params if p in buffers]),
        parameters=tuple(_parameter(p, {d.name for d in descriptors}) for p in device.params),
        descriptors=descriptors,
        grid=tuple(extent.get(f"blockIdx.{d}", "1") for d in DIMS),
        threads=tuple(extent.get(f"threadIdx.{d}", "1") for d in DIMS),
        shared_bytes=int(device.attrs.get("dyn_shared_memory_buf") or 0),
        device_module=artefact.device_mod,
        host_module=artefact.host_mod,
    )


def _argument(parameter, buffer) -> Tensor | Scalar:
    if buffer is None:
        return Scalar(parameter.name, str(parameter.dtype))
    return Tensor(buffer.data.name, str(buffer.dtype), tuple(map(_c, buffer.shape)))


def _check_offsets(lowered: Lowered) -> None:
    """Refuses 32-bit products of dimensions in addresses: tensors are larger. (This TileLang takes 64 bits.)"""
    if found := narrow_offsets(lowered):
        raise ToolchainError(
            f"{lowered.kernel}: addresses of {', '.join(sorted(found))} are computed in 32 bits, so that large tensors "
            f"would be read elsewhere: kdagen expects tilelang 0.1.15"
        )


def narrow_offsets(lowered: Lowered) -> set[str]:
    """The global tensors that are indexed with a product of dynamic dimensions in 32 bits."""
    from tvm import tirx

    (device,) = lowered.device_module.functions.values()
    scalars = {p.name for p in device.params if str(p.dtype) != "handle"}
    tensors = {p.name for p in device.params if str(p.dtype) == "handle"}

    def dynamic(e) -> bool:
        return bool(nodes(e, lambda n: isinstance(n, tirx.Var) and n.name in scalars))

    def narrow(e) -> bool:
        return bool(nodes(e, lambda n: isinstance(n, tirx.Mul) and str(n.dtype) == "int32" and dynamic(n)))

    found = set()
    for n in nodes(device.body, lambda n: isinstance(n, (tirx.BufferLoad, tirx.BufferStore, tirx.Call))):
        if isinstance(n, tirx.Call):  # tvm_access_ptr(type, data, offset, extent, mask)
            named = [a.name for a in n.args[1:2] if isinstance(a, tirx.Var)]
            name, indices = (named or [""])[0], n.args[2:3] if str(n.op.name).endswith("access_ptr") else []
        else:
            name, indices = n.buffer.data.name, n.indices
        if name in tensors and any(map(narrow, indices)):
            found.add(name)
    return found


def _symbols(buffers) -> tuple[str, ...]:
    from tvm import tirx

    return tuple(dict.fromkeys(d.name for b in buffers for d in b.shape if isinstance(d, tirx.Var)))


def _parameter(var, descriptors: set[str]) -> Parameter:
    if var.name in descriptors:
        return Parameter(var.name, "descriptor", "")
    if str(var.dtype) == "handle":
        return Parameter(var.name, "tensor", "")
    return Parameter(var.name, "scalar", f"{var.dtype}_t")


def _descriptor(args) -> Descriptor:
    """TileLang's order: creator, name, dtype, rank, base, then rank entries each of four kinds, then four modes."""
    rank, rest = int(args[3]), [_c(a) for a in args[5:]]
    per_dim = [tuple(rest[i * rank : (i + 1) * rank]) for i in range(4)]
    return Descriptor(args[1].name, args[4].name, int(args[2]), *per_dim, tuple(map(int, rest[4 * rank :])))


def _c(expression) -> str:
    """A TVM expression in C."""
    from tilelang.jit.adapter.utils import pythonic_expr

    return pythonic_expr(expression, {t: f"{t}_t" for t in ("int32", "int64", "uint32", "uint64")}, floor_div_op="/")


@contextlib.contextmanager
def _tilelang(doing: str):
    """TileLang imported, silenced, its failures turned into one line (KDAGEN_DEBUG keeps all of it)."""
    try:
        with contextlib.nullcontext() if debug.level() else _quiet():
            import tilelang

            yield tilelang
    except KdagenError:
        raise
    except ImportError as error:
        raise ToolchainError(f"{doing}: {error}: install TileLang with pip install 'kdagen[build]'") from None
    except Exception as error:
        if debug.level():
            raise ToolchainError(f"{doing}: {error}") from error
        raise ToolchainError(f"{doing}: {_gist(error)} (KDAGEN_DEBUG=1 shows TileLang's trace)") from None


def _gist(error: Exception) -> str:
    """The line of a long message that says what failed; the rest quotes source and stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "Check failed" in line), lines[-1])


@contextlib.contextmanager
def _quiet():
    """Drops what TileLang logs, and what its C++ writes to file descriptor 2.

    The descriptor is the process's, hence the lock.
    """
    with _quiet_lock, tempfile.TemporaryFile() as sink:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            with _no_log():
                yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _no_log():
    import tilelang  # noqa: F401  gives the logger its handlers

    logger = logging.getLogger("tilelang")
    handlers, logger.handlers = logger.handlers, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.handlers = handlers
