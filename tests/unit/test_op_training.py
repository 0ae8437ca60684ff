"""The op in training on CPU tensors: gradients against the recurrence differentiated by torch; how torch calls it."""

import copy
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_training
from kdagen.reference import recurrence_reference
from kdagen.schedule import Keep

SHAPE = (2, 70, 2, 8, 6)  # a whole chunk and a part of one
SMALL = (1, 5, 2, 4, 3)
KEEP = [keep.value for keep in Keep]
names = itertools.count()


def inputs(name="kda_softplus", shape=SHAPE, dtype=torch.float64, gate="mild", grad=True) -> dict:
    drawn = kg.zoo.sample(canonical(kg.load(name)), shape, gate)
    return {n: x.to(dtype).requires_grad_(grad) for n, x in drawn.items()}


def initial(shape=SHAPE, dtype=torch.float64, grad=True):
    b, _, h, k, v = shape
    return torch.linspace(-1, 1, b * h * k * v, dtype=dtype).view(b, h, k, v).requires_grad_(grad)


def loss(o, state):
    """A number that depends on both results, each element with a weight of its own; either may be None."""
    parts = [(x * torch.linspace(-1, 2, x.numel()).to(x).view(x.shape)).sum() for x in (o, state) if x is not None]
    return sum(parts)


def gradients(results, given: dict, state=None):
    wanted = [*given.values(), *([] if state is None else [state])]
    return dict(zip((*given, "initial_state"), torch.autograd.grad(loss(*results), wanted)))


def expected(name: str, given: dict, state=None, output=True, final=True) -> dict:
    """The gradients of the recurrence, run token by token in float64 and differentiated by torch."""
    given = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    state = None if state is None else state.detach().double().requires_grad_()
    o, end = recurrence_reference(kg.load(name), given, state)
    return gradients((o if output else None, end if final else None), given, state)


def close(found: dict, right: dict, tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, x in found.items():
        assert (x.double() - right[name]).norm() <= tolerance * right[name].norm(), name


def plain(name: str, factor: float = 1.0):
    @kg.recurrence(name=name)
    def body(S, q, k, v):
        S = S + kg.outer(k, factor * v)
        return S, S.T @ q

    return body


# -- gradients


@pytest.mark.parametrize("name", kg.zoo.names())
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
def test_gradcheck(name, with_state):
    given, op = inputs(name, SMALL), kg.compile(name)

    def call(state, *tensors):
        o, end = op(**dict(zip(given, tensors)), initial_state=state, output_final_state=with_state)
        return (o, end) if with_state else o

    state = initial(SMALL) if with_state else None
    assert torch.autograd.gradcheck(call, (state, *given.values()), fast_mode=True)


@pytest.mark.parametrize("name", kg.zoo.names())
def test_gradcheck_of_each_entry_of_the_jacobian(name):
    given, op = inputs(name, (1, 3, 1, 3, 2)), kg.compile(name, keep="inputs")

    def call(state, *tensors):
        return op(**dict(zip(given, tensors)), initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(call, (initial((1, 3, 1, 3, 2)), *given.values()))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", ["kda_softplus", "rwkv7"])
def test_gradients_over_several_chunks_whatever_is_kept(name, keep):
    given, state = inputs(name, (1, 150, 2, 8, 6)), initial((1, 150, 2, 8, 6))
    results = kg.compile(name, keep=keep)(**given, initial_state=state, output_final_state=True)
    close(gradients(results, given, state), expected(name, given, state), 1e-11)


@pytest.mark.parametrize(("output", "final"), [(True, False), (False, True)])
def test_only_one_of_the_results_is_used(output, final):
    given, state = inputs(), initial()
    o, end = kg.compile("kda_softplus")(**given, initial_state=state, output_final_state=True)
    found = torch.autograd.grad(
        loss(o if output else None, end if final else None), [*given.values(), state], materialize_grads=True
    )
    right = recurrence_gradients(given, state, output, final)
    close(dict(zip((*given, "initial_state"), found)), right, 1e-11)


def recurrence_gradients(given, state, output, final) -> dict:
    doubles = {n: x.detach().requires_grad_() for n, x in given.items()}
    start = state.detach().requires_grad_()
    o, end = recurrence_reference(kg.load("kda_softplus"), doubles, start)
    total = loss(o if output else None, end if final else None)
    found = torch.autograd.grad(total, [*doubles.values(), start], materialize_grads=True)
    return dict(zip((*doubles, "initial_state"), found))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1.5e-3)]
)
def test_gradients_come_in_the_dtype_of_each_argument(dtype, tolerance):
    given, state = inputs(dtype=dtype), initial(dtype=torch.float32)
    found = gradients(kg.compile("kda_softplus")(**given, initial_state=state, output_final_state=True), given, state)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in {**given, "initial_state": state}.items()}
    close(found, expected("kda_softplus", given, state), tolerance)


