"""Tile IR to TileLang: each kernel becomes a readable, runnable module, laid out by its skeleton.

A skeleton is a Jinja template in kdagen.templates (or in a folder of the user's, looked up first). It is given the
kernel and prints statements where it wants them; it holds loop nests, memory movement and pipelining, no mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from kdagen.codegen.source import KernelSource, TensorSpec
from kdagen.errors import ScheduleError
from kdagen.ir.tile import Buffer, ColSum, Copy, Gemm, Kernel, Map, RowSum, Statement, Wait, base
from kdagen.ir.tile_cost import bytes_a_token, flops_a_token

SYMBOLS = {"T": "tokens", **{s: s for s in ("N", "N1", "H", "HV", "NC", "NG", "NS", "S", "W")}}


@cache
def environment(folders: tuple[str, ...]):
    """The Jinja environment that finds skeletons: the user's folders first, then kdagen's own."""
    import jinja2

    import kdagen.templates

    loaders = [jinja2.FileSystemLoader(f) for f in (*folders, str(Path(kdagen.templates.__file__).parent))]
    env = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    env.filters |= {"lines": lines, "staged": lambda copy: base(copy.dst)}
    return env


def render(kernel: Kernel, template_folders: Sequence[str | Path] = ()) -> KernelSource:
    """The TileLang module of a kernel."""
    import jinja2

    env = environment(tuple(str(f) for f in template_folders))
    try:
        template = env.get_template(f"{kernel.skeleton}.py.j2")
    except jinja2.TemplateNotFound:
        known = sorted(t.removesuffix(".py.j2") for t in env.list_templates() if t.endswith(".py.j2"))
        raise ScheduleError(f"no skeleton '{kernel.skeleton}': expected one of {', '.join(known)}") from None
    text = template.render(kernel=kernel, symbols=_symbols(kernel), shape=_shape, named=named)
    params = tuple(TensorSpec(_spec_name(b), b.shape, b.dtype, b.role) for b in kernel.params)
    costs = bytes_a_token(kernel), flops_a_token(kernel)
    return KernelSource(kernel.name, kernel.family, text, params, kernel.threads, kernel.shared_bytes, *costs)


def _spec_name(buffer: Buffer) -> str:
    return buffer.name.removesuffix("_in") if buffer.role == "argument" else buffer.name


def _symbols(kernel: Kernel) -> dict[str, str]:
    """Symbolic dimensions in use: name in a shape -> name in the text."""
    used = {d for b in kernel.params for d in b.shape if isinstance(d, str)}
    return {d: name for d, name in SYMBOLS.items() if d in used}


def _shape(buffer: Buffer) -> str:
    dims = [SYMBOLS.get(d, d) for d in buffer.shape]
    return f"({', '.join(map(str, dims))},)" if len(dims) == 1 else f"({', '.join(map(str, dims))})"


def named(statements: Sequence[Statement], prefix: str) -> list[tuple[str, Statement]]:
    """Statements with an identifier each, for schedules that assign them to roles."""
    return [(f"{prefix}{i}", s) for i, s in enumerate(statements)]


def lines(statement: Statement, kernel: Kernel, name: str = "", asynchronous: bool = False) -> str:
    """A statement as TileLang; `name` is its identifier in a warp-specialised schedule, if there is one."""
    note = f"annotations={{T.WSID: '{name}'}}" if name else ""
    comment = [f"# {statement.eq}"] if statement.eq else []
    return "\n".join([*comment, *_emit(statement, kernel, note, name, asynchronous)])


def _emit(s: Statement, kernel: Kernel, note: str, name: str, asynchronous: bool) -> Iterator[str]:
    match s:
        case Copy():
            yield _call("T.copy", s.src, s.dst, note)
        case RowSum():
            yield _call("T.reduce_sum", s.src, s.dst, "dim=1", note)
        case ColSum():
            yield _call("T.reduce_sum", s.src, s.dst, "dim=0", f"batch={s.batch}" if s.batch > 1 else "", note)
        case Gemm():
            flags = [
                f
                for f, on in (
                    ("transpose_A=True", s.trans_a),
                    ("transpose_B=True", s.trans_b),
                    ("clear_accum=True", s.clear),
                )
                if on
            ]
            op = "T.wgmma_gemm" if asynchronous else "T.gemm"
            yield _call(op, s.a, s.b, s.acc, *flags, f"policy=T.GemmWarpPolicy.{_policy(s, kernel)}", note)
        case Wait():
            yield f"with T.ws_op('{name}'):"
            yield f"    T.wait_wgmma({s.pending})"
        case Map():
            yield from _map(s, note)


def _call(function: str, *arguments: str) -> str:
    return f"{function}({', '.join(a for a in arguments if a)})"


def _policy(gemm: Gemm, kernel: Kernel) -> str:
    """Warps stand above one another where the rows suffice, so that fragments feed other products as they are."""
    return "FullRow" if gemm.size[0] % (16 * kernel.threads // 32) == 0 else "Square"


def _map(s: Map, note: str) -> Iterator[str]:
    names, extents = zip(*s.loops)
    yield f"for {', '.join(names)} in {_call('T.Parallel', *map(str, extents), note)}:"
    indent = "    "
    if s.serial:
        yield f"{indent}for {s.serial[0]} in T.serial({s.serial[1]}, {s.serial[2]}):"
        indent += "    "
    if s.where:
        yield f"{indent}if {s.where}:"
        indent += "    "
    for target, value in s.lets + s.assign:
        yield f"{indent}{target} = {value}"
