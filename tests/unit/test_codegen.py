"""Generated TileLang: readable text, user skeletons first, no name of the user's lost or clashing."""

import ast

import pytest

import kdagen as kg
from kdagen import zoo
from kdagen.pipeline import compile_op


@pytest.mark.parametrize("name", zoo.names())
def test_modules_parse_and_carry_their_equations(name):
    for kernel in compile_op(zoo.get(name)).kernels:
        ast.parse(kernel.text)
        assert kernel.text.startswith(f'"""{kernel.name}: ')
        products = kernel.text.count("gemm(")
        assert (products > 0) == (kernel.family != "index") and kernel.text.count("            # ") >= max(products, 1)


GOLDEN = {
    "kda": {},
    "kda_bounded": {},
    "dplr": {"arch": "sm80"},
    "deltaproduct": {"arch": "sm120", "head_dim": (64, 128)},
    "gated_deltanet": {"schedule": {"output": "split", "chunk_size": 64}},
    "mamba2": {"dtype": "float16", "gate_dtype": "float32"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_text_of_the_modules(name, golden):
    """A refactoring may claim that no kernel changed only if these did not."""
    for kernel in compile_op(zoo.get(name), **GOLDEN[name]).kernels:
        golden(f"tilelang_{kernel.name}.txt", kernel.text)


def test_text_of_the_kernels_of_a_split(golden):
    """Prepare stays what it is."""
    kernels = {k.family: k for k in compile_op(zoo.get("kda"), schedule={"split": 8}).kernels}
    for family in ("ends", "transitions", "carry"):
        golden(f"tilelang_kda_split_{family}.txt", kernels[family].text)
    assert kernels["prepare"] in compile_op(zoo.get("kda")).kernels


def test_the_same_recurrence_gives_the_same_text():
    first, second = (compile_op(zoo.get("kda")) for _ in range(2))
    assert [k.text for k in first.kernels] == [k.text for k in second.kernels]


def test_a_users_skeleton_comes_first(tmp_path):
    shipped = compile_op(zoo.get("kda"))
    own = tmp_path / "prepare.py.j2"
    own.write_text('{% import "macros.j2" as m with context %}# mine: {{ kernel.name }}\n')
    overridden = compile_op(zoo.get("kda"), template_folders=[tmp_path])
    assert [k.family for k in overridden.kernels] == ["index", "prepare", "scan"]
    assert overridden.kernels[1].text == "# mine: kda_prepare\n"
    assert [overridden.kernels[i].text for i in (0, 2)] == [shipped.kernels[i].text for i in (0, 2)]


def test_a_users_skeleton_may_have_a_new_name(tmp_path):
    (tmp_path / "eager.py.j2").write_text("# {{ kernel.threads }} threads\n")
    op = compile_op(zoo.get("kda"), schedule={"scan_skeleton": "eager"}, template_folders=[tmp_path])
    assert op.kernels[2].text == "# 256 threads\n"


def test_arguments_may_have_the_names_of_indices():
    @kg.recurrence
    def awkward(S, i: kg.Key, j: kg.Value, h: kg.Channel, n: kg.Key, b: kg.Scalar):
        S = kg.diag(kg.exp(h)) @ S
        S = S + kg.outer(i, b * (j - S.T @ i))
        return S, S.T @ n

    for kernel in compile_op(awkward, 64).kernels:
        ast.parse(kernel.text)
        names = [p.name for p in kernel.params]
        assert len(set(names)) == len(names)


def test_the_plan_lists_tensors_once_and_models_traffic():
    plan = compile_op(zoo.get("kda")).plan()
    assert [k["name"] for k in plan["kernels"]] == ["kda_index", "kda_prepare", "kda_scan"]
    shapes = {name: tensor["shape"] for name, tensor in plan["tensors"].items()}
    assert shapes["q"] == ["T", "H", 128] and shapes["v"] == ["T", "HV", 128] and shapes["beta"] == ["T", "HV"]
    assert shapes["keys_w"][:2] == ["HV", "NC"] and shapes["chunk_rows"] == ["NC", 2] and shapes["every"] == []
    assert 1282 < sum(k["bytes_a_token"] for k in plan["kernels"]) <= 3100


def test_a_docstring_of_the_users_cannot_break_the_module():
    @kg.recurrence
    def odd(S, q, k, v):
        r'''S_t = S_{t-1} + k v^T, \beta = """1"""'''
        return S + kg.outer(k, v), (S + kg.outer(k, v)).T @ q

    for kernel in compile_op(odd, 64).kernels:
        assert "\\beta = '''1'''" in ast.get_docstring(ast.parse(kernel.text))
