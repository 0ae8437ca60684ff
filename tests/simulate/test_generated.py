"""The generated GPU programs, executed as they are with the GPU's rounding, against the float64 recurrence."""

import pytest
import torch
from foreign import CASES

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op
from kdagen.reference import recurrence_reference
from kdagen.simulate.run import simulate

GATES = ("mild", "softplus", "bounded", "extreme", "reset")
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}  # |difference| / |reference|, both norms
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def draw(op, recurrence, shape, gate, seed=0):
    """Sample inputs in the dtypes that the op's kernels take, and an initial state."""
    form = canonical(recurrence)
    specs = {p.name: p for k in op.kernels for p in k.params}
    inputs = zoo.sample(form, (*shape, op.dims["K"], op.dims["V"]), gate, seed)
    inputs = {name: x.to(TORCH[specs[name].dtype]) for name, x in inputs.items() if name in specs}
    generator = torch.Generator().manual_seed(seed)
    state = 0.1 * torch.randn(shape[0], shape[2], op.dims["K"], op.dims["V"], generator=generator)
    return inputs, state


def check(recurrence, gate="mild", shape=(1, 75, 2), head_dim=(64, 64), dtype="bfloat16", seeds=(), **choices):
    """Simulate an op and compare output and state; race-check its specialised kernels over `seeds`."""
    op = compile_op(recurrence, head_dim, dtype, **choices)
    inputs, state = draw(op, recurrence, shape, gate)
    o, final, _ = simulate(op, inputs, state, check_schedules=bool(seeds), seeds=seeds)
    o_ref, final_ref = recurrence_reference(recurrence, inputs, state)
    assert relative(o, o_ref) < TOLERANCE[dtype]
    assert relative(final, final_ref) < TOLERANCE[dtype]
    return op


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", zoo.names())
def test_zoo_at_head_dim_128(name, gate):
    check(zoo.get(name), gate, head_dim=(128, 128))


@pytest.mark.parametrize("gate", ["mild", "reset"])
@pytest.mark.parametrize("name", CASES)
def test_recurrences_outside_the_zoo(name, gate):
    check(CASES[name][0], gate, shape=(1, 50, 1))


@pytest.mark.parametrize("name", zoo.names())
def test_warp_specialised_schedule_has_no_race(name):
    op = check(zoo.get(name), shape=(1, 70, 1), seeds=range(4))
    assert op.schedule["scan_skeleton"] == "scan_specialised"


@pytest.mark.parametrize("arch", ["sm100", "sm120"])
@pytest.mark.parametrize("name", ["linear_attention", "gated_deltanet", "kda", "dplr", "deltaproduct"])
def test_automatic_specialisation_has_no_race(name, arch):
    check(zoo.get(name), shape=(1, 70, 1), arch=arch, seeds=range(4))


def test_a_scan_whose_warps_are_all_alike():
    check(zoo.get("kda"), shape=(1, 70, 1), seeds=range(1), schedule={"scan_skeleton": "scan_plain", "stages": 1})


@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_few_chunks_race_free(tokens):
    check(zoo.get("kda"), shape=(1, tokens, 1), seeds=range(4))


@pytest.mark.parametrize("head_dim", [(64, 64), (128, 64), (64, 128), (256, 128), (128, 256), (256, 256)])
@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "dplr"])
def test_head_dims(name, head_dim):
    check(zoo.get(name), head_dim=head_dim, shape=(1, 37, 1))


@pytest.mark.parametrize("name", zoo.names())
def test_fp16(name):
    check(zoo.get(name), "bounded", dtype="float16")


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm100", "sm120"])
@pytest.mark.parametrize("name", ["retnet", "kda_bounded", "rwkv7", "deltaproduct"])
def test_other_targets(name, arch):
    check(zoo.get(name), arch=arch)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("name", zoo.names())
def test_split_output_and_every_chunk_size(name, chunk_size):
    check(zoo.get(name), "softplus", schedule={"chunk_size": chunk_size, "output": "split"})


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_tree_at_every_chunk_size(chunk_size, gate):
    check(zoo.get("dplr"), gate, schedule={"chunk_size": chunk_size})


def test_several_sequences_and_heads_do_not_mix():
    check(zoo.get("kda"), shape=(3, 20, 4))


def test_gates_in_fp32():
    op = check(zoo.get("kda"), gate_dtype="float32")
    assert {p.dtype for k in op.kernels for p in k.params if p.name in ("g", "beta")} == {"float32"}


def test_later_tokens_leave_earlier_outputs_bit_identical():
    op = compile_op(zoo.get("kda"), 64)
    inputs, state = draw(op, zoo.get("kda"), (1, 70, 1), "softplus")
    before = simulate(op, inputs, state)[0]
    for t in (20, 33, 50):
        changed = {n: torch.cat([x[:, :t], 3 * x[:, t:].flip(1)], 1) for n, x in inputs.items()}
        changed["g"] = torch.cat([inputs["g"][:, :t], torch.full_like(inputs["g"][:, t:], -torch.inf)], 1)
        after = simulate(op, changed, state)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


def test_blocks_touch_only_their_own_results():
    op = compile_op(zoo.get("kda"), 64)
    inputs, state = draw(op, zoo.get("kda"), (2, 40, 2), "mild")
    simulate(op, inputs, state, check_races=True)
