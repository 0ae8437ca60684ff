"""How costs grow: exponents of the formulas, and what the interpreter in fact multiplies."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.ir.tensor_cost import C, K, V, cost
from kdagen.ir.tensor_interpret import interpret


def program(name):
    return chunk_form(canonical(zoo.get(name)))


def exponent(f, size):
    """The power of n that f(n) grows with, between size and twice that."""
    return math.log2(f(2 * size) / f(size))


def at(formula, c=16, k=128, v=128):
    return float(formula.subs({C: c, K: k, V: v}))


@pytest.mark.parametrize("name", zoo.names())
def test_products_grow_linearly_in_each_dim(name):
    products = cost(program(name)).products
    assert exponent(lambda n: at(products, c=n), 1 << 20) == pytest.approx(1, abs=1e-3)
    assert exponent(lambda n: at(products, k=n), 1 << 20) == pytest.approx(1, abs=1e-3)
    assert exponent(lambda n: at(products, v=n), 1 << 20) == pytest.approx(1, abs=1e-3)


def test_a_solve_grows_with_the_square_of_the_chunk_a_token():
    assert exponent(lambda n: at(cost(program("kda")).solve, c=n), 64) == pytest.approx(2)


@pytest.mark.parametrize("name", zoo.names())
def test_bytes_do_not_grow_with_the_chunk_beyond_its_matrices(name):
    it = cost(program(name))
    assert at(it.least_bytes, c=16) == at(it.least_bytes, c=64)
    assert exponent(lambda n: at(it.stored_bytes, c=n), 1 << 20) <= 1.001


def test_the_figures_of_kda_that_are_known_by_hand():
    it = cost(program("kda"))
    assert at(it.least_bytes) == 1282  # q, k, g, v, o of 128 channels and beta, 2 bytes each
    assert at(it.stored_bytes) <= 3100
    assert at(it.products) == 2 * (2 * 16 * 128 + 2 * 16 * 128 + 3 * 128 * 128)


def multiplied(name, t, chunk_size, k=32, v=32):
    """FLOPs in matrix products of one run, counted by torch."""
    form = canonical(zoo.get(name))
    tensors = zoo.sample(form, (1, t, 1, k, v))
    in_place = {torch.ops.aten.baddbmm_: lambda add, a, b, **_: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        interpret(chunk_form(form), tensors, None, chunk_size)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["linear_attention", "deltanet", "longhorn", "gated_deltanet", "retnet", "mamba2"])
def test_the_interpreter_multiplies_what_the_formula_says(name):
    assert multiplied(name, 128, 16) == 128 * at(cost(program(name)).products, 16, 32, 32)


@pytest.mark.parametrize("name", ["kda", "dplr", "gla", "gdn2"])
def test_the_midpoint_tree_multiplies_no_more_than_the_triangle(name):
    p = program(name)
    (gram,) = [op for op in p.prepare if hasattr(op, "outs")]
    square = 2 * 16 * 32 * len(gram.readers) * len(gram.writers)
    tree = (square - square / 16) / 2
    assert multiplied(name, 128, 16) == 128 * (at(cost(p).products, 16, 32, 32) - square + tree)


def test_counted_products_grow_linearly_with_the_sequence():
    assert exponent(lambda t: multiplied("kda", t, 32), 256) == pytest.approx(1)


def test_torch_calls_grow_with_chunks_not_with_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def calls(t, chunk_size):
        form = canonical(zoo.get("kda"))
        tensors = zoo.sample(form, (1, t, 1, 16, 16))
        with Calls() as counter:
            interpret(chunk_form(form), tensors, None, chunk_size)
        return counter.count

    a_chunk = (calls(1024, 64) - calls(512, 64)) / 8
    assert a_chunk == (calls(1024, 32) - calls(512, 32)) / 16
    assert a_chunk < 64
