"""Schedules of the CPU backend: whichever it is, results are the recurrence's, and threads are as before afterwards."""

import threading

import pytest
import torch
from sequences import cut, ends_of, inputs, off, one, reference

import kdagen as kg
from kdagen.ir.tensor_interpret import Interpreter
from kdagen.reference import recurrence_reference
from kdagen.runtime import cpu, cpu_decode, cpu_schedule
from kdagen.runtime.cpu_schedule import at_most, pinned
from kdagen.schedule import CPU_ROWS, CpuSchedule
from kdagen.tolerance import reference_gradients

HV, K, V = 2, 16, 16
SCHEDULES = [CpuSchedule(rows=rows, span=span) for rows in CPU_ROWS for span in (1, 3)]
LENGTHS = (1, 0, 150, 17, 64)


@pytest.fixture(params=SCHEDULES, ids=CpuSchedule.json)
def schedule(request, monkeypatch):
    """Each, with spans of two chunks of 16 tokens."""
    monkeypatch.setattr("kdagen.ir.tensor_interpret.SPAN_ELEMENTS", 2 * HV * 32 * K)
    monkeypatch.setattr("kdagen.ir.adjoint_interpret.SPAN_ELEMENTS", 2 * HV * 32 * K)
    return request.param


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def states(count: int, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, HV, K, V, generator=draw, dtype=torch.float64)


# -- right, whatever the schedule


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "deltaproduct", "rwkv7", "linear_attention"])
def test_results_and_gradients_are_the_oracle_s(name, schedule):
    given, first, d_final = inputs(name, (2, 150, HV, K, V), gate="softplus"), states(2), states(2, 2)
    d_out = torch.linspace(-1, 2, 2 * 150 * HV * V, dtype=torch.float64).view(2, 150, HV, V)
    out_right, final_right, right = reference_gradients(kg.load(name), given, first, d_out, d_final)
    leaves = {n: x.requires_grad_() for n, x in {**given, "initial_state": first}.items()}
    with pinned(schedule):
        out, final = kg.compile(name)(**leaves, output_final_state=True)
        found = torch.autograd.grad((out, final), list(leaves.values()), (d_out, d_final))
    assert off(out, out_right) < 1e-10 and off(final, final_right) < 1e-10
    assert all(off(x, right[n]) < 1e-9 for n, x in zip(leaves, found))


def test_a_ragged_batch_and_its_gradients_are_the_oracle_s(schedule):
    given, first = inputs("kda", (1, sum(LENGTHS), HV, K, V)), states(len(LENGTHS))
    out_right, final_right = reference("kda", given, first, LENGTHS)
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    right = torch.autograd.grad(reference("kda", leaves, first, LENGTHS)[0].square().sum(), list(leaves.values()))
    with pinned(schedule):
        out, final = kg.compile("kda")(
            **leaves, initial_state=first, cu_seqlens=ends_of(LENGTHS), output_final_state=True
        )
        found = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert off(out, out_right) < 1e-10 and off(final, final_right) < 1e-10
    assert all(off(x, y) < 1e-9 for x, y in zip(found, right))


def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_before_other_tokens(schedule):
    given = {n: x.float() for n, x in inputs("kda", (3, 150, HV, K, V)).items()}
    changed = {n: x.clone() for n, x in given.items()}
    changed["v"][:, 77:] = 3.0
    with pinned(schedule):
        op = kg.compile("kda")
        out = op(**given)[0]
        assert torch.equal(op(**one("kda", given, 1))[0], out[1:2])
        assert torch.equal(op(**changed)[0][:, :77], out[:, :77])
        assert torch.equal(op(**given)[0], out)


def test_states_on_the_way(schedule):
    given = inputs("kda", (2, 70, HV, K, V))
    with pinned(schedule):
        after = kg.compile("kda")(**given, states_every=32)[2]
    for i in range(2):
        right = recurrence_reference(kg.load("kda"), cut("kda", given, 0, 32 * (i + 1)))[1]
        assert off(after[:, i], right) < 1e-10


@pytest.mark.parametrize("keep", ["inputs", "states"])
def test_torch_compile_knows_how_many_states_are_kept(keep, schedule):
    op = kg.compile("kda", keep=keep)
    layer = lambda **given: op(**given)[0].sin()  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (150, 70):
        given = {n: x.requires_grad_() for n, x in inputs("kda", (2, tokens, HV, K, V)).items()}
        with pinned(schedule):
            found, right = (torch.autograd.grad(f(**given).sum(), list(given.values())) for f in (compiled, layer))
        assert all(torch.equal(x, y) for x, y in zip(found, right))


# -- the default is what there was before schedules


