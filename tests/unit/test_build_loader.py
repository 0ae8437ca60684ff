"""Launching from a manifest: shapes from the plan, kernels in order, the variant that fits. The kernels are Python."""

import dataclasses
import platform
import threading

import packages
import pytest
import torch
import toy
import toy_decode
import toy_training

from kdagen.errors import ArgumentError
from kdagen.runtime import layout, loader, manifest
from kdagen.runtime.capacities import NEVER
from kdagen.runtime.loader import LoadedOp
from kdagen.runtime.package import BuiltOp
from kdagen.state import StateType

RUNS_ON = {"sm90": ["9.0"], "sm80": ["8.0"]}


def write_variant(folder, source):
    """A folder as a build leaves it, but for its libraries."""
    plan = source.plan()
    place = folder / source.name / manifest.variant(plan)
    place.mkdir(parents=True)
    kernels = [{"name": k.name, "library": f"{k.name}.so"} for k in source.kernels]
    target = {"name": source.target, "runs_on": RUNS_ON[source.target]}
    manifest.write(
        place,
        {
            "name": source.name,
            "host": platform.machine(),
            "digest": manifest.digest(source),
            "target": target,
            "plan": plan,
            "kernels": kernels,
        },
    )
    return place


@pytest.fixture
def op(tmp_path, monkeypatch):
    """The toy op whose kernels note what they are given."""
    return noting(tmp_path, monkeypatch, toy.toy())