def test_float32_gates_beside_half_floats():
    given = inputs("kda", dtype=torch.bfloat16)
    given |= {n: given[n].detach().float().requires_grad_() for n in ("g", "beta")}
    found = gradients(kg.compile("kda")(**given), given)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in given.items()}
    close(found, expected("kda", given, final=False), 8e-3)


@pytest.mark.parametrize("wanted", ["q", "A_log", "initial_state"])
def test_gradients_that_nobody_needs_are_none(wanted):
    given, state = inputs(grad=False), initial(grad=False)
    leaf = {**given, "initial_state": state}[wanted].requires_grad_()
    o, _ = kg.compile("kda_softplus")(**given, initial_state=state)
    o.sum().backward()
    others = [x for x in (*given.values(), state) if x is not leaf]
    assert leaf.grad is not None and all(x.grad is None for x in others)


def test_strides_of_arguments_and_of_incoming_gradients_do_not_matter():
    given, op = inputs("kda"), kg.compile("kda")
    o, _ = op(**given)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    right = torch.autograd.grad(o, list(given.values()), d_out)
    turned = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    strided = {n: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for n, x in given.items()}
    assert not turned.is_contiguous() and not strided["q"].is_contiguous()
    found = torch.autograd.grad(op(**strided)[0], list(strided.values()), turned)
    assert all(torch.equal(a, b) for a, b in zip(found, right))


def test_the_expanded_gradient_of_a_sum():
    given, op = inputs("kda"), kg.compile("kda")
    ones = torch.autograd.grad(op(**given)[0], list(given.values()), torch.ones(2, 70, 2, 6, dtype=torch.float64))
    summed = torch.autograd.grad(op(**given)[0].sum(), list(given.values()))
    assert all(torch.equal(a, b) for a, b in zip(summed, ones))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(("cut", "shape"), [((slice(None), slice(0, 0)), (2, 0)), ((slice(0, 0),), (0, 70))])
def test_without_tokens_or_sequences(cut, shape, keep):
    given = {n: x.detach()[cut] if x.dim() > 2 else x.detach() for n, x in inputs().items()}
    given = {n: x.requires_grad_() for n, x in given.items()}
    state = initial().detach()[: shape[0]].requires_grad_()
    o, end = kg.compile("kda_softplus", keep=keep)(**given, initial_state=state, output_final_state=True)
    assert tuple(o.shape) == (*shape, 2, 6) and torch.equal(end, state)
    found = gradients((o, end), given, state)
    right = torch.autograd.grad(loss(None, state), state)[0]
    assert torch.equal(found.pop("initial_state"), right)
    assert all(x.shape == given[n].shape and not x.any() for n, x in found.items())


def test_gradients_of_sequences():
    op, given = kg.compile("deltaproduct"), inputs("deltaproduct")
    q, k_1, k_2, v_1, v_2, beta_1, beta_2, g = (x.detach() for x in given.values())
    stacked = [torch.stack(pair, 2).requires_grad_() for pair in ((k_1, k_2), (v_1, v_2), (beta_1, beta_2))]
    found = torch.autograd.grad(loss(op(q, *stacked, g)[0], None), stacked)
    right = expected("deltaproduct", given, final=False)
    for x, name in zip(found, ("k", "v", "beta")):
        for i in (1, 2):
            assert (x.select(2, i - 1) - right[f"{name}_{i}"]).norm() <= 1e-11 * right[f"{name}_{i}"].norm()


# -- which op runs, and what it keeps


def test_inference_keeps_nothing():
    given, op = inputs(dtype=torch.float32), kg.compile("kda_softplus")
    assert op(**given)[0].requires_grad and op.last.endswith("in training")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not op(**given)[0].requires_grad and not op.last.endswith("in training")
    assert not op(**{n: x.detach() for n, x in given.items()})[0].requires_grad
    assert not op.last.endswith("in training")


@pytest.mark.parametrize(
    ("keep", "states"), [("inputs", []), ("states", [(4, 1, 2, 8, 6)]), ("all", [(4, 1, 2, 8, 6)])]
)
def test_what_is_kept_goes_through_saved_tensor_hooks(keep, states):
    given, saved = inputs(), []
    op = kg.compile("kda_softplus", keep=keep)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x.clone(), lambda x: x):
        o, _ = op(**given)
    assert [tuple(x.shape) for x in saved] == [*(tuple(x.shape) for x in given.values()), *states]
    close(gradients((o, None), given), expected("kda_softplus", given, final=False), 1e-11)


def test_a_state_that_is_not_asked_for_has_no_gradient():
    op, given = kg.compile("kda_softplus"), inputs()
    assert op(**given)[1] is None
    o, state, kept = op.training_op(*given.values())
    assert tuple(state.shape) == (0,) and not state.requires_grad and not kept[0].requires_grad and o.requires_grad