def test_the_default_takes_chunks_of_64_tokens_and_common_spans():
    given, program = inputs("kda", (2, 200, HV, K, V)), kg.compile("kda").program
    run = Interpreter(program, given, 64)
    out, state = torch.empty(2, 200, HV, V, dtype=torch.float64), torch.zeros(2, HV, K, V, dtype=torch.float64)
    run.scan(state, out)
    with pinned(CpuSchedule()):
        pinned_out, final = kg.compile("kda")(**given, output_final_state=True)
    assert torch.equal(pinned_out, out) and torch.equal(final, state)
    assert torch.equal(cpu.run(program, given)[0], out)


@pytest.mark.parametrize("rows, solving, chunk", [(16, 1, 16), (128, 1, 128), (128, 2, 64), (16, 3, 4), (32, 0, 32)])
def test_rows_bound_the_solve(rows, solving, chunk):
    assert cpu.chunk_size(1000, solving, rows) == chunk
    assert cpu.kept_chunks(3, 1000, None, solving, rows) == 3 * -(-1000 // chunk)
    assert cpu.kept_chunks(1, 1000, 5, solving, rows) == 1000 // chunk + 5


def test_wider_spans_hold_as_many_times_the_tokens():
    given, program = inputs("kda", (1, 8, HV, K, V)), kg.compile("kda").program
    common, wide = (Interpreter(program, given, 16, wider=wider) for wider in (1, 4))
    assert [run.span_tokens(run.wider * 2 * HV * 16 * K) for run in (common, wide)] == [32, 128]


# -- threads


def test_never_more_threads_than_torch_has_and_as_many_as_before_afterwards(three_threads):
    for threads, inside in ((0, 3), (1, 1), (2, 2), (3, 3), (64, 3)):
        with at_most(threads):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3


def test_threads_are_not_set_where_nothing_changes(three_threads, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail(f"set to {n}"))
    for threads in (0, 3, 8):
        with at_most(threads):
            pass


def test_threads_are_restored_after_an_error(three_threads):
    with pytest.raises(ValueError), at_most(1):
        raise ValueError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("place", ["forward", "backward", "decode"])
def test_each_pass_runs_on_the_schedule_s_threads(place, three_threads, monkeypatch):
    found, given = [], inputs("kda", (2, 3, HV, K, V))
    owner, name = {
        "forward": (cpu.Forward, "run"),
        "backward": (cpu.Backward, "run"),
        "decode": (cpu_decode, "groups"),
    }[place]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: found.append(torch.get_num_threads()) or original(*a, **k))
    with pinned(CpuSchedule(threads=2)):
        if place == "decode":
            kg.compile("kda").decode(**cut("kda", given, 0, 1), state_pool=states(2))
        else:
            kg.compile("kda", keep="inputs")(**{n: x.requires_grad_() for n, x in given.items()})[0].sum().backward()
    assert found and set(found) == {2} and torch.get_num_threads() == 3


def test_another_thread_keeps_its_threads_and_its_schedule(three_threads):
    """One that used torch before."""
    seen, before, inside = [], threading.Event(), threading.Event()

    def other():
        assert torch.get_num_threads() == 3
        before.set()
        inside.wait(10)
        seen.extend([torch.get_num_threads(), cpu_schedule._pinned.get()])

    thread = threading.Thread(target=other)
    thread.start()
    before.wait(10)
    with at_most(1), pinned(CpuSchedule(rows=16)):
        inside.set()
        thread.join()
    assert seen == [3, None]


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_has_the_same_bits_on_any_number_of_threads(threads, three_threads):
    given, pool = inputs("kda", (4, 1, HV, K, V), dtype=torch.float32), states(4).float()
    pools, outs = [pool.clone(), pool.clone()], []
    for mine, schedule in zip(pools, (CpuSchedule(), CpuSchedule(threads=threads))):
        with pinned(schedule):
            outs.append(kg.compile("kda").decode(**given, state_pool=mine))
    assert torch.equal(*outs) and torch.equal(*pools)


# -- who says which schedule


def test_a_pin_ends_with_its_block_and_nests(monkeypatch):
    monkeypatch.setattr("kdagen.runtime.tuned.cpu_schedule", lambda op, call, purpose: purpose)
    one, other = CpuSchedule(rows=16), CpuSchedule(rows=32)
    with pinned(one):
        with pinned(other):
            assert cpu_schedule.schedule_of(None, None, "decode") == other
        assert cpu_schedule.schedule_of(None, None, "decode") == one
    assert cpu_schedule.schedule_of(None, None, "decode") == "decode"


def test_each_purpose_is_looked_up(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kdagen.runtime.tuned.cpu_schedule", lambda op, call, purpose: asked.append(purpose) or CpuSchedule()
    )
    given, op = inputs("kda", (2, 3, HV, K, V)), kg.compile("kda")
    op(**given)
    op.decode(**cut("kda", given, 0, 1), state_pool=states(2))
    assert asked == ["inference", "decode"]
    op(**{n: x.requires_grad_() for n, x in given.items()})[0].sum().backward()
    assert asked[2:] == ["training", "training"]