@pytest.fixture
def decoding(tmp_path, monkeypatch):
    """The same of the toy op for decoding."""
    return noting(tmp_path, monkeypatch, toy_decode.toy())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The same of the toy op for training."""
    return noting(tmp_path, monkeypatch, toy_training.toy())


def noting(tmp_path, monkeypatch, source) -> LoadedOp:
    loaded = loader.load_op(write_variant(tmp_path, source))
    loaded.calls = []
    functions = {
        k["name"]: lambda *given, name=k["name"]: loaded.calls.append((name, given)) for k in loaded.plan["kernels"]
    }
    monkeypatch.setattr(loaded, "functions", lambda: functions)
    return loaded


def tensors(b=2, t=37, h=3, hv=6, **more) -> dict:
    return {"x": torch.zeros(b, t, h, 64, dtype=torch.bfloat16), "g": torch.zeros(b, t, hv), **more}


def taken(op, name: str) -> dict:
    """What the last launch of a kernel was given, by name."""
    kernel = next(k for k in op.plan["kernels"] if k["name"] == name)
    return dict(zip(kernel["params"], next(given for n, given in reversed(op.calls) if n == name), strict=True))


def test_sizes_are_evaluated():
    dims = {"B": 2, "H": 3, "T": 37}
    assert [layout.evaluate(s, dims) for s in (64, "T", "B*H", "(T + 15) // 16 * 16 - B")] == [64, 37, 6, 46]


def test_a_launch_makes_what_is_missing_and_runs_the_kernels_in_order(op):
    given = tensors()
    results = op.launch(given)
    assert [name for name, _ in op.calls] == ["toy_index", "toy_prepare", "toy_scan"]
    index, prepare, scan = (taken(op, name) for name, _ in op.calls)
    assert tuple(prepare["x"].shape) == (74, 3, 64) and prepare["x"].data_ptr() == given["x"].data_ptr()
    assert tuple(prepare["g"].shape) == (74, 6)
    assert prepare["w"] is scan["w"] and prepare["chunk_rows"] is index["chunk_rows"]  # from one to the other
    assert (tuple(scan["w"].shape), scan["w"].dtype) == ((6, 74 // 16 + 2, 16, 64), torch.bfloat16)
    assert (tuple(index["chunk_rows"].shape), index["chunk_rows"].dtype) == ((6, 2), torch.int32)
    assert index["cu_seqlens"].tolist() == [0, 37, 74] and index["cu_seqlens"].dtype == torch.int32
    assert tuple(results["o"].shape) == (2, 37, 6, 64) and tuple(scan["o"].shape) == (74, 6, 64)
    assert torch.equal(scan["initial_state"], torch.zeros(2, 6, 16, 64))  # none: zero
    assert scan["final_state"] is results["final_state"] and tuple(results["final_state"].shape) == (2, 6, 16, 64)


def test_an_initial_state_and_outputs_may_be_given(op):
    state, o = torch.ones(2, 6, 16, 64), torch.empty(2, 37, 6, 64)
    results = op.launch(tensors(initial_state=state, o=o))
    assert taken(op, "toy_scan")["initial_state"] is state and results["o"] is o
    assert taken(op, "toy_scan")["o"].data_ptr() == o.data_ptr()


def test_each_call_has_the_sizes_of_its_own_arguments(op):
    for b, n in ((2, 37), (2, 37), (1, 64), (2, 37)):
        results = op.launch(tensors(b, n))
        assert tuple(results["o"].shape) == (b, n, 6, 64)
        assert tuple(taken(op, "toy_scan")["w"].shape)[:2] == (6, b * n // 16 + b)


def test_what_is_remembered_of_calls_is_bounded_and_no_tensor(op):
    for n in range(1, 200):
        op.launch(tensors(1, n))
    assert 0 < len(op._layouts) <= loader.REMEMBERED
    assert all(isinstance(n, int) for found in op._layouts.values() for n in found.dims.values())


@pytest.mark.parametrize("state", [None, torch.ones(2, 6, 16, 64)])
def test_no_token_keeps_the_state_and_launches_nothing(op, state):
    results = op.launch(tensors(t=0, initial_state=state))
    assert op.calls == []
    assert torch.equal(results["final_state"], torch.zeros(2, 6, 16, 64) if state is None else state)


# -- ragged sequences


def ragged(ends, tokens: int, dtype=torch.int32) -> dict:
    return tensors(1, tokens, cu_seqlens=torch.tensor(ends, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_of_their_own_lengths(op, dtype):
    results = op.launch(ragged([0, 5, 5, 40], 50, dtype))
    scan = taken(op, "toy_scan")
    assert scan["cu_seqlens"].tolist() == [0, 5, 5, 40] and scan["cu_seqlens"].dtype == torch.int32
    assert tuple(scan["w"].shape)[:2] == (6, 50 // 16 + 3)
    assert tuple(results["final_state"].shape) == (3, 6, 16, 64)
    assert tuple(results["o"].shape) == (1, 50, 6, 64) and not results["o"].any()  # padding: nobody writes it


def test_integers_that_are_read_from_where_they_lie_are_seen_by_replays(op):
    given = ragged([0, 5, 5, 40], 50)
    op.launch(given)
    assert taken(op, "toy_scan")["cu_seqlens"].data_ptr() == given["cu_seqlens"].data_ptr()


def test_a_slice_of_integers_is_copied_to_where_kernels_can_read_it(op):
    given = ragged([7, 0, 5, 40], 50)
    op.launch(given | {"cu_seqlens": given["cu_seqlens"][1:]})
    found = taken(op, "toy_scan")["cu_seqlens"]
    assert found.tolist() == [0, 5, 40] and found.storage_offset() == 0


def test_integers_of_64_bits_stay_out_of_range(op):
    op.launch(ragged([0, 2**40, -(2**40)], 50, torch.int64))
    assert taken(op, "toy_scan")["cu_seqlens"].tolist() == [0, 2**31 - 1, -(2**31)]


def test_without_a_sequence_all_is_padding(op):
    results = op.launch(ragged([0], 50))
    assert op.calls == [] and not results["o"].any() and results["final_state"].shape[0] == 0


def test_key_heads_divide_value_heads(op):
    with pytest.raises(ArgumentError, match="toy: 4 value heads are no multiple of 3 key heads: expected HV = n H"):
        op.launch(tensors(hv=4))


# -- states on the way


def test_no_state_is_returned_unless_asked_for(op):
    results = op.launch(tensors())
    assert taken(op, "toy_scan")["every"] == NEVER and tuple(results["states"].shape) == (2, 0, 6, 16, 64)


@pytest.mark.parametrize(("tokens", "slots"), [(64, 6), (37, 3), (40, 3), (31, 2)])
def test_states_of_each_sequence(op, tokens, slots):
    """Of sequence s they begin in slot s T // n, which for lengths that n does not divide leaves gaps."""
    functions = op.functions()

    def scan(*given):
        functions["toy_scan"](*given)
        taken(op, "toy_scan")["states"][:] = torch.arange(slots)[:, None, None, None]

    op.functions = lambda: {**functions, "toy_scan": scan}
    results = op.launch(tensors(3, tokens), scalars={"every": 2})
    every, count = 32, tokens // 32
    assert taken(op, "toy_scan")["every"] == 2 and slots == 3 * tokens // every
    first = [s * tokens // every for s in range(3)]
    assert results["states"][:, :, 0, 0, 0].tolist() == [[f + i for i in range(count)] for f in first]


def test_states_of_ragged_sequences_are_zero_where_there_is_none(op):
    results = op.launch(ragged([0, 33, 90], 100), scalars={"every": 2})
    assert tuple(results["states"].shape) == (1, 3, 6, 16, 64) and not results["states"].any()


# -- training


def training_tensors(t=37, **more) -> dict:
    return tensors(t=t, a=torch.zeros(6), **more)


def test_a_forward_in_training_returns_what_it_keeps(trained):
    results = trained.launch(training_tensors())
    assert [name for name, _ in trained.calls] == ["toy_index", "toy_scan"]
    assert trained.training and trained.kept == ("w",)
    assert tuple(results["w"].shape) == (6, 6, 16, 64)
    assert tuple(taken(trained, "toy_index")["segments"].shape) == (74 // 32 + 2, 2)
    assert not {"d_S_w", "d_x_out", "d_initial_state"} & results.keys()  # the backward's own


def test_a_backward_makes_gradients_from_what_was_kept(trained):
    kept, d_out = trained.launch(training_tensors())["w"], torch.ones(2, 37, 6, 64, dtype=torch.bfloat16)
    trained.calls.clear()
    results = trained.launch(training_tensors(w=kept, d_o_in=d_out), "backward")
    assert [name for name, _ in trained.calls] == ["toy_index", "toy_reverse", "toy_gradients"]
    reverse, gradients = (taken(trained, name) for name, _ in trained.calls[1:])
    assert torch.equal(reverse["d_final_state"], torch.zeros(2, 6, 64, 64))  # no cotangent of the final state: zero
    assert tuple(reverse["d_S_w"].shape) == (6, 4, 64, 64)
    assert gradients["w"] is kept and gradients["d_S_w"] is reverse["d_S_w"]
    assert gradients["d_o_in"].data_ptr() == d_out.data_ptr() and tuple(gradients["d_o_in"].shape) == (74, 6, 64)
    assert not gradients["d_a_out"].any()  # parts of chunks that are none
    assert not {"o", "final_state", "initial_state"} & results.keys()
    results["d_a_out"][:] = torch.arange(36.0).view(6, 6)
    found = trained.gradients(results)
    assert found["g"] is results["d_g_out"] and tuple(found["g"].shape) == (2, 37, 6)
    assert found["a"].tolist() == [15.0 + 36 * i for i in range(6)]


def test_the_gradient_of_a_key_is_the_sum_over_its_group_of_heads(trained):
    functions = trained.functions()

    def gradients(*given):
        functions["toy_gradients"](*given)
        taken(trained, "toy_gradients")["d_x_out"][:] = 2.0 ** torch.arange(6)[:, None]

    trained.functions = lambda: {**functions, "toy_gradients": gradients}
    kept = torch.empty(6, 6, 16, 64, dtype=torch.bfloat16)
    d_x = trained.gradients(trained.launch(training_tensors(w=kept), "backward"))["x"]
    assert tuple(d_x.shape) == (2, 37, 3, 64) and d_x[1, 36, :, 63].tolist() == [1 + 2, 4 + 8, 16 + 32]


def test_gradients_of_padding_are_zero(trained):
    given = ragged([0, 5, 40], 50) | {"a": torch.zeros(6), "w": torch.empty(6, 5, 16, 64, dtype=torch.bfloat16)}
    found = trained.gradients(trained.launch(given, "backward"))
    assert not any(x.any() for x in found.values()) and tuple(found["x"].shape) == (1, 50, 3, 64)


def test_a_backward_without_what_was_kept_is_refused(trained):
    with pytest.raises(ArgumentError, match="toy: the backward lacks w: expected what the forward's launch returned"):
        trained.launch(training_tensors(), "backward")


def test_with_no_token_the_cotangent_of_the_state_stays_and_gradients_are_zero(trained):
    kept, d_final = torch.empty(6, 2, 16, 64, dtype=torch.bfloat16), torch.rand(2, 6, 64, 64)
    results = trained.launch(training_tensors(t=0, w=kept, d_final_state=d_final), "backward")
    assert trained.calls == []
    assert torch.equal(results["d_initial_state"], d_final)
    assert torch.equal(trained.gradients(results)["a"], torch.zeros(6))
    assert trained.gradients(results)["x"].shape == (2, 0, 3, 64)


# -- decoding


def decode_tensors(b=4, t=1, **more) -> dict:
    return {**tensors(b, t), "state_pool": torch.zeros(9, 6, 64), **more}


def test_a_pool_is_updated_in_place(decoding):
    given = decode_tensors()
    results = decoding.launch(given, "decode")
    found = taken(decoding, "toy_decode")
    assert found["state_pool"] is found["new_state_pool"] is given["state_pool"]
    assert found["state_indices"].tolist() == [[0], [1], [2], [3]] and found["num_accepted_tokens"].tolist() == [1] * 4
    assert {found[n].dtype for n in ("state_indices", "num_accepted_tokens", "cu_seqlens")} == {torch.int32}
    assert found["cu_seqlens"].tolist() == [0, 1, 2, 3, 4] and found["null_below"] == 0
    assert tuple(results["o_out"].shape) == (4, 1, 6, 64) and tuple(found["o_out"].shape) == (4, 6, 64)


def test_slots_counts_and_where_null_slots_end_may_be_given(decoding):
    indices = torch.tensor([[8, 2], [0, 2**33]])
    given = {
        "state_indices": indices,
        "num_accepted_tokens": torch.tensor([2, 1]),
        "new_state_pool": torch.ones(9, 6, 64),
    }
    decoding.launch(decode_tensors(2, 3, **given), "decode", scalars={"null_below": 1})
    found = taken(decoding, "toy_decode")
    assert found["state_indices"].tolist() == [[8, 2], [0, 2**31 - 1]]  # that is in no pool either
    assert found["num_accepted_tokens"].tolist() == [2, 1] and found["null_below"] == 1
    assert found["new_state_pool"] is given["new_state_pool"]
    one = torch.tensor([3, 1], dtype=torch.int32)
    decoding.launch(decode_tensors(2, state_indices=one), "decode")
    assert taken(decoding, "toy_decode")["state_indices"].tolist() == [[3], [1]]


def test_decoding_of_ragged_sequences(decoding):
    given = decode_tensors(1, 7, cu_seqlens=torch.tensor([0, 3, 3, 6]))
    results = decoding.launch(given, "decode")
    assert taken(decoding, "toy_decode")["state_indices"].tolist() == [[0], [1], [2]]
    assert not results["o_out"].any()  # of padding and of null slots


# -- what a launch must not do

SYNCHRONISING = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__iter__",
)


@pytest.fixture
def unread(monkeypatch):
    """No value of a tensor may be looked at, as that would wait for a GPU."""
    for name in SYNCHRONISING:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the GPU"))
    for name in ("nonzero", "unique", "equal", "repeat_interleave", "masked_select", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the GPU"))


@pytest.mark.parametrize("ends", [None, [0, 5, 5, 40], [0, 1, 2, 50]])
def test_no_launch_looks_at_a_value(op, trained, decoding, ends, request):
    cu = {} if ends is None else {"cu_seqlens": torch.tensor(ends)}
    batch = (2, 37) if ends is None else (1, 50)
    request.getfixturevalue("unread")
    op.launch(tensors(*batch, **cu), scalars={"every": 2})
    given = {**tensors(*batch, **cu), "a": torch.zeros(6)}
    kept = {"w": trained.launch(given)["w"]}
    trained.gradients(trained.launch({**given, **kept}, "backward"))
    decoding.launch({**decode_tensors(*batch, **cu)}, "decode")


def test_what_a_launch_makes_depends_on_shapes_alone(op):
    """So that a graph that was captured with some lengths serves all lengths."""
    shapes = []
    for ends in ([0, 0, 0, 50], [0, 1, 2, 3], [0, 16, 32, 48], [0, 0, 0, 0], [9, 4, 60, -1]):
        made = []
        op.launch(ragged(ends, 50), allocate=lambda *how: made.append(how) or loader._allocate(*how))  # noqa: B023
        shapes.append(made)
    assert len(shapes[0]) > 4 and all(made == shapes[0] for made in shapes)


def test_a_plan_from_before_there_were_passes_still_runs(op):
    del op.plan["passes"], op.plan["kept"]
    op.launch(tensors())
    assert [name for name, _ in op.calls] == ["toy_index", "toy_prepare", "toy_scan"]
    assert not op.training and op.kept == ()


def test_libraries_are_opened_once_whichever_thread_comes_first(tmp_path, monkeypatch):
    loaded, opened, barrier = loader.load_op(write_variant(tmp_path, toy.toy())), [], threading.Barrier(8)
    monkeypatch.setattr(LoadedOp, "_open", lambda self, kernel: opened.append(kernel["name"]))
    threads = [threading.Thread(target=lambda: (barrier.wait(), loaded.functions())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["toy_index", "toy_prepare", "toy_scan"]


def test_the_variant_that_fits_the_gpu_is_picked(tmp_path):
    for target in RUNS_ON:
        write_variant(tmp_path, toy.toy(target=target))
    op = BuiltOp(tmp_path / "toy")
    assert op.fitting(tensors(), "8.0").plan["target"] == "sm80"
    assert op.fitting(tensors(), "9.0").plan["target"] == "sm90"


def test_each_purpose_has_kernels_of_its_own(tmp_path):
    write_variant(tmp_path, toy_training.toy())
    op = BuiltOp(tmp_path / "toy")
    with pytest.raises(ArgumentError, match="no kernels of toy are in .*toy: build some with `kdagen build --op toy`"):
        op.fitting(training_tensors(), "9.0")
    assert op.fitting(training_tensors(), "9.0", "training").training
    assert op.planned(training_tensors()) is op.planned(training_tensors(), "9.0") is op.variants[0]
    with pytest.raises(ArgumentError, match="no kernels of toy for training fit"):
        op.planned(training_tensors(x=torch.zeros(2, 37, 3, 64)))
    with pytest.raises(ArgumentError, match="no kernels of toy for decode are in"):
        op.fitting(decode_tensors(), "9.0", "decode")
    write_variant(tmp_path, toy_decode.toy())
    assert BuiltOp(tmp_path / "toy").fitting(decode_tensors(), "9.0", "decode").purpose == "decode"


def test_a_variant_names_target_dtype_dims_and_what_differs():
    assert manifest.variant(toy.toy().plan()) == "sm90-bf16-64x64-g.fp32"
    assert manifest.variant(toy_training.toy().plan()) == "sm90-bf16-64x64-g.fp32-training"
    assert manifest.variant(toy_decode.toy().plan()) == "sm90-bf16-64x64-g.fp32-decode"
    state = StateType("VK", "bfloat16")
    assert manifest.variant(toy_decode.toy(state).plan()) == "sm90-bf16-64x64-g.fp32-state.vk.bf16-decode"


def test_types_of_states_are_ops_of_their_own(tmp_path):
    turned = StateType("VK")
    for source in (toy.toy(state=turned), toy_decode.toy(turned), toy.toy(), toy_decode.toy()):
        write_variant(tmp_path, source)
    op = BuiltOp(tmp_path / "toy")
    assert op.state == StateType() and {v.state for v in op.variants} == {StateType()}
    other = op.with_state("VK")
    assert other.state == turned and {v.state for v in other.variants} == {turned} and len(other.variants) == 2
    assert other.fitting(tensors(), "9.0").state == turned
    missing = (
        "no kernels of toy with states of KV, bfloat16: .*toy has KV, float32; VK, float32: build some with `kdagen"
    )
    with pytest.raises(ArgumentError, match=missing):
        op.with_state("KV", "bfloat16").variants  # noqa: B018 (the property reads the folder)


def test_a_package_tells_what_each_folder_is_for(tmp_path):
    training = dataclasses.replace(toy_training.toy(), schedule={**toy_training.toy().schedule, "keep": "all"})
    for source in (toy_decode.toy(), training, toy.toy()):
        packages.write(tmp_path / "made", source, tmp_path)
    rows = BuiltOp(tmp_path / "made" / "toy").describe()
    labels = [(label, text) for label, text in rows if label.strip() in ("CUDA tensors", "in training", "in decoding")]
    assert labels == [
        ("CUDA tensors", "kernels for sm90 (H100, H200), bfloat16, K = 64, V = 64"),
        ("  in training", "sm90, keep='all'"),
        ("  in decoding", "sm90, v_tile 64"),
    ]


def test_a_package_of_one_type_of_states_is_of_that_type(tmp_path):
    write_variant(tmp_path, toy.toy(state=StateType(dtype="bfloat16")))
    assert BuiltOp(tmp_path / "toy").state == StateType(dtype="bfloat16")


def test_the_digest_tells_kernels_apart():
    assert manifest.digest(toy.toy()) == manifest.digest(toy.toy())
    assert (
        len({manifest.digest(s) for s in (toy.toy(), toy.toy(stages=3), toy.toy(target="sm80"), toy.toy("two"))}) == 4
    )


def test_a_plan_says_what_training_keeps_and_moves():
    kernels = zip(toy_training.toy().kernels, (1.0, 100.0, 20.0, 300.0))
    source = dataclasses.replace(
        toy_training.toy(), kernels=tuple(dataclasses.replace(k, bytes_a_token=n) for k, n in kernels)
    )
    assert manifest.memory(source.plan()) == (64 * 2, 101.0, 321.0)
