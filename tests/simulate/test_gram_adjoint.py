"""The adjoint of the secondary matrices and of running sums, each in a small kernel, against float64 autograd."""

import math

import numpy as np
import pytest
import torch

from kdagen.build import adapter
from kdagen.codegen.tilelang import render
from kdagen.ir.tensor import Span
from kdagen.ir.tile import Buffer, Copy, Kernel, Map, verify
from kdagen.lower.block import Block
from kdagen.lower.gram import GramOperands, lower_gram
from kdagen.lower.gram_adjoint import lower_gram_adjoint, lower_spread
from kdagen.schedule import DecayForm
from kdagen.simulate.program import Simulator
from kdagen.simulate.torch_arrays import to_numpy

LOG2E = math.log2(math.e)
OPERANDS, GATE = 5e-3, 1e-2  # |difference| / |reference|, both norms
GATES = ("mild", "bounded", "extreme", "reset")
FORMS = [
    (form, gate)
    for form in DecayForm
    for gate in {DecayForm.NONE: ("mild",), DecayForm.FACTORED: ("mild", "bounded")}.get(form, GATES)
]


def kernel_of(block, inputs, outputs, chunk, threads):
    buffers = [Buffer(name, tuple(x.shape), str(x.dtype).split(".")[1], "global", "argument") for name, x in inputs]
    buffers += [Buffer(name, shape, "float32", "global", "workspace") for name, shape in outputs]
    grid = (("n", "1"), ("h", "1"), ("b", "1"))
    block_buffers = tuple(block.buffers.values())
    statements = tuple(block.statements)
    return verify(
        Kernel("toy", "gradients", "prepare", grid, threads, 1, (*buffers, *block_buffers), (), statements, (),
               lets=(("rows", str(chunk)),), chunk_size=chunk)
    )  # fmt: skip


def execute(kernel, inputs, outputs):
    source = render(kernel)
    made = {name: torch.full(shape, torch.nan) for name, shape in outputs}
    Simulator(adapter.trace(source.text, source.name, "<toy.py>"))(
        *(to_numpy(x) for _, x in inputs), *map(to_numpy, made.values())
    )
    return made


def draw_gate(kind, chunk, channels, scalar, seed=0):
    """Log decays of a chunk; `bounded` ones sum up to no less than -40, which factors bear in training."""
    rng = torch.Generator().manual_seed(seed)
    shape = (chunk,) if scalar else (chunk, channels)
    u = torch.rand(shape, generator=rng)
    g = {"mild": -0.1 * u, "bounded": -40 / chunk * u, "extreme": -30 * u**4, "reset": -0.5 * u}[kind]
    if kind == "reset":
        g[torch.rand(shape, generator=rng) < 0.1] = -torch.inf
    return g


def decays(g, after):
    """exp of the sum of g over tokens j+1..i (or ..i-1), [C, C, channels], zero above the diagonal."""
    chunk = len(g)
    token, i, j = torch.arange(chunk), torch.arange(chunk)[:, None, None], torch.arange(chunk)[:, None]
    holds = (token > j) & (token <= i if after else token < i)
    total = torch.where(holds[..., None], g, 0.0).sum(2)
    return torch.where((i >= j), total.exp(), 0.0)