def test_the_torch_op_of_inference_has_gradients_too():
    given, state = inputs(), initial()
    results = kg.compile("kda_softplus").torch_op(*given.values(), state, True)[:2]
    close(gradients(results, given, state), expected("kda_softplus", given, state), 1e-11)


def test_a_module_with_an_op_is_copied():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.A_log = kg.compile("kda_softplus"), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, **given):
            return self.op(**(given | {"A_log": self.A_log}))[0]

    layer, given = Layer(), inputs(grad=False)
    other = copy.deepcopy(layer)
    other(**given).sum().backward()
    assert other.A_log.grad is not None and layer.A_log.grad is None


# -- as torch ops


@pytest.mark.parametrize(
    ("name", "keep"), [("kda_softplus", "states"), ("kda_softplus", "inputs"), ("deltaproduct", "all")]
)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
def test_opcheck(name, keep, with_state):
    op, given = kg.compile(name, keep=keep), inputs(name, dtype=torch.float32)
    options = (initial(dtype=torch.float32), True) if with_state else ()
    with torch.no_grad():
        o, end, kept = op.training_op(*given.values(), *options)
    fixed = [x.detach() for x in given.values()]
    backward = (options[0].detach(), None, kept, None, end) if with_state else (None, None, kept, o, None)
    calls = [(op.torch_op, (*given.values(), *options)), (op.training_op, (*given.values(), *options))]
    for torch_op, arguments in (*calls, (op.backward_op, (*fixed, *backward))):
        checks = torch.library.opcheck(torch_op, arguments)
        assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_schemas():
    name = f"summed{next(names)}"
    op = kg.compile(plain(name))
    given = "Tensor q, Tensor k, Tensor v, Tensor? initial_state"
    forward = f"{given}=None, bool output_final_state=False, Tensor? cu_seqlens=None, bool check=False"
    backward = f"{given}, Tensor? cu_seqlens, Tensor[] kept, Tensor? d_out, Tensor? d_final_state"
    assert [str(x._schema) for x in (op.training_op, op.backward_op)] == [
        f"kdagen::{name}_training({forward}) -> (Tensor, Tensor, Tensor[])",
        f"kdagen::{name}_backward({backward}) -> (Tensor, Tensor, Tensor, Tensor)",
    ]


@pytest.mark.parametrize("suffix", ["_backward", "_training"])
@pytest.mark.parametrize("first", ["plain", "suffixed"])
def test_a_recurrence_that_is_called_as_another_one_s_op(suffix, first):
    name = f"summed{next(names)}"
    recurrences = [plain(name, 1.0), plain(name + suffix, 2.0)]
    step = 1 if first == "plain" else -1
    ops = [kg.compile(r) for r in recurrences[::step]][::step]
    registered = [x.name() for op in ops for x in (op.torch_op, op.training_op, op.backward_op)]
    assert len(set(registered)) == 6
    x = torch.ones(1, 3, 1, 2, requires_grad=True)
    once, twice = (torch.autograd.grad(op(x, x, x)[0].sum(), x)[0] for op in ops)
    assert torch.equal(twice, 2 * once)


def test_meta_tensors_have_gradients_of_the_right_shapes():
    given = {n: x.detach().to("meta").requires_grad_() for n, x in inputs().items()}
    found = gradients(kg.compile("kda_softplus")(**given, output_final_state=True), given)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in given.items()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_a_graph_break(dynamic):
    op = kg.compile("kda_softplus")

    def layer(state, **given):
        o, end = op(**given, initial_state=state, output_final_state=True)
        return 2 * o, end.sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (70, 100, 20):
        given, state = inputs(shape=(2, tokens, 2, 8, 6), dtype=torch.float32), initial(dtype=torch.float32)
        found, right = (gradients(f(state, **given), given, state) for f in (compiled, layer))
        assert all(torch.equal(found[n], right[n]) for n in right)


def test_torch_export_takes_the_op_of_inference():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.g = kg.compile("retnet"), torch.nn.Parameter(torch.full((2,), 0.9))

        def forward(self, q, k, v):
            return self.op(q, k, v, self.g)[0]

    q, k, v, _ = (x.detach() for x in inputs("retnet", dtype=torch.float32).values())
    layer = Layer()
    exported = torch.export.export(layer, (q, k, v))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert str(layer.op.torch_op) in called and str(layer.op.training_op) not in called
    assert torch.equal(exported.module()(q, k, v), layer(q, k, v))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("keep", ["inputs", "states"])
