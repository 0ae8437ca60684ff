"""The tuner's check on executed GPU programs: right ones pass, and each way of being wrong fails with its reason."""

from dataclasses import replace
from functools import partial

import packages
import pytest
import simulated_gpu
import torch
from kdagen.autotune import cases, launches
from kdagen.autotune.check import ELEMENTS, check
from kdagen.autotune.check import cases as drawn
from kdagen.autotune.expected import oracle
from kdagen.autotune.guarded import GUARD_BYTES, Guarded, same_bits, unwritten
from kdagen.autotune.sweep import Task

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.errors import RecurrenceError
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.runtime.loader import load_op
from kdagen.state import StateType
from kdagen.tolerance import reference_gradients
from kdagen.zoo.inputs import GATES

MAKE = {"inference": compile_op, "training": compile_training, "decode": compile_decode}
RESULTS = {
    "inference": {"out", "final_state"},
    "training": {"out", "final_state", "d_q", "d_k", "d_v", "d_gamma", "d_initial_state"},
    "decode": {"out", "state_pool"},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Kernels of a task, small enough to run as programs."""
    place = tmp_path_factory.mktemp("built")

    def build(task: Task):
        schedule = {"training": {"segment": 2, "chunk_size": 16}}.get(task.purpose)
        make = partial(MAKE[task.purpose], head_dim=64, state=task.state, schedule=schedule)
        return load_op(packages.write(place / task.name, make(zoo.get(task.op)), place))

    return build


@pytest.fixture
def gpu(monkeypatch):
    """A simulated one, and fewer tokens than there it takes."""
    simulated_gpu.install(monkeypatch)
    every = cases.forms
    monkeypatch.setattr(cases, "SHORT", (1, 0, 16, 17))
    monkeypatch.setattr(cases, "LONG", (33,))
    monkeypatch.setattr("kdagen.autotune.check.forms", lambda purpose: every(purpose)[::3])
    drawn.cache_clear()
    yield monkeypatch
    drawn.cache_clear()


def task_of(purpose: str, op: str = "retnet", **more) -> Task:
    return Task(op, purpose, "sm90", "H100", (64, 64), **more)


def checked(build, task: Task, **more) -> dict:
    kernels = build(task)
    return check(replace(task, **more), partial(launches.run, kernels), "cpu", kernels.plan)


@pytest.mark.parametrize("purpose", MAKE)
def test_right_kernels_pass(build, gpu, purpose):
    found = checked(build, task_of(purpose))
    assert found["ok"] and not found["reason"] and found["oracle"] == "recurrence"
    assert found["errors"].keys() == RESULTS[purpose] | {name + ELEMENTS for name in RESULTS[purpose]}
    assert all(0 < error <= most for error, most in found["errors"].values())


@pytest.mark.parametrize("purpose", ["inference", "decode"])
def test_states_are_of_the_types_of_the_task(build, gpu, purpose):
    assert checked(build, task_of(purpose, state=StateType("VK", "bfloat16")))["ok"]


def test_the_oracle_is_the_recurrence_where_it_is_at_hand(build, gpu, tmp_path):
    """Not so its file: what kernels compute is what their manifest says, unless someone knows better."""
    file = tmp_path / "mine.py"
    assert checked(build, task_of("inference"), op=f"{file}:retnet")["oracle"] == "canonical form"
    drawn.cache_clear()
    file.write_text("import kdagen as kg\n\n@kg.recurrence\ndef retnet(S, q, k, v, gamma: kg.HeadParameter):\n"
                    "    S = gamma * S + kg.outer(k, v)\n    return S, S.T @ (2 * q)\n")  # fmt: skip
    found = checked(build, task_of("inference"), op=f"{file}:retnet")
    assert found["oracle"] == "recurrence" and found["reason"].startswith("out is off by 5.0e-01")
    with pytest.raises(RecurrenceError, match="there is no file"):
        check(task_of("inference", "absent.py:retnet"), lambda case: {})


def beyond(name: str):
    """Writes a byte behind a tensor."""

    def write(tensors):
        raw = tensors[name].view(torch.uint8)
        raw.as_strided((1,), (1,), raw.storage_offset() + raw.numel()).zero_()

    return write


def poison(count: int):
    def fill(tensors):
        tensors["o_out"].view(torch.uint8).view(-1)[: 2 * count].fill_(0xFF)

    return fill


def scaled(by: float):
    return lambda tensors: tensors["o_out"].mul_(by)


WRONG = {
    r"a kernel wrote outside a tensor, bfloat16 \[": beyond("o_out"),
    r"a kernel wrote outside a tensor, float32 \[": beyond("final_state"),
    "a kernel wrote to v, which it was given": lambda t: t["v"].view(-1)[:1].add_(1),
    "3 of 576 elements of out were not written": poison(3),
    "out holds NaN or infinity": lambda t: t["o_out"].view(-1)[5:6].fill_(float("inf")),
    "out is off by 5.*, expected at most 5.0e-03": scaled(1.05),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_wrong_is_named(build, gpu, reason):
    simulated_gpu.tampered(gpu, "forward", WRONG[reason])
    with pytest.raises(AssertionError, match=reason):
        found = checked(build, task_of("inference"))
        assert found["ok"], found["reason"]


def test_a_kernel_that_never_ran_leaves_results_unwritten(build, gpu):
    task = task_of("inference")
    kernels = build(task)
    run = kernels.functions()
    gpu.setattr(type(kernels), "functions", lambda self: {n: f if "scan" not in n else id for n, f in run.items()})
    gpu.setattr(type(kernels), "_run", staticmethod(lambda f, arguments: None if f is id else f(*arguments)))
    found = check(task, partial(launches.run, kernels), "cpu", kernels.plan)
    assert found["reason"].startswith("576 of 576 elements of out were not written (mild gates, 3 x 1 tokens")


def test_two_runs_that_differ_in_one_bit(build, gpu):
    calls = iter(range(99))

    def flip(tensors):
        tensors["o_out"].view(torch.int16).view(-1)[:1].bitwise_xor_(next(calls) % 2)

    simulated_gpu.tampered(gpu, "forward", flip)
    found = checked(build, task_of("inference"))
    assert not found["ok"] and found["reason"].startswith("two runs differ in out (mild")


def test_a_slot_that_no_index_names(build, gpu):
    simulated_gpu.tampered(gpu, "decode", lambda t: t["state_pool"][5].mul_(2))
    found = checked(build, task_of("decode"))
    assert found["reason"].startswith("slots [5] of the pool were written, which no index names (mild gates, 4 x 1")


def test_gradients_that_are_wrong_or_missing(build, gpu):
    task = task_of("training")
    kernels = build(task)

    def without(name):
        return lambda case: {n: x for n, x in launches.run(kernels, case).items() if n != name}

    assert check(task, without("d_k"), "cpu", kernels.plan)["reason"].startswith("no d_k (")
    simulated_gpu.tampered(gpu, "backward", lambda t: t["d_v_out"].mul_(1.05))
    found = check(task, partial(launches.run, load_op(kernels.folder)), "cpu", kernels.plan)
    assert found["reason"].startswith("d_v is off by 5") and found["errors"]["out"][0] < 5e-3


def test_one_element_among_many_shows(gpu):
    """It hides in the norm of all."""
    gpu.setattr("kdagen.autotune.check.forms", lambda purpose: [cases.Form("mild", 1, 200, heads=8, value_heads=8)])
    task = task_of("inference", "linear_attention")
    ((case, expected),), _ = drawn(task, "", ())

    def run(case, wrong: float):
        out = expected["out"].clone()
        out.view(-1)[out.abs().argmax()] *= 1 - wrong
        return {**expected, "out": out}

    assert check(task, partial(run, wrong=0.0))["ok"]
    found = check(task, partial(run, wrong=0.2))
    assert found["reason"].startswith("out, an element is off by 2.0e-01") and found["errors"]["out"][0] < 5e-3


def test_errors_are_numbers_that_json_can_hold(build, gpu):
    simulated_gpu.tampered(gpu, "forward", lambda t: t["o_out"].fill_(1e30))
    found = checked(build, task_of("inference"))
    assert not found["ok"] and all(e < float("inf") for e, _ in found["errors"].values())


def test_what_a_run_raises_is_raised():
    def fail(case):
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        check(task_of("decode"), fail)


# -- cases and what is expected of them


def test_cases_are_drawn_once_for_all_candidates(gpu):
    task, seen = task_of("decode"), []
    for _ in range(2):
        check(task, lambda case: seen.append(case) or {"out": torch.zeros(1)})
    first, again = drawn(task, "", ())[0], drawn(task, "", ())[0]
    assert first is again and drawn.cache_info().misses == 1 and len(seen) == 4


def test_cases_cover_gates_lengths_heads_and_states():
    for purpose in MAKE:
        forms = cases.forms(purpose)
        assert {form.gate for form in forms} == set(GATES)
        assert any(form.value_heads > form.heads for form in forms) and any(form.lengths for form in forms)
        assert any(0 in form.lengths and 1 in form.lengths for form in forms)
    lengths = {n for form in cases.forms("training") for n in (*form.lengths, form.tokens)}
    for tokens in (16, 32, 64, 128, 512):  # chunks, and segments of 8 of them
        assert tokens in lengths and any(tokens < n < 2 * tokens for n in lengths)
        assert any(tokens // 2 < n < tokens for n in lengths) or tokens > 128
    for left_out in ("state", "d_out", "d_final_state"):
        assert {getattr(form, left_out) for form in cases.forms("training")} == {True, False}
    decoding = cases.forms("decode")
    assert any(-1 in form.slots for form in decoding) and any(form.accepted for form in decoding)
    assert any(form.null_below for form in decoding) and any(form.tokens > 1 for form in decoding)


def inputs_of(task: Task):
    form = canonical(zoo.get(task.op))
    return cases.Inputs(task, form, form.dtypes(task.dtype, task.gate_dtype or task.dtype))


@pytest.mark.parametrize("op", ["kda_softplus", "deltaproduct"])
def test_gradients_in_pieces_are_those_of_the_whole(monkeypatch, op):
    monkeypatch.setattr("kdagen.autotune.expected.PIECE", 3)
    task = task_of("training", op)
    case = inputs_of(task).draw(cases.Form("softplus", 1, 8, heads=1, value_heads=2), 0)
    found = oracle(task, None).expected(case)
    whole = reference_gradients(zoo.get(op), case.arguments, case.initial_state, case.d_out, case.d_final_state)
    assert torch.allclose(found["out"], whole[0], atol=1e-12) and torch.allclose(found["final_state"], whole[1])
    for name, gradient in whole[2].items():
        assert torch.allclose(found[f"d_{name}"], gradient, atol=1e-10), name
    sizes = {name.removeprefix("size of "): x for name, x in found.items() if name.startswith("size of ")}
    parameters = {a.name for a in canonical(zoo.get(op)).arguments if not a.per_token}
    assert sizes.keys() == {f"d_{name}" for name in parameters}
    assert all((size >= found[name].abs() - 1e-12).all() for name, size in sizes.items())


def test_ragged_sequences_stand_alone():
    task = task_of("training", "kda")
    inputs, source = inputs_of(task), oracle(task, None)
    case = inputs.draw(cases.Form("reset", lengths=(2, 0, 3)), 0)
    found = source.expected(case)
    assert found["out"].shape == (1, 5 + cases.PADDING, 2, 64) and not found["out"][:, 5:].any()
    assert torch.equal(found["final_state"][1], case.initial_state[1].double())
    assert torch.equal(found["d_initial_state"][1], case.d_final_state[1].double())
    alone = {n: x[:, 2:5] for n, x in case.arguments.items()}
    last = replace(case, arguments=alone, cu_seqlens=None, initial_state=case.initial_state[2:],
                   d_out=case.d_out[:, 2:5], d_final_state=case.d_final_state[2:])  # fmt: skip
    one = source.expected(last)
    assert torch.equal(found["out"][:, 2:5], one["out"]) and torch.equal(found["d_g"][:, 2:5], one["d_g"])
    assert torch.equal(found["d_initial_state"][2:], one["d_initial_state"])


def test_guarded_memory():
    memory = Guarded()
    a, b = memory.allocate((3, 5), "bfloat16"), memory.allocate((2,), "int32", "cpu", True)
    assert unwritten(a) == 15 and a.isnan().all() and b.tolist() == [0, 0] and not memory.broken()
    a.copy_(torch.arange(15.0).view(3, 5))
    assert not unwritten(a) and same_bits(memory.copy(a), a) and memory.copy(None) is None
    before = a.as_strided((1,), (1,), GUARD_BYTES // 2 - 1)
    before.zero_()
    assert memory.broken() == "bfloat16 [3, 5]"
