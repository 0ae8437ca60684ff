"""The race simulator accepts schedules that are right and catches those that are not, whatever the seed."""

import numpy as np
import pytest
from tile_kernels import Scan, bfloat16, gemm, nans, packed, prepare, prologue, snippet

from kdagen.build import adapter
from kdagen.errors import SimulationError
from kdagen.simulate.asynchronous import Barrier
from kdagen.simulate.schedule import RaceSimulator, check_schedule
from kdagen.target import target

SM90 = target("sm90")
SEEDS = range(6)


def check_packed(**choices):
    return check_schedule(packed(**choices), SM90, Scan(32, 64, 64, NC=choices.pop("NC", 5)).packed(), SEEDS)


def test_an_explicit_schedule_holds_in_every_order():
    report = check_packed()
    assert report.ok
    assert report.roles == [(0, 128), (128, 160), (160, 256)]
    assert str(report) == "scan: 3 roles, 6 of 6 seeds hold"


@pytest.mark.parametrize("chunks", [1, 2])
def test_loops_shorter_than_the_pipeline(chunks):
    assert check_schedule(packed(), SM90, Scan(32, 64, 64, NC=chunks).packed(), SEEDS).ok


def test_an_automatic_schedule_of_plain_products_holds():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 256)).astype(bfloat16), rng.standard_normal((256, 256)).astype(bfloat16)
    report = check_schedule(gemm(), SM90, [a, b, nans((300, 256))], SEEDS)
    assert report.ok
    assert len(report.roles) == 2


def test_a_target_without_roles_leaves_the_program_as_it_is():
    kernel = gemm()
    assert adapter.specialised(kernel, target("sm80")).same_as(kernel)


def test_one_role_needs_one_seed():
    k, beta = np.ones((1, 32, 1, 64), bfloat16), np.ones((1, 32, 1), np.float32)
    arrays = [k, np.zeros(k.shape, np.float32), beta, nans((1, 2, 1, 16, 16), bfloat16)]
    report = check_schedule(prepare(), SM90, arrays, SEEDS)
    assert report.ok
    assert (report.seeds, len(report.roles)) == ((0,), 1)


def test_asynchronous_products_under_an_automatic_schedule_are_released_too_early():
    report = check_packed(schedule="automatic")
    assert sorted(report.failures) == list(SEEDS)
    assert all("changed while the wgmma into" in why for why in report.failures.values())


def test_a_release_before_the_wait_is_caught():
    report = check_packed(release="early")
    assert sorted(report.failures) == list(SEEDS)
    assert "'ia' changed while the wgmma into 'of' was reading it" in report.failures[0]


def test_a_product_used_before_its_wait_is_nan():
    report = check_packed(waits=False)
    assert sorted(report.failures) == list(SEEDS)
    assert "'O' differs in " not in report.failures[0]
    assert "'OUT' differs in 20480 of 20480 elements, 20480 are NaN" in report.failures[0]


@pytest.mark.parametrize("variant", ["copied", "cleared"])
def test_a_prologue_copy_outside_the_role_that_holds_the_fragment_is_caught(variant):
    report = check_schedule(prologue(variant), SM90, prologue_arrays(), SEEDS)
    assert sorted(report.failures) == list(SEEDS)
    assert "fragment 's' belongs to one role but code common to all roles reads it" in report.failures[0]


def test_the_same_copy_in_the_loop_holds():
    assert check_schedule(prologue("in loop"), SM90, prologue_arrays(), SEEDS).ok


def prologue_arrays():
    rng = np.random.default_rng(0)
    z, x = ((rng.standard_normal((256, 128)) * 0.1).astype(bfloat16) for _ in range(2))
    return [z, x, rng.standard_normal((128, 64)).astype(np.float32), nans((256, 64), bfloat16)]


def test_the_arrays_of_a_check_stay_as_they_are():
    arrays = Scan(32, 64, 64).packed()
    before = [a.copy() for a in arrays]
    check_schedule(packed(), SM90, arrays, range(1))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays, before, strict=True))