def test_activation_checkpoints(keep, use_reentrant):
    op, given = kg.compile("kda_softplus", keep=keep), inputs()
    o = checkpoint(lambda *tensors: op(*tensors)[0], *given.values(), use_reentrant=use_reentrant)
    loss(o, None).backward()
    close({n: x.grad for n, x in given.items()}, expected("kda_softplus", given, final=False), 1e-11)


def test_autocast_casts_arguments_a_token():
    given, state = inputs(dtype=torch.float32), initial(dtype=torch.float32)
    op = kg.compile("kda_softplus")
    with torch.autocast("cpu", torch.bfloat16):
        o, end = op(**given, initial_state=state, output_final_state=True)
    cast = {n: x if x.dim() < 3 else x.bfloat16() for n, x in given.items()}
    o_right, end_right = op(**cast, initial_state=state, output_final_state=True)
    assert (o.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, o_right) and torch.equal(end, end_right)
    found = gradients((o, end), given, state)
    assert all(x.dtype == torch.float32 for x in found.values())
    close(found, expected("kda_softplus", {n: x.float() for n, x in cast.items()}, state), 1e-2)


def test_autocast_leaves_gates_that_kernels_take_in_float32():
    seen = {}
    op = kg.compile("kda", gate_dtype="float32")
    with (
        torch.autocast("cpu", torch.float16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: seen.setdefault(len(seen), x.dtype) and x, lambda x: x),
    ):
        op(**inputs("kda", dtype=torch.float32))
    half, single = torch.float16, torch.float32
    assert [seen[i] for i in range(5)] == [half, half, half, single, single]


def test_autocast_leaves_double_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert kg.compile("kda")(**inputs("kda"))[0].dtype == torch.float64


def test_autocast_under_torch_compile():
    op, given = kg.compile("kda_softplus"), inputs(dtype=torch.float32)
    layer = lambda **tensors: op(**tensors)[0]  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(**given)
        right = layer(**given)
    assert found.dtype == torch.bfloat16 and torch.equal(found, right)
    for a, b in zip(gradients((found, None), given).values(), gradients((right, None), given).values()):
        assert torch.equal(a, b)


def test_vmap_calls_the_op_for_each_entry():
    op, given = kg.compile("kda_softplus"), inputs()
    others = list(given.values())[1:]
    q = torch.stack([given["q"].detach(), -given["q"].detach()]).requires_grad_()
    o = torch.func.vmap(lambda q: op(q, *others)[0])(q)
    assert torch.equal(o[0], op(**given)[0]) and torch.equal(o[1], -o[0])
    close(
        {"q": torch.autograd.grad(loss(o[0], None), q)[0][0]},
        {"q": expected("kda_softplus", given, final=False)["q"]},
        1e-11,
    )


def test_vmap_of_gradients():
    op, given = kg.compile("kda_softplus"), inputs()
    o, _ = op(**given)
    d_outs = torch.stack([torch.ones_like(o), torch.linspace(-1, 2, o.numel()).to(o).view(o.shape)]).detach()
    found = torch.func.vmap(lambda d: torch.autograd.grad(o, given["k"], d, retain_graph=True)[0])(d_outs)
    close({"k": found[1]}, {"k": expected("kda_softplus", given, final=False)["k"]}, 1e-11)


# -- what people are told


def test_explain_says_what_is_kept_and_moved():
    text = {keep: " ".join(kg.compile("kda", arch="sm90", keep=keep).explain().split()) for keep in KEEP}
    assert "training keep='states': a forward keeps the state before each chunk on CPU keep states" in text["states"]
    assert "tokens, 4 K V / 64 bytes a token a head in float32: 1,024 where K = 128, V = 128 on GPUs" in text["states"]
    on_gpus = "keep 1,024 bytes a token a head; kernels for sm90 with chunks of 32 tokens move"
    assert f"{on_gpus} {moved('states')}, as modelled" in text["states"]
    assert "on CPU keep 0 bytes a token a head on GPUs keep 0 bytes a token a head;" in text["inputs"]
    assert f"move {moved('inputs')}" in text["inputs"] and f"move {moved('all')}" in text["all"]
    assert "keep states of chunks of 64 tokens, as keep='states' does, 4 K V / 64 bytes" in text["all"]


def moved(keep: str) -> str:
    """As the kernels count it."""
    plan = compile_training(kg.load("kda"), schedule={"keep": keep}).plan()
    bytes_of = {kernel["name"]: kernel["bytes_a_token"] for kernel in plan["kernels"]}
    forward, backward = (sum(bytes_of[n] for n in plan["passes"][p]) for p in ("forward", "backward"))
    return f"{forward:,.0f} (forward) and {backward:,.0f} (backward)"


def test_explain_says_why_there_are_no_kernels_that_train():
    text = " ".join(kg.compile("kda", head_dim=256, arch="sm90").explain().split())
    assert "on GPUs none: head_dim (256, 256)" in text and "4 K V / 64 bytes" in text
