"""The op on CPU tensors, and as a torch op: schema, fake tensors, torch.compile, names."""

import copy
import itertools
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference
from kdagen.runtime.op import Op
from kdagen.schedule import Schedule

SHAPE = (2, 37, 3, 16, 24)
names = itertools.count()


def inputs(name="kda", shape=SHAPE, dtype=torch.float64, gate="mild") -> dict:
    return {n: x.to(dtype) for n, x in kg.zoo.sample(canonical(kg.load(name)), shape, gate).items()}


def relative(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def initial(dtype=torch.float64):
    b, _, h, k, v = SHAPE
    return torch.linspace(-1, 1, b * h * k * v, dtype=dtype).view(b, h, k, v)


def variation(name: str, factor: float):
    """A recurrence called `name`, another one for each factor."""

    @kg.recurrence(name=name)
    def plain(S, q, k, v):
        S = S + kg.outer(k, factor * v)
        return S, S.T @ q

    return plain


@pytest.mark.parametrize("name", kg.zoo.names())
def test_every_recurrence_runs_on_cpu_tensors(name):
    given = inputs(name)
    o, state = kg.compile(name)(**given, initial_state=initial(), output_final_state=True)
    o_ref, state_ref = recurrence_reference(kg.load(name), given, initial())
    assert relative(o, o_ref) < 1e-12 and relative(state, state_ref) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 5e-3),
        (torch.float16, torch.float32, 1e-3),
        (torch.float64, torch.float64, 1e-12),
    ],
)
def test_dtypes(dtype, state_dtype, tolerance):
    given = inputs("kda_softplus", dtype=dtype)
    o, state = kg.compile("kda_softplus")(**given, initial_state=initial(state_dtype), output_final_state=True)
    o_ref, state_ref = recurrence_reference(kg.load("kda_softplus"), given, initial())
    assert (o.dtype, state.dtype) == (dtype, state_dtype)
    assert relative(o, o_ref) < tolerance and relative(state, state_ref) < tolerance


def test_float32_gates_beside_half_floats():
    given = inputs(dtype=torch.bfloat16)
    mixed = {**given, "g": given["g"].float(), "beta": given["beta"].float()}
    op = kg.compile("kda")
    assert torch.equal(op(**mixed)[0], op(**given)[0])


def test_arguments_go_by_place_or_by_name():
    op, given = kg.compile("kda"), inputs()
    q, k, v, g, beta = given.values()
    expected = op(**given)[0]
    assert torch.equal(op(q, k, v, g, beta)[0], expected)
    assert torch.equal(op(q, k, beta=beta, g=g, v=v)[0], expected)
    assert op(**given)[1] is None


def test_a_sequence_is_a_list_or_one_stacked_tensor_or_single_names():
    op, given = kg.compile("deltaproduct"), inputs("deltaproduct")
    q, k_1, k_2, v_1, v_2, beta_1, beta_2, g = given.values()
    expected = op(**given)[0]
    stacked = [torch.stack(pair, 2) for pair in ((k_1, k_2), (v_1, v_2), (beta_1, beta_2))]
    assert torch.equal(op(q, [k_1, k_2], (v_1, v_2), [beta_1, beta_2], g)[0], expected)
    assert torch.equal(op(q, *stacked, g)[0], expected)
    assert torch.equal(op(q, stacked[0], v_1=v_1, v_2=v_2, beta=stacked[2], g=g)[0], expected)


def test_strides_do_not_matter():
    op, given = kg.compile("kda"), inputs()
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in given.items()}
    assert not strided["q"].is_contiguous()
    assert torch.equal(op(**strided)[0], op(**given)[0])


@pytest.mark.parametrize("state", [None, initial()])
def test_no_token_keeps_the_state(state):
    given = {name: x[:, :0] for name, x in inputs().items()}
    o, final = kg.compile("kda")(**given, initial_state=state, output_final_state=True)
    assert tuple(o.shape) == (2, 0, 3, 24)
    assert torch.equal(final, torch.zeros_like(initial()) if state is None else state)
    assert final is not state


def test_no_sequence():
    given = {name: x[:0] for name, x in inputs().items()}
    o, final = kg.compile("kda")(**given, output_final_state=True)
    assert tuple(o.shape) == (0, 37, 3, 24) and tuple(final.shape) == (0, 3, 16, 24)


