"""The op in training on CUDA tensors, up to the launches: CPU tensors stand for those on a GPU, kernels note what they
are given.

What a launch does is tested in test_build_loader.py, and what kernels compute in tests/simulate.
"""

import uuid

import packages
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdagen as kg
from kdagen.build import builder
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op, compile_training
from kdagen.runtime import loader, torch_op
from kdagen.runtime import op as ops
from kdagen.runtime.package import BuiltOp

NAME, DIMS, SHAPE = "kda_softplus", (64, 64), (2, 70, 3)
KEPT = {"inputs": [], "states": ["S_w"], "all": ["keys_w", "mix32_w", "gamma_w", "S_w"]}
SLOTS = 140 // 32 + 2  # of chunks of 32 tokens, in 2 sequences of 70
GIVEN_ROLES = ("argument", "initial_state", "cu_seqlens", "d_out", "d_final_state")
GIVEN = ["q", "k", "v", "g", "beta", "A_log", "dt_bias"]


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H100, an empty cache and a working directory of its own."""
    monkeypatch.setattr(ops, "_capability", lambda device: "9.0")
    monkeypatch.setattr(torch_op, "identity", lambda *_: uuid.uuid4().hex)
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDAGEN_BUILD_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launches(monkeypatch):
    """Each launch: the kernel's name, and its tensors by name. A kernel fills what it writes with ones."""
    calls = []

    class Kernel:
        def __init__(self, plan, kernel):
            self.plan, self.kernel = plan["tensors"], kernel

        def __call__(self, *tensors):
            given = dict(zip(self.kernel["params"], tensors, strict=True))
            calls.append((self.kernel["name"].removeprefix(f"{NAME}_"), given))
            for name, x in given.items():
                if self.plan[name]["role"] not in (*GIVEN_ROLES, "scalar"):
                    x.fill_(1)

    def functions(self):
        return {kernel["name"]: Kernel(self.plan, kernel) for kernel in self.plan["kernels"]}

    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    return calls


def built(machine, keep="states", out="kdagen_ops"):
    return packages.write(machine / out, compile_training(kg.load(NAME), DIMS, schedule={"keep": keep}), machine)


def fresh(**more):
    """An op that nobody has called yet: here each has an identity of its own."""
    return kg.compile(NAME, head_dim=DIMS, **more)


def inputs(shape=SHAPE, device="cpu") -> dict:
    drawn = kg.zoo.sample(canonical(kg.load(NAME)), (*shape, *DIMS))
    dtypes = {n: torch.float32 if x.dim() < 3 else torch.bfloat16 for n, x in drawn.items()}
    return {n: torch.ones(x.shape, dtype=dtypes[n], device=device) for n, x in drawn.items()}


def forward(op, given, *options):
    return op.training.forward.cuda(*given.values(), *options)


def shares(x, y) -> bool:
    """Whether a kernel was given the memory of an argument."""
    return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def backward(op, given, *rest):
    return dict(zip((*given, "initial_state"), op.training.backward.cuda(*given.values(), *rest)))


# -- launches


@pytest.mark.parametrize("keep", KEPT)
def test_the_forward_pass_is_launched_and_what_the_plan_keeps_is_kept(machine, launches, keep):
    built(machine, keep)
    op, given = fresh(keep=keep), inputs()
    o, state, kept = forward(op, given, torch.zeros(2, 3, *DIMS), True)
    assert [name for name, _ in launches] == ["index", "prepare", "scan"]
    assert (tuple(o.shape), o.dtype) == ((*SHAPE, 64), torch.bfloat16)
    assert (tuple(state.shape), state.dtype) == ((2, 3, *DIMS), torch.float32)
    made = {name: x for _, tensors in launches for name, x in tensors.items()}
    assert len(kept) == len(KEPT[keep]) and all(x is made[name] for x, name in zip(kept, KEPT[keep]))
    assert op.last == "bfloat16 tensors on cpu: kernels in kdagen_ops/kda_softplus/sm90-bf16-64x64-training"


@pytest.mark.parametrize("keep", KEPT)
def test_the_backward_pass_is_given_arguments_what_was_kept_and_cotangents(machine, launches, keep):
    built(machine, keep)
    op, given = fresh(keep=keep), inputs()
    o, state, kept = forward(op, given, torch.ones(2, 3, *DIMS), True)
    launches.clear()
    d_out, d_state = torch.ones_like(o), torch.ones_like(state)
    backward(op, given, torch.ones(2, 3, *DIMS), None, kept, d_out, d_state)
    first = {"inputs": ["prepare", "replay"], "states": ["prepare"], "all": []}[keep]
    assert [name for name, _ in launches] == ["index", *first, "reverse", "gradients"]
    made = {name: x for _, tensors in launches for name, x in tensors.items()}
    assert all(made[name] is x for name, x in zip(KEPT[keep], kept))
    assert shares(made["d_o_in"], d_out) and made["d_final_state"] is d_state
    assert any(shares(x, given["q"]) for _, tensors in launches for x in tensors.values())


