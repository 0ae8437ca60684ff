"""The lowering of a step form: what a decode kernel is made of, and which schedules it takes."""

import ast

import pytest

import kdagen as kg
from kdagen import zoo
from kdagen.pipeline import compile_decode, compile_decode_stages
from kdagen.schedule import DecodeSchedule
from kdagen.state import StateType

GOLDEN = {"kda": {}, "mamba2": {"state": StateType("VK", "bfloat16")}}


@pytest.mark.parametrize("name", GOLDEN)
def test_text_of_the_module(name, golden):
    (kernel,) = compile_decode(zoo.get(name), **GOLDEN[name]).kernels
    golden(f"tilelang_{kernel.name}.txt", kernel.text)


def test_the_plan_has_one_pass():
    made = compile_decode_stages(zoo.get("kda"), schedule={"v_tile": 64}, state=StateType("VK", "bfloat16"))
    plan = made.source.plan()
    assert plan["passes"] == {"decode": ["kda_decode"]} and plan["schedule"] == DecodeSchedule(v_tile=64).fields()
    assert plan["state"] == {"layout": "VK", "dtype": "bfloat16"}
    roles = {tensor["role"]: tensor for tensor in plan["tensors"].values()}
    assert roles["state_pool"]["shape"] == roles["new_state_pool"]["shape"] == ["S", "HV", 128, 128]
    assert roles["state_indices"]["shape"] == ["N", "W"] and roles["num_accepted_tokens"]["shape"] == ["N"]
    assert roles["scalar"]["name"] == "null_below"
    assert made.step.canonical == made.canonical


@pytest.mark.parametrize("head_dim", [64, (128, 64), (64, 256), 256])
@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_traffic_is_the_state_twice_and_little_else(head_dim, dtype, size):
    made = compile_decode_stages(zoo.get("kda"), head_dim, state=StateType("KV", dtype))
    k, v = made.source.dims.values()
    (kernel,) = made.source.kernels
    tiles = v // 32
    assert kernel.bytes_a_token == 2 * k * v * size + 2 * (tiles * (3 * k + 1) + 2 * v)
    if dtype == "float32":
        assert kernel.bytes_a_token < 1.05 * 2 * k * v * size


def test_a_value_that_only_a_sum_reads_is_not_kept_in_the_tile():
    @kg.recurrence
    def of_norm(S, q, k, v, w: kg.Value):
        S = S + kg.outer(k, kg.sum(kg.square(w)) * v)
        return S, S.T @ q

    (kernel,) = compile_decode(of_norm).kernels
    assert "w_f = " not in kernel.text and "T.Parallel(128):\n                        terms1_f[j] = " in kernel.text


def test_arguments_may_have_the_names_of_what_a_block_holds():
    @kg.recurrence
    def awkward(S, t: kg.Key, n: kg.Value, terms: kg.Channel, slot: kg.Key, into: kg.Scalar):
        S = kg.diag(kg.exp(terms)) @ S
        S = S + kg.outer(t, into * (n - S.T @ t))
        return S, S.T @ slot

    (kernel,) = compile_decode(awkward, 64).kernels
    ast.parse(kernel.text)
    allocated = [line.split(" = ")[0].strip() for line in kernel.text.splitlines() if "T.alloc_fragment" in line]
    assert len(set(allocated)) == len(allocated)