def test_compile_takes_a_recurrence_a_name_or_a_file(tmp_path):
    source = (
        "import kdagen as kg\n\n@kg.recurrence\ndef plain(S, q, k, v):\n"
        "    S = S + kg.outer(k, v)\n    return S, S.T @ q\n"
    )
    (tmp_path / "mine.py").write_text(source)
    given = inputs("linear_attention")
    expected = kg.compile("linear_attention")(**given)[0]
    assert torch.equal(kg.compile(f"{tmp_path / 'mine.py'}:plain")(**given)[0], expected)
    assert torch.equal(kg.compile(kg.load("linear_attention"))(**given)[0], expected)


def test_nothing_is_compiled_or_imported_before_it_is_needed(tmp_path):
    import subprocess
    import sys

    code = "import sys, kdagen as kg; kg.compile('kda'); print({'tilelang', 'tvm', 'tvm_ffi'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "set()\n", run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_copied_module_shares_its_op():
    op = kg.compile("kda")
    assert copy.deepcopy({"op": op})["op"] is op


# -- as a torch op


@pytest.mark.parametrize("name", ["kda", "deltaproduct", "retnet"])
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(name, with_state):
    given = inputs(name, dtype=torch.float32)
    options = (initial(torch.float32), True) if with_state else ()
    checks = torch.library.opcheck(kg.compile(name).torch_op, (*given.values(), *options))
    assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_it_is_found_under_torch_ops():
    name, given = f"plain{next(names)}", inputs("linear_attention")
    op = kg.compile(variation(name, 1.0))
    found = getattr(torch.ops.kdagen, name)
    assert op.torch_op == found.default
    o, state, states = found(**given, output_final_state=True)
    expected = op(**given, output_final_state=True)
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1]) and states.numel() == 0
    options = "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None"
    schema = f"(Tensor q, Tensor k, Tensor v, {options}, int states_every=0, bool check=False)"
    assert str(op.torch_op._schema) == f"kdagen::{name}{schema} -> (Tensor, Tensor, Tensor)"
    pool = "Tensor(a!) state_pool, Tensor? state_indices=None, Tensor? num_accepted_tokens=None"
    schema = f"(Tensor q, Tensor k, Tensor v, {pool}, Tensor? cu_seqlens=None, int null_below=0, bool check=False)"
    assert str(op.decode_op._schema) == f"kdagen::{name}_decode{schema} -> Tensor"
    assert str(op.recurrent_op._schema) == (
        f"kdagen::{name}_recurrent(Tensor q, Tensor k, Tensor v, {options}, bool check=False) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_a_graph_break(dynamic):
    op, given = kg.compile("kda"), inputs(dtype=torch.float32)

    def layer(scale, **tensors):
        o, state = op(**tensors, output_final_state=True)
        return scale * o, state.sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (37, 20):
        cut = {name: x[:, :tokens] for name, x in given.items()}
        for found, expected in zip(compiled(2.0, **cut), layer(2.0, **cut)):
            assert torch.equal(found, expected)


def test_torch_compile_of_sequences():
    op, given = kg.compile("deltaproduct"), inputs("deltaproduct", dtype=torch.float32)
    q, k_1, k_2, v_1, v_2, beta_1, beta_2, g = given.values()
    stacked = torch.stack([k_1, k_2], 2)

    def layer(k):
        return op(q, k, [v_1, v_2], [beta_1, beta_2], g)[0]

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(stacked), layer(stacked))