def test_gradients_have_the_shapes_and_dtypes_of_arguments_and_parts_are_added_up(machine, launches):
    built(machine)
    op, given = fresh(), inputs()
    o, _, kept = forward(op, given)
    found = backward(op, given, None, None, kept, torch.ones_like(o), None)
    initial = found.pop("initial_state")
    assert (tuple(initial.shape), initial.dtype) == ((2, 3, *DIMS), torch.float32)
    for name, x in found.items():
        parts = 1 if name in GIVEN[:5] else SLOTS  # of a parameter: one a chunk
        assert torch.equal(x, torch.full_like(given[name], parts))


def test_cotangents_that_are_not_given_are_zero(machine, launches):
    built(machine)
    op, given = fresh(), inputs()
    o, state, kept = forward(op, given, None, True)
    launches.clear()
    backward(op, given, None, None, kept, None, torch.ones_like(state))
    backward(op, given, None, None, kept, torch.ones_like(o), None)
    made = [{name: x for _, tensors in part for name, x in tensors.items()} for part in (launches[:4], launches[4:])]
    assert tuple(made[0]["d_o_in"].shape) == (140, 3, 64) and not made[0]["d_o_in"].any()
    assert tuple(made[1]["d_final_state"].shape) == (2, 3, *DIMS) and not made[1]["d_final_state"].any()
    assert made[1]["d_final_state"].dtype == torch.float32


def test_expanded_and_turned_gradients_are_copied(machine, launches):
    built(machine)
    op, given = fresh(), inputs()
    o, state, kept = forward(op, given, None, True)
    launches.clear()
    backward(op, given, None, None, kept, o.new_ones(()).expand(o.shape), torch.ones_like(state).mT)
    given = [x for _, tensors in launches for x in tensors.values()]
    assert all(x.is_contiguous() for x in given if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 70, 3)])
def test_without_tokens_or_sequences_nothing_is_launched(machine, launches, shape):
    built(machine)
    op, given = fresh(), inputs(shape)
    state = torch.ones(shape[0], 3, *DIMS)
    o, final, kept = forward(op, given, state, True)
    found = backward(op, given, state, None, kept, o, 2 * state)
    assert launches == [] and tuple(o.shape) == (*shape, 64) and torch.equal(final, state) and final is not state
    assert [tuple(x.shape) for x in kept] == [(3, shape[0], 64, 64)]  # room for a chunk of each sequence
    assert torch.equal(found.pop("initial_state"), 2 * state)
    assert all(x.shape == given[n].shape and not x.any() for n, x in found.items())


# -- shapes without a GPU


@pytest.mark.parametrize("keep", KEPT)
def test_fake_tensors_give_what_a_launch_gives(machine, launches, keep):
    built(machine, keep)
    op, given = fresh(keep=keep), inputs()
    o, state, kept = forward(op, given, None, True)
    real = [o, state, *kept], [*backward(op, given, None, None, kept, o, state).values()]
    with FakeTensorMode():
        given = inputs(device="cuda")
        o, state, kept = op.training_op(*given.values(), None, True)
        fake = [o, state, *kept], op.backward_op(*given.values(), None, None, kept, o, state)
    for found, right in zip(fake, real):
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in right]
        assert {x.device.type for x in found} == {"cuda"}


def test_shapes_are_known_before_any_kernel_is_built(machine, monkeypatch):
    monkeypatch.setattr(builder, "build_cached", lambda source: pytest.fail("it was built"))
    with FakeTensorMode():
        _, _, (states,) = fresh().training_op(*inputs(device="cuda").values())
    assert (tuple(states.shape), states.dtype) == ((3, SLOTS, 64, 64), torch.bfloat16)


# -- where kernels come from


def test_missing_kernels_are_built_just_in_time_once(machine, launches, monkeypatch):
    made = []

    def build_cached(source):
        made.append(source)
        return packages.write(machine / "made", source, machine)

    monkeypatch.setattr(builder, "build_cached", build_cached)
    op, given = fresh(keep="all", training_schedule={"segment": 4}), inputs()
    o, _, kept = forward(op, given)
    backward(op, given, None, None, kept, o, None)
    assert made == [compile_training(kg.load(NAME), DIMS, schedule={"keep": "all", "segment": 4})]


def test_an_op_of_a_package_trains_as_its_kernels_were_built(machine, launches):
    built(machine, "all", "made_ops")
    packages.write(machine / "made_ops", compile_op(kg.load(NAME), DIMS), machine)
    op, given = BuiltOp(machine / "made_ops" / NAME).load(), inputs()
    *_, kept = forward(op, given)
    assert [name for name, _ in launches] == ["index", "prepare", "scan"] and len(kept) == 4
    launches.clear()
    op._cuda(*given.values())
    assert "S_w" not in {name for _, tensors in launches for name in tensors}
    text = " ".join(op.explain().split())
    assert "training keep='all': a forward keeps the state before each chunk, and all that prepare made" in text
    assert "in training sm90, keep='all' found in" in text


def test_the_build_command_repeats_the_options_of_training(machine):
    kernels = fresh(keep="inputs", training_schedule={"segment": 4}).kernels
    words = "--head-dim 64,64 --keep inputs --training-schedule segment=4"
    assert kernels.command(kernels._likely_target()) == f"kdagen build --arch sm90 --op {NAME} --out DIR {words}"
