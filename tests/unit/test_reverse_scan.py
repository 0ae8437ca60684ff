"""The scans of training as tile IR: what they read, write, keep and move, and the order of their products."""

import dataclasses

import pytest
from scans import training_scans

from kdagen import zoo
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map, Wait, reads, writes
from kdagen.ir.tile_cost import bytes_a_token
from kdagen.lower.asynchronous import insert_waits

STATE = ("N", "HV", 128, 128)


def scans(name, **choices):
    return training_scans(zoo.get(name), 128, chunk_size=32, segment=8, **choices)[1]


def globals_of(kernel):
    return {b.name: (b.shape, b.role) for b in kernel.params}


def test_the_reverse_scan_takes_cotangents_and_leaves_cotangents():
    found = globals_of(scans("kda")["reverse"])
    assert found["d_o_in"] == (("T", "HV", 128), "d_out")
    assert found["d_final_state"] == (STATE, "d_final_state")
    assert found["d_initial_state"] == (STATE, "d_initial_state")
    assert found["d_S_w"] == (("HV", "NG", 128, 128), "workspace")
    states, workspaces = ["d_final_state", "d_initial_state"], ["keys_w", "mix32_w", "gamma_w", "d_S_w"]
    assert list(found) == ["d_o_in", *states, *workspaces, "cu_seqlens"]


def test_the_replay_reads_what_the_states_need_and_writes_these_alone():
    replay = scans("kda")["replay"]
    assert list(globals_of(replay)) == ["v_in", "initial_state", "keys_w", "mix32_w", "gamma_w", "S_w", "cu_seqlens"]
    loaded = [s.src for s in replay.loads]
    assert "keys_w[h, first + n, 0:64, 0:128]" in loaded  # no Q
    assert "mix32_w[h, first + n, 0:32, 0:32]" in loaded  # no A
    assert {"S_w"} == {n for s in replay.statements for n in writes(s)} & set(globals_of(replay))


def test_a_scan_keeps_states_only_when_asked():
    kept = scans("kda")["scan"]
    assert globals_of(kept)["S_w"] == (("HV", "NC", 128, 128), "workspace")
    (stored,) = (s for s in kept.body if "S_w" in writes(s))
    before_wait = kept.body[: next(i for i, s in enumerate(kept.body) if isinstance(s, Wait) and s.pending)]
    assert stored in before_wait and any(isinstance(s, Gemm) for s in before_wait)


@pytest.mark.parametrize("name", ["deltanet", "linear_attention"])
def test_a_state_that_does_not_decay_reads_no_decay(name):
    assert "gamma_w" not in globals_of(scans(name)["reverse"])


def test_without_a_solve_only_the_output_cotangent_is_read():
    assert [s.acc for s in scans("mamba2")["reverse"].body if isinstance(s, Gemm)] == ["d_S_f"]


@pytest.mark.parametrize("name", zoo.names())
def test_products_wait_only_for_their_own_operands(name):
    """What needs d_O alone comes before the first wait; then each wait leaves all but the product it is for."""
    body = scans(name)["reverse"].body
    first = next((i for i, s in enumerate(body) if isinstance(s, Wait) and i), len(body))
    early = [s for s in body[:first] if isinstance(s, Gemm)]
    assert all("d_O_b_f" not in reads(s) for s in body[first:])
    assert (
        sum("d_O_b_f" in reads(s) for s in early) == sum("d_O_b_f" in reads(s) for s in body if isinstance(s, Gemm)) > 0
    )


MOVED = {  # scan keeping states, replay, reverse: keys + mixes + V-wide + kept + gamma
    "kda": (768 + 128 + 256 + 256 + 1024 + 16, 512 + 64 + 256 + 1024 + 16, 768 + 128 + 256 + 128 + 16),
    "linear_attention": (512 + 64 + 256 + 256 + 1024, 256 + 256 + 1024, 256 + 256 + 128),
}


@pytest.mark.parametrize("name", MOVED)
def test_traffic(name):
    kernels = scans(name)
    assert tuple(bytes_a_token(kernels[k]) for k in ("scan", "replay", "reverse")) == MOVED[name]


def test_a_store_made_once_in_so_many_chunks_counts_as_much_less():
    kept = Buffer("kept_w", ("HV", "NG", 64), "bfloat16", "global", "workspace")
    once = Map((("j", 64),), (("kept_w[h, n, j]", "0.0"),), where="n == 0", every=4)
    kernel = Kernel("k", "scan", "scan_pipelined", (("h", "HV"),), 64, 1, (kept,), (), (once,), (), chunk_size=16)
    often = dataclasses.replace(kernel, body=(dataclasses.replace(once, every=1),))
    assert bytes_a_token(kernel) == bytes_a_token(often) / 4 == 2 * 64 / 16 / 4


def test_a_round_begins_with_a_wait_if_it_meets_the_last_rounds_registers_behind_a_product():
    product = Gemm("o_f", "sb_f", "q_s", (64, 16, 64), clear=True)
    update = Gemm("s_f", "v_s", "x_s", (64, 64, 16))
    decay = Map((("i", 64),), (("s_f[i]", "s_f[i] * 0.5"),))
    assert insert_waits((product, decay, update)) == (Wait(0), product, decay, update, Wait(0))
    assert insert_waits((decay, product, update)) == (decay, product, update, Wait(0))
    assert insert_waits((Copy("sb_f", "s_f"), product, update))[0] == Copy("sb_f", "s_f")