def test_torch_export_for_any_length():
    given = inputs(dtype=torch.float32)

    class Layer(torch.nn.Module):
        op = kg.compile("kda")

        def forward(self, *tensors):
            return self.op(*tensors)[0]

    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(Layer(), tuple(given.values()), dynamic_shapes=(tuple({1: tokens} for _ in given),))
    cut = [x[:, :20] for x in given.values()]
    assert torch.equal(exported.module()(*cut), kg.compile("kda")(*cut)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fake_cuda_tensors_give_shapes_dtypes_and_device(dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode():
        given = [torch.empty(x.shape, dtype=dtype, device="cuda") for x in inputs().values()]
        o, state = kg.compile("kda")(*given, output_final_state=True)
    assert (tuple(o.shape), o.dtype, o.device.type) == ((2, 37, 3, 24), dtype, "cuda")
    assert (tuple(state.shape), state.dtype, state.device.type) == ((2, 3, 16, 24), state_dtype, "cuda")


def test_two_recurrences_of_one_name_do_not_clash():
    given, name = inputs("linear_attention"), f"plain{next(names)}"
    once, twice = kg.compile(variation(name, 1.0)), kg.compile(variation(name, 2.0))
    assert once.torch_op == getattr(torch.ops.kdagen, name).default
    assert twice.torch_op.name().startswith(f"kdagen::{name}_")
    assert relative(twice(**given)[0], 2 * once(**given)[0]) < 1e-12


def test_a_recurrence_that_is_defined_again_is_the_same_op():
    name = f"plain{next(names)}"
    assert kg.compile(variation(name, 1.0)) is kg.compile(variation(name, 1.0))
    assert kg.compile(variation(name, 3.0)) is not kg.compile(variation(name, 1.0))


def test_options_make_ops_of_their_own(tmp_path):
    (tmp_path / "scan.py.j2").write_text("one")
    changes = [{}, {"head_dim": 64}, {"dtype": torch.float16}, {"arch": "sm90"}, {"schedule": {"chunk_size": 32}}]
    changes += [{"schedule": Schedule()}, {"gate_dtype": "float32"}, {"build_dir": "x"}, {"templates": [tmp_path]}]
    ops = [kg.compile("kda", **change) for change in changes]
    assert len({op.torch_op for op in ops}) == len(changes)
    assert kg.compile("kda", head_dim=(64, 64), arch=None) is ops[1]
    (tmp_path / "scan.py.j2").write_text("two")  # an edited skeleton makes another op
    assert kg.compile("kda", templates=[tmp_path]) is not ops[-1]


def test_names_that_torch_s_schemas_do_not_take():
    @kg.recurrence(name="größe")
    def plain(S, q, k, v, β: kg.Scalar, out: kg.Scalar(lower=0.0, upper=1.0)):
        S = out * S + kg.outer(k, β * v)
        return S, S.T @ q

    b, t, h, k, v = SHAPE
    given = {"q": torch.ones(b, t, h, k), "k": torch.ones(b, t, h, k), "v": torch.ones(b, t, h, v)}
    given |= {"β": torch.ones(b, t, h), "out": torch.zeros(b, t, h)}
    o, _ = kg.compile(plain)(**given)
    assert torch.equal(o, torch.full_like(o, 16.0))


# -- what people are told


def test_the_first_call_of_each_kind_is_logged(caplog):
    op = kg.compile("kda", head_dim=(64, next(names) + 1000))
    with caplog.at_level(logging.INFO, logger="kdagen"):
        for dtype in (torch.float32, torch.float32, torch.float64):
            op(**inputs(dtype=dtype))
    assert caplog.messages == [
        f"kda: {dtype} tensors on cpu: CPU backend, batched matrix products on torch"
        for dtype in ("float32", "float64")
    ]


def test_explain_says_what_would_run_and_what_ran(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    op = kg.compile("kda_bounded", arch="sm80", gate_dtype="float32")
    text = op.explain()
    assert text.startswith("kda_bounded(q, k, v, g, beta, A_log, dt_bias): torch.ops.kdagen.kda_bounded")
    assert "CPU tensors   CPU backend: batched matrix products on torch" in text
    assert "CUDA tensors  kernels for sm80 (A100), bfloat16, K = 128, V = 128" in text
    assert "decay       factored: the gate is bounded by -5 a token" in text
    assert "found in    neither build folder nor cache (kdagen_ops/kda_bounded holds nothing)" in text
    assert text.endswith("last call     none yet")
    op(**inputs("kda_bounded", dtype=torch.float32))
    assert op.explain().endswith("last call     float32 tensors on cpu: CPU backend, batched matrix products on torch")


def test_explain_says_how_states_are_stored_and_what_decodes():
    text = " ".join(kg.compile("kda", arch="sm90", state_layout="VK", state_dtype="bfloat16").explain().split())
    assert "states [N, HV, V, K] in bfloat16" in text
    assert "decoding on CPU one token after another, on states in place on GPUs one kernel for sm90, " in text
    text = " ".join(kg.compile("kda", arch="sm90").explain().split())
    assert "states [N, HV, K, V] in float32, beside float64 arguments float64" in text


def test_explain_says_when_a_decay_form_was_chosen():
    op = kg.compile("kda_bounded", arch="sm90", schedule={"decay": "tree", "chunk_size": 16})
    assert "decay       tree: chosen in the schedule" in op.explain()


def test_an_op_prints_as_its_signature():
    assert repr(kg.compile("gla")) == "<kdagen op gla(q, k, v, g): print(op.explain()) says what runs it>"
    assert isinstance(kg.compile("gla"), Op)