def test_a_seed_repeats_itself():
    after = adapter.specialised(packed(release="early"), SM90)
    messages = [str(failure(RaceSimulator(after, 3), Scan(32, 64, 64, NC=5).packed())) for _ in range(2)]
    assert messages[0] == messages[1]


def failure(simulator, arrays):
    with pytest.raises(SimulationError) as caught:
        simulator(*arrays)
    return caught.value


ONE = 'A: T.Tensor((64,), "float32"), B: T.Tensor((64,), "float32")'
HANDSHAKE = """
tx = T.get_thread_binding()
s = T.alloc_shared((64,), "float32")
full = T.alloc_barrier({arrivals})
if tx < 128:
    T.copy(A[0:64], s)
    {arrive}
else:
    {wait}
    T.copy(s, B[0:64])
"""


def handshake(seed, arrivals=128, arrive="T.barrier_arrive(full)", wait="T.barrier_wait(full, 0)"):
    """Threads 0 to 127 fill shared memory; the others store it once a barrier says so."""
    kernel = snippet(ONE, HANDSHAKE.format(arrivals=arrivals, arrive=arrive, wait=wait), threads=256)
    b = nans(64)
    RaceSimulator(adapter.specialised(kernel, SM90), seed)(np.ones(64, np.float32), b)
    return b


def test_a_barrier_orders_two_roles():
    assert all((handshake(seed) == 1).all() for seed in SEEDS)


def test_without_a_wait_poison_shows_in_some_order():
    assert any(np.isnan(handshake(seed, wait="pass")).any() for seed in SEEDS)


def test_a_deadlock_says_who_waits_for_what():
    with pytest.raises(SimulationError) as caught:
        handshake(0, arrive="pass")
    assert str(caught.value) == (
        "deadlock: threads 128 to 255 wait for parity 0 of barrier full[0] "
        "(now in phase 0, 0 of 128 arrived, 0 copies in flight)"
    )


def test_too_many_arrivals_are_caught():
    with pytest.raises(SimulationError, match=r"barrier full\[0\] phase 0: 128 arrivals, expected 96"):
        handshake(0, arrivals=96)


def test_a_phase_ends_when_all_arrived_and_all_landed():
    barrier = Barrier("b", expected=2, in_flight=1)
    barrier.arrive(2)
    assert barrier.phase == 0
    barrier.in_flight = 0
    barrier.settle()
    assert (barrier.phase, barrier.arrived) == (1, 0)


def test_a_wgmma_that_nobody_waits_for_is_caught():
    body = """
a, b = T.alloc_shared((64, 64), "bfloat16"), T.alloc_shared((64, 64), "bfloat16")
c = T.alloc_fragment((64, 64), "float32")
T.copy(A, a)
T.copy(A, b)
T.wgmma_gemm(a, b, c, clear_accum=True)
"""
    kernel = adapter.specialised(snippet('A: T.Tensor((64, 64), "bfloat16")', body), SM90)
    with pytest.raises(SimulationError, match="1 wgmma in flight: add wait_wgmma"):
        RaceSimulator(kernel)(np.ones((64, 64), bfloat16))


def test_products_in_flight_add_to_one_accumulator_in_order():
    body = """
a, c = T.alloc_shared((64, 64), "bfloat16"), T.alloc_fragment((64, 64), "float32")
T.copy(A, a)
T.fill(c, 1.0)
for i in T.unroll(3): T.wgmma_gemm(a, a, c)
T.wait_wgmma(1)
T.wait_wgmma(0)
T.copy(c, B)
"""
    kernel = snippet('A: T.Tensor((64, 64), "bfloat16"), B: T.Tensor((64, 64), "float32")', body)
    b = nans((64, 64))
    RaceSimulator(adapter.specialised(kernel, SM90))(np.ones((64, 64), bfloat16), b)
    assert (b == 1 + 3 * 64).all()