class Case:
    """A Gram's operands, its matrices' cotangents with garbage where nothing may read, and the kernel of both."""

    def __init__(
        self, form, gate="mild", chunk=16, channels=64, after=(True,), writers=1, diagonal=False,
        dtype=torch.bfloat16, unread=(), seed=0,
    ):  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        self.form, self.chunk, self.channels, self.after = form, chunk, channels, after
        self.scalar, self.dtype = form == DecayForm.SCALAR, dtype
        self.pairs = [(r, s) for r in range(len(after)) for s in range(writers)]
        self.unread = set(unread)
        self.diagonal = tuple(tuple(diagonal and a for _ in range(writers)) for a in after)
        self.z, self.x = (
            [(torch.randn(chunk, channels, generator=rng) / channels**0.5).to(dtype) for _ in range(n)]
            for n in (len(after), writers)
        )
        self.g = None if form == DecayForm.NONE else draw_gate(gate, chunk, channels, self.scalar, seed)
        self.d = {}
        for r, s in self.pairs:
            d = torch.randn(chunk, chunk, generator=rng)
            above = torch.ones(chunk, chunk).triu(0 if not self.diagonal[r][s] else 1).bool()
            d[above] = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.arange(int(above.sum())) % 3]
            self.d[r, s] = d

    def inputs(self):
        named = [(f"z{r}_in", z) for r, z in enumerate(self.z)] + [(f"x{s}_in", x) for s, x in enumerate(self.x)]
        named += [] if self.g is None else [("g_in", self.g)]
        return named + [(f"d{r}{s}_in", self.d[r, s]) for r, s in self.pairs if (r, s) not in self.unread]

    def outputs(self):
        tile = (self.chunk, self.channels)
        named = [(f"d_z{r}", tile) for r in range(len(self.z))] + [(f"d_x{s}", tile) for s in range(len(self.x))]
        sums = ["through", "rest"] if self.g is not None and not self.scalar else []
        return named + ([] if self.g is None else [("d_g", tuple(self.g.shape))]) + [(name, tile) for name in sums]

    def operands(self):
        def read(name):
            return lambda i, j: f"T.cast({name}_s[{i}, {j}], 'float32')"

        return GramOperands(
            tuple(read(f"z{r}_in") for r in range(len(self.z))),
            tuple(read(f"x{s}_in") for s in range(len(self.x))),
            self.after,
            any(map(any, self.diagonal)),
            "" if self.g is None else "g_s" if self.scalar else "through_s",
            self.chunk,
            self.channels,
            str(self.dtype).split(".")[1],
        )

    def kernel(self, threads=128):
        block, operands = Block(), self.operands()
        for name, x in self.inputs():
            tile = block.shared(name, *x.shape, dtype=str(x.dtype).split(".")[1])
            index = ", ".join(f"0:{n}" for n in x.shape)
            block.add(Copy(tile, f"{name}[{index}]"))
        log2 = lambda *index: f"g_in_s[{', '.join(index)}] * {LOG2E}"  # noqa: E731
        if self.g is not None:
            index = ("i",) if self.scalar else ("i", "j")
            block.shared(operands.g.removesuffix("_s"), *self.g.shape)
            block.add(Map(tuple(zip(index, self.g.shape)), ((f"{operands.g}[{', '.join(index)}]", log2(*index)),)))
        lower_gram(block, self.form, operands)
        read = lambda r, s: lambda i, j: f"d{r}{s}_in_s[{i}, {j}]"  # noqa: E731
        d_outs = tuple(
            tuple(None if (r, s) in self.unread else read(r, s) for s in range(len(self.x))) for r in range(len(self.z))
        )
        rows, cols, gate = lower_gram_adjoint(block, self.form, operands, d_outs, log2, self.diagonal)
        results = (*rows, *cols, *((gate,) if gate else ()))
        results += tuple(
            lambda i, j, name=name: f"T.exp2({name}_s[{i}, {j}])" for name, _ in self.outputs()[len(results) :]
        )
        for (name, shape), access in zip(self.outputs(), results, strict=True):
            index = ("i", "j")[: len(shape)]
            block.add(Map(tuple(zip(index, shape)), ((f"{name}[{', '.join(index)}]", access(*index)),)))
        return kernel_of(block, self.inputs(), self.outputs(), self.chunk, threads)

    def reference(self):
        """Every output in float64: by autograd of the definition; the gate's as the sum over pairs that defines it."""
        z, x = ([v.double().requires_grad_() for v in side] for side in (self.z, self.x))
        g = torch.zeros(self.chunk, 1).double() if self.g is None else self.g.double().reshape(self.chunk, -1)
        total, d_g, token = 0.0, torch.zeros(self.chunk, self.channels).double(), torch.arange(self.chunk)
        for r, s in self.pairs:
            if (r, s) in self.unread:
                continue
            keep = torch.ones(self.chunk, self.chunk).tril(0 if self.diagonal[r][s] else -1).bool()
            d = torch.where(keep, self.d[r, s].double(), 0.0)
            terms = d[..., None] * z[r][:, None] * x[s][None] * decays(g, self.after[r])
            total = total + terms.sum()
            i, j = token[:, None], token[None]
            for t in range(self.chunk):
                holds = (t > j) & ((t <= i) if self.after[r] else (t < i))
                d_g[t] += terms.detach()[holds].sum(0)
        grads = torch.autograd.grad(total, [*z, *x], allow_unused=True)
        grads = [torch.zeros_like(v) if d is None else d for v, d in zip((*z, *x), grads)]
        made = dict(zip([n for n, _ in self.outputs()], grads)) | {"d_g": d_g.sum(1) if self.scalar else d_g}
        made["through"] = g.cumsum(0).exp()
        made["rest"] = torch.stack([g[t + 1 :].sum(0).exp() for t in range(self.chunk)])
        return {name: made[name] for name, _ in self.outputs()}

    def errors(self):
        made, expected = execute(self.kernel(), self.inputs(), self.outputs()), self.reference()
        return {name: relative(made[name], expected[name]) for name in made}, made

    def check(self):
        errors, made = self.errors()
        assert all(e <= (GATE if name == "d_g" else OPERANDS) for name, e in errors.items()), errors
        return made


