"""Each message that compiling, calling and finding the kernels of an op can give; and that nothing runs before it."""

import re
import uuid

import packages
import pytest
import torch

import kdagen as kg
from kdagen.build import toolchain
from kdagen.derive.canonical import canonical
from kdagen.errors import ArgumentError, ArtefactError, RecurrenceError, TargetError, ToolchainError
from kdagen.ir import canonical_json
from kdagen.pipeline import compile_op
from kdagen.runtime import op as ops
from kdagen.runtime import torch_op
from kdagen.runtime.package import BuiltOp

B, T, H, K, V = 2, 10, 4, 64, 32
Q, VALUE, SCALAR, STATE = (B, T, H, K), (B, T, H, V), (B, T, H), (B, H, K, V)
SHAPES = {"q": Q, "k": Q, "v": VALUE, "g": Q, "beta": SCALAR}


def raises(error, message: str):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


def arguments(**changes) -> dict:
    """Legal arguments of kda, some changed; a tuple stands for a tensor of that shape, None for no argument."""
    given = {**SHAPES, **changes}
    tensors = {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in given.items()}
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.fixture
def never_runs(monkeypatch):
    """Fails if the CPU backend is reached."""
    from kdagen.runtime import cpu, cpu_decode

    for backend in (cpu, cpu_decode):
        monkeypatch.setattr(backend, "run", lambda *_, **__: pytest.fail("it ran"))


# -- names and numbers of arguments

OPTIONS = "initial_state, output_final_state, cu_seqlens, states_every, check"
TAKES = f"kda takes q, k, v, g, beta ({OPTIONS}): "
BINDING = {
    "missing": ((1,), {"g": 1}, TAKES + "missing k, v, beta"),
    "twice": ((1, 2), {"q": 1, "v": 1, "g": 1, "beta": 1}, TAKES + "given twice: q"),
    "unknown": ((1, 2, 3, 4, 5), {"scale": 1}, TAKES + "unknown scale"),
    "too many": ((1, 2, 3, 4, 5, 6), {}, TAKES + "got 6 by place"),
    "several": ((1,), {"q": 2, "w": 3}, TAKES + "missing k, v, g, beta; given twice: q; unknown w"),
}


@pytest.mark.parametrize("case", BINDING)
def test_arguments_that_do_not_bind(case, never_runs):
    args, named, message = BINDING[case]
    with raises(ArgumentError, message):
        kg.compile("kda")(*args, **named)