def relative(a, b):
    difference = float((a.double() - b).norm())
    return difference if b.norm() == 0 else difference / float(b.norm())


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize(
    "after, diagonal", [((True,), False), ((True, True), True), ((False, True), True), ((False,), False)]
)
@pytest.mark.parametrize("form, gate", FORMS)
def test_each_form(form, gate, after, diagonal, chunk):
    Case(form, gate, chunk, after=after, diagonal=diagonal).check()


@pytest.mark.parametrize("form", DecayForm)
@pytest.mark.parametrize("readers, writers", [(1, 2), (2, 2), (3, 1), (3, 2)])
def test_several_readers_and_writers(form, readers, writers):
    Case(form, "bounded", after=(True, False, True)[:readers], writers=writers, diagonal=True).check()


@pytest.mark.parametrize("form", DecayForm)
def test_fp16_and_wide_chunks(form):
    Case(form, "mild", 64, 128, after=(True, True), diagonal=True, dtype=torch.float16).check()


@pytest.mark.parametrize("form", DecayForm)
def test_matrices_that_nothing_reads(form):
    made = Case(form, after=(True, True, True), writers=2, unread=[(0, 0), (1, 0), (1, 1), (2, 0)]).check()
    assert not made["d_z1"].any() and not made["d_x0"].any()


@pytest.mark.parametrize("form", [DecayForm.TREE, DecayForm.SCALAR])
def test_a_reset_gives_its_gate_nothing(form):
    case = Case(form, "reset", 32, after=(True, True), diagonal=True)
    made = case.check()
    assert not made["d_g"][case.g == -torch.inf].any()
    assert made["d_g"].any()


@pytest.mark.parametrize("span", [Span.THROUGH, Span.BEFORE, Span.REST])
@pytest.mark.parametrize("shape", [(16,), (32,), (16, 64), (64, 128)])
def test_spread(span, shape):
    block, index = Block(), ("i", "j")[: len(shape)]
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    at, loops = f"[{', '.join(index)}]", tuple(zip(index, shape))
    block.add(Map(loops, ((f"{block.shared('out', *shape)}{at}", "1.0"),)))
    lower_spread(block, "out", lambda *index: f"a_in[{', '.join(index)}]", span, shape)
    block.add(Map(loops, ((f"out_w{at}", f"out_s{at}"),)))
    named = [("a_in", a)], [("out_w", shape)]
    made = execute(kernel_of(block, *named, shape[0], 128), *named)["out_w"]
    i, t = np.ogrid[: shape[0], : shape[0]]
    holds = {Span.THROUGH: i >= t, Span.BEFORE: i > t, Span.REST: i < t}[span]
    expected = 1 + torch.einsum("it,i...->t...", torch.from_numpy(holds).double(), a.double())
    assert relative(made, expected) < 1e-6