NOT_TENSORS = {
    "number": (0.5, "kda: beta is a float, expected a tensor (call torch.as_tensor)"),
    "array": (torch.zeros(2).numpy(), "kda: beta is a ndarray, expected a tensor (call torch.as_tensor)"),
    "list": ([1.0], "kda: beta is a list, expected a tensor"),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_what_is_not_a_tensor(case, never_runs):
    value, message = NOT_TENSORS[case]
    with raises(ArgumentError, message):
        kg.compile("kda")(**arguments(beta=value))


def test_a_state_that_is_not_a_tensor(never_runs):
    with raises(ArgumentError, "kda: initial_state is a float, expected a tensor (call torch.as_tensor)"):
        kg.compile("kda")(**arguments(), initial_state=0.0)


SEQUENCES = {
    "list": (
        [torch.zeros(Q)],
        "deltaproduct: k is a list of 1 tensors, expected a list of 2, or one tensor [B, T, 2, H, K]",
    ),
    "one": (
        torch.zeros(Q),
        "deltaproduct: k has shape [2, 10, 4, 64], expected a list of 2, or one tensor [B, T, 2, H, K]",
    ),
    "three": (
        torch.zeros(B, T, 3, H, K),
        "deltaproduct: k has shape [2, 10, 3, 4, 64], expected a list of 2, or one tensor [B, T, 2, H, K]",
    ),
    "number": (
        1.0,
        "deltaproduct: k is a float, expected a list of 2, or one tensor [B, T, 2, H, K] (call torch.as_tensor)",
    ),
    "in it": ([torch.zeros(Q), None], "deltaproduct: k_2 is a NoneType, expected a tensor"),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences(case, never_runs):
    k, message = SEQUENCES[case]
    v, s = torch.zeros(VALUE), torch.zeros(SCALAR)
    with raises(ArgumentError, message):
        kg.compile("deltaproduct")(torch.zeros(Q), k, [v, v], [s, s], s)


def test_a_sequence_of_which_one_is_missing(never_runs):
    v, s = torch.zeros(VALUE), torch.zeros(SCALAR)
    takes = f"deltaproduct takes q, k, v, beta, g ({OPTIONS}): missing k_2"
    with raises(ArgumentError, takes):
        kg.compile("deltaproduct")(torch.zeros(Q), k_1=torch.zeros(Q), v=[v, v], beta=[s, s], g=s)


# -- shapes

SHAPE = {
    "rank": ({"beta": (B, T, H, 1)}, "kda: beta has shape [2, 10, 4, 1] of 4 dimensions, expected 3, [B, T, HV]"),
    "K": (
        {"k": (B, T, H, 32)},
        "kda: k has shape [2, 10, 4, 32], expected [B, T, H, K] = [2, 10, 4, 64]: K = 64 is set by q",
    ),
    "B and T": (
        {"v": (1, 9, H, V)},
        "kda: v has shape [1, 9, 4, 32], expected [B, T, HV, V] = [2, 10, 4, 32]: "
        "B = 2 is set by q, T = 10 is set by q",
    ),
    "keys of two kinds": (
        {"k": (B, T, 2, K)},
        "kda: k has shape [2, 10, 2, 64], expected [B, T, H, K] = [2, 10, 4, 64]: H = 4 is set by q. "
        "For grouped heads pass k.repeat_interleave(2, dim=2)",
    ),
    "values of two kinds": (
        {"v": (B, T, 1, V)},
        "kda: g has shape [2, 10, 4, 64], expected [B, T, HV, K] = [2, 10, 1, 64]: HV = 1 is set by v. "
        "For grouped heads pass v.repeat_interleave(4, dim=2)",
    ),
    "heads": (
        {"beta": (B, T, 3)},
        "kda: beta has shape [2, 10, 3], expected [B, T, HV] = [2, 10, 4]: HV = 4 is set by v",
    ),
    "no multiple": (
        {"q": (B, T, 3, K), "k": (B, T, 3, K)},
        "kda: v has 4 heads, q has 3: expected the number of value heads (HV) to be a multiple of that of key heads "
        "(H), each of which serves HV // H of them",
    ),
    "no key heads": (
        {"q": (B, T, 0, K), "k": (B, T, 0, K)},
        "kda: v has 4 heads, q has 0: expected the number of value heads (HV) to be a multiple of that of key heads "
        "(H), each of which serves HV // H of them",
    ),
    "state": (
        {"initial_state": (B, H, K, K)},
        "kda: initial_state has shape [2, 4, 64, 64], expected [N, HV, K, V] = [2, 4, 64, 32]: V = 32 is set by v",
    ),
    "states": (
        {"initial_state": (3, H, K, V)},
        "kda: initial_state has shape [3, 4, 64, 32], expected [N, HV, K, V] = [2, 4, 64, 32]: "
        "N = 2 is set by q (N = B without cu_seqlens)",
    ),
    "state's rank": (
        {"initial_state": (H, K, V)},
        "kda: initial_state has shape [4, 64, 32] of 3 dimensions, expected 4, [N, HV, K, V]",
    ),
}


@pytest.mark.parametrize("case", SHAPE)
def test_shapes(case, never_runs):
    changes, message = SHAPE[case]
    with raises(ArgumentError, message):
        kg.compile("kda")(**arguments(**changes))


def test_shapes_are_checked_when_torch_compiles_too():
    op = kg.compile("kda")
    layer = torch.compile(lambda **given: op(**given)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="K = 64 is set by q"):
        layer(**arguments(k=(B, T, H, 32)))


def test_the_torch_op_checks_by_itself(never_runs):
    torch_op = kg.compile("kda").torch_op
    with raises(ArgumentError, "kda: g has shape [2, 10, 4] of 3 dimensions, expected 4, [B, T, HV, K]"):
        torch_op(*arguments(g=SCALAR).values())


# -- dtypes and devices


def zeros(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


DTYPES = {
    "integers": (
        {"v": zeros(VALUE, torch.int64)},
        "kda: v is int64, expected bfloat16, float16, float32 or float64: call v.float()",
    ),
    "half beside single": (
        {"g": zeros(Q, torch.float16)},
        "kda: g is float16 beside v in float32, expected float32: call g.to(torch.float32)",
    ),
    "two halves": (
        {"v": zeros(VALUE, torch.bfloat16), "beta": zeros(SCALAR, torch.float16)},
        "kda: beta is float16 beside v in bfloat16, expected bfloat16 or float32: call beta.to(torch.bfloat16)",
    ),
    "double": (
        {"k": zeros(Q, torch.float64)},
        "kda: k is float64 beside v in float32, expected float32: call k.to(torch.float32)",
    ),
    "half state": (
        {"initial_state": zeros(STATE, torch.bfloat16)},
        "kda: initial_state is bfloat16, expected float32: call initial_state.to(torch.float32)",
    ),
    "single state": (
        {**{n: zeros(s, torch.float64) for n, s in SHAPES.items()}, "initial_state": zeros(STATE, torch.float32)},
        "kda: initial_state is float32, expected float64: call initial_state.to(torch.float64)",
    ),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtypes(case, never_runs):
    changes, message = DTYPES[case]
    with raises(ArgumentError, message):
        kg.compile("kda")(**arguments(**changes))


def test_devices(never_runs):
    with raises(ArgumentError, "kda: beta is on meta, v on cpu; expected one device: call beta.to('cpu')"):
        kg.compile("kda")(**arguments(beta=torch.zeros(SCALAR, device="meta")))
    with raises(
        ArgumentError, "kda: initial_state is on meta, v on cpu; expected one device: call initial_state.to('cpu')"
    ):
        kg.compile("kda")(**arguments(initial_state=torch.zeros(STATE, device="meta")))


# -- compile

CHOICES = {
    "head dims": (
        {"head_dim": (64, 64, 64)},
        ArgumentError,
        "head_dim = (64, 64, 64): expected K or (K, V), such as 128 or (128, 64)",
    ),
    "head dim": ({"head_dim": 0}, ArgumentError, "head_dim = 0: expected K or (K, V), such as 128 or (128, 64)"),
    "dtype": (
        {"dtype": torch.float32},
        ArgumentError,
        "dtype = 'float32': expected one of bfloat16, float16. It is that of the GPU kernels: on the CPU an op takes "
        "float32 and float64 tensors too, whatever dtype it was compiled for",
    ),
    "gate dtype": (
        {"gate_dtype": "int8"},
        ArgumentError,
        "gate_dtype = 'int8': expected one of bfloat16, float16, float32",
    ),
    "arch": (
        {"arch": "sm70"},
        TargetError,
        "unknown arch 'sm70': expected one of sm80, sm89, sm90, sm100, sm120, gfx942",
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choices(case):
    choice, error, message = CHOICES[case]
    with raises(error, message):
        kg.compile("kda", **choice)


def test_an_argument_with_a_name_that_every_op_takes():
    @kg.recurrence
    def plain(S, q, k, v, initial_state: kg.Scalar):
        S = S + kg.outer(k, initial_state * v)
        return S, S.T @ q

    message = "recurrence 'plain': every op has an option initial_state: rename this argument"
    with raises(RecurrenceError, message):
        kg.compile(plain)


def test_a_stored_recurrence_with_a_function_that_is_not_ours():
    form = canonical_json.to_json(canonical(kg.load("kda")))
    form["decay"] = ["system", "g"]
    with pytest.raises(ArtefactError, match="unknown function 'system' in a stored recurrence: expected Add, Mul"):
        canonical_json.from_json(form)


# -- kernels


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """CPU tensors stand for those on an H100; no kernel was ever built. Returns op._cuda on legal arguments."""
    monkeypatch.setattr(ops, "_capability", lambda device: "9.0")
    monkeypatch.setattr(torch_op, "identity", lambda *_: uuid.uuid4().hex)  # an op that nobody has called yet
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDAGEN_BUILD_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(op, dtype=torch.bfloat16, **changes):
        shapes = {n: s if s == SCALAR else (*s[:3], 64) for n, s in SHAPES.items()}
        given = {n: torch.zeros(changes.get(n, s), dtype=dtype) for n, s in shapes.items()}
        return op._cuda(*given.values())

    return call


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolchain, "_candidates", lambda tool: iter(()))
    toolchain.find_nvcc.cache_clear()
    yield
    toolchain.find_nvcc.cache_clear()


def fresh(**options):
    return kg.compile("kda", **{"head_dim": 64, **options})


def test_no_kernels_and_no_nvcc(gpu, no_nvcc, tmp_path):
    packages.write(tmp_path / "kdagen_ops", compile_op(kg.load("kda"), 64, arch="sm80"), tmp_path)
    with pytest.raises(ToolchainError) as error:
        gpu(fresh())
    text = str(error.value)
    assert text.startswith(f"kda: no kernels for sm90 in kdagen_ops and {tmp_path / 'cache' / 'ops'}")
    assert "(kdagen_ops/kda holds sm80-bf16-64x64), and none can be built here: no nvcc found" in text
    assert "pip install 'kdagen[cuda]'" in text
    assert "pass build_dir=DIR to kg.compile (or set KDAGEN_BUILD_DIR)" in text
    assert text.endswith("  kdagen build --arch sm90 --op kda --out DIR --head-dim 64,64")


def test_explain_says_that_kernels_are_missing(gpu, no_nvcc):
    text = " ".join(fresh().explain().split())
    assert "an error at the first call, for there is no nvcc; kdagen build --arch sm90 --op kda --out DIR" in text


def test_another_gpu_than_the_arch_that_was_asked_for(gpu, tmp_path):
    packages.write(tmp_path / "kdagen_ops", compile_op(kg.load("kda"), 64, arch="sm80"), tmp_path)
    message = (
        "kda: compiled for sm80 (compute capability 8.0), but the GPU has 9.0; kdagen_ops/kda holds sm80-bf16-64x64. "
        "Expected arch='sm90', or leave arch out"
    )
    with raises(TargetError, message):
        gpu(fresh(arch="sm80"))


def test_a_gpu_that_kdagen_does_not_compile_for(gpu, monkeypatch):
    monkeypatch.setattr(ops, "_capability", lambda device: "7.5")
    known = "8.0 (A100), 8.9 (RTX 4090, L40S), 9.0 (H100, H200), 10.0 (B200), 12.0 (RTX 5090)"
    with raises(TargetError, f"kda: kdagen does not compile for compute capability 7.5: expected one of {known}"):
        gpu(fresh())
    message = (
        "kda: compiled for sm90 (compute capability 9.0), but the GPU has 7.5; kdagen_ops/kda holds nothing. "
        "Expected another GPU"
    )
    with raises(TargetError, message):
        gpu(fresh(arch="sm90"))


FIX = "Convert it, or compile for it: kg.compile(..., head_dim=(K, V), dtype=..., gate_dtype=...) gives"


def test_arguments_that_the_kernels_do_not_take_are_refused_before_anything_is_built(gpu):
    with raises(ArgumentError, f"kda: q is float16, expected bfloat16. {FIX} sm90-bf16-64x64 now"):
        gpu(fresh(), torch.float16)
    wide = {name: (B, T, H, 128) for name in ("q", "k", "g")}
    message = f"kda: q has shape [2, 10, 4, 128], expected [B, T, H, 64]. {FIX} sm90-bf16-64x64 now"
    with raises(ArgumentError, message):
        gpu(fresh(), **wide)


def test_a_corrupt_kernel_is_not_launched(gpu, tmp_path):
    place = packages.write(tmp_path / "kdagen_ops", compile_op(kg.load("kda"), 64), tmp_path)
    (place / "kda_scan.so").write_text("something else")
    with pytest.raises(ArtefactError, match="kda_scan.so is corrupt or was edited"):
        gpu(fresh())


# -- the op of a package


def test_a_package_whose_folders_disagree(tmp_path):
    packages.write(tmp_path / "out", compile_op(kg.load("kda"), 64, arch="sm80"), tmp_path)

    @kg.recurrence(name="kda")
    def other(S, q, k, v, g, beta):
        S = kg.diag(kg.exp(g)) @ S + kg.outer(k, beta * v)
        return S, S.T @ q

    packages.write(tmp_path / "out", compile_op(other, 64, arch="sm90"), tmp_path)
    message = (
        f"{tmp_path / 'out' / 'kda'}: sm80-bf16-64x64, sm90-bf16-64x64 do not say that they compute one and the same "
        "recurrence: rebuild all of them with `kdagen build --op kda`"
    )
    with raises(ArtefactError, message):
        BuiltOp(tmp_path / "out" / "kda")(**arguments())


def test_a_damaged_op_says_so_at_its_call(tmp_path):
    place = packages.write(tmp_path / "out", compile_op(kg.load("kda"), 64), tmp_path)
    (place / "manifest.json").write_text("{")
    op = BuiltOp(tmp_path / "out" / "kda")
    with pytest.raises(ArtefactError, match="is not a manifest of kdagen"):
        op(**arguments())
