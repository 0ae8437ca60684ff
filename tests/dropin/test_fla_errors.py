"""What FLA refuses kdagen.fla refuses, with an error of the same type: real calls of both, on the CPU.

FLA checks before it launches a kernel, so that its refusals are real here too.
"""

import pytest
import torch

import kdagen
import kdagen.fla

B, T, H, HV, K, V = 1, 12, 2, 4, 16, 8
ENDS = torch.tensor([0, 5, 12])


def tensors(batch: int = B, dtype=torch.float32, **others) -> dict:
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV,)}
    return {name: torch.zeros(batch, T, *shape, dtype=dtype) for name, shape in shapes.items()} | others


def gdn(**others) -> dict:
    return tensors(g=torch.zeros(B, T, HV)) | others


def plain(**others) -> dict:
    """q, k and v of one number of heads."""
    return {name: torch.zeros(B, T, H, K) for name in ("q", "k", "v")} | others


def gla(**others) -> dict:
    return plain(g=torch.zeros(B, T, H, K)) | others


def dplr(**others) -> dict:
    return {name: torch.zeros(B, T, H, K) for name in ("q", "k", "v", "a", "b", "gk")} | others


class Context:
    """As much of a context of FLA's parallel calls as its checks look at."""

    cu_seqlens = cu_seqlens_cpu = None


HALF = torch.zeros(B, HV, K, V, dtype=torch.bfloat16)
STATES = torch.zeros(3, HV, K, V)
CALLS = [
    ("chunk_kda", tensors(batch=2, cu_seqlens=ENDS)),
    ("chunk_kda", tensors(initial_state=STATES, cu_seqlens=ENDS)),
    ("chunk_kda", tensors(initial_state=HALF)),
    ("chunk_kda", tensors(use_gate_in_kernel=True)),
    ("chunk_kda", tensors(use_gate_in_kernel=True, safe_gate=True, A_log=torch.zeros(HV))),
    ("chunk_kda", tensors(use_gate_in_kernel=True, safe_gate=True, lower_bound=-6.0, A_log=torch.zeros(HV))),
    ("chunk_kda", tensors(use_gate_in_kernel=True, safe_gate=True, lower_bound=1.0, A_log=torch.zeros(HV))),
    ("chunk_kda", tensors(allow_neg_eigval=True)),
    ("chunk_kda", tensors(chunk_size=48)),
    ("chunk_kda", tensors(state_v_first=True, transpose_state_layout=True)),
    ("chunk_kda", tensors(v=torch.zeros(B, T, 3, V))),
    ("chunk_kda", tensors(k=torch.zeros(B, T, H, 8))),
    ("chunk_kda", tensors(g=torch.zeros(B, T, H, K))),
    ("chunk_kda", tensors(beta=torch.zeros(B, T, H))),
    ("chunk_kda", tensors(cp_context=Context())),
    ("chunk_kda", tensors(surplus=1) | {"q": torch.zeros(B, T, 3, K)}),
    ("chunk_kda", {"q": torch.zeros(B, T, H, K)}),
    ("fused_recurrent_kda", tensors(batch=2, cu_seqlens=ENDS)),
    ("fused_recurrent_kda", tensors(initial_state=STATES, cu_seqlens=ENDS)),
    ("fused_recurrent_kda", tensors(allow_neg_eigval=True)),
    ("fused_recurrent_kda", tensors(state_v_first=True, transpose_state_layout=True)),
    ("chunk_gated_delta_rule", gdn(q=torch.zeros(B, T, 1, K))),
    ("chunk_gated_delta_rule", gdn(v=torch.zeros(B, T, 3, V))),
    ("chunk_gated_delta_rule", gdn(head_first=False)),
    ("chunk_gated_delta_rule", gdn(chunk_size=128)),
    ("chunk_gated_delta_rule", gdn(use_gate_in_kernel=True)),
    ("chunk_gated_delta_rule", gdn(allow_neg_eigval=True)),
    ("chunk_gated_delta_rule", gdn(cp_context=Context())),
    ("chunk_gated_delta_rule", gdn(initial_state=STATES, cu_seqlens=ENDS)),
    ("chunk_gated_delta_rule", gdn(state_v_first=True, transpose_state_layout=True)),
    ("fused_recurrent_gated_delta_rule", gdn(use_gate_in_kernel=True)),
    ("fused_recurrent_gated_delta_rule", gdn(use_gate_in_kernel=True, g=None, A_log=torch.zeros(HV))),
    ("fused_recurrent_gated_delta_rule", gdn(allow_neg_eigval=True)),
    ("fused_recurrent_gated_delta_rule", gdn(initial_state=STATES, cu_seqlens=ENDS)),
    ("chunk_delta_rule", plain(beta=torch.zeros(B, T, H), v=torch.zeros(B, T, H, K).double())),
    ("fused_recurrent_delta_rule", plain(scale=-1.0)),
    ("fused_recurrent_delta_rule", plain(chunk_size=64)),
    ("chunk_gla", gla(initial_state=HALF)),
    ("chunk_gla", gla(g=torch.zeros(B, T, H, 8))),
    ("chunk_gla", gla(v=torch.zeros(B, T, 3, V))),
    ("chunk_gla", gla(head_first=True)),
    ("fused_recurrent_gla", plain(initial_state=STATES, cu_seqlens=ENDS)),
    ("fused_recurrent_gla", plain(state_v_first=True, transpose_state_layout=True)),
    ("chunk_simple_gla", plain(head_first=True)),
    ("chunk_simple_gla", plain(chunk_size=48)),
    ("chunk_simple_gla", plain(initial_state=STATES, cu_seqlens=ENDS)),
    ("fused_recurrent_simple_gla", plain(initial_state=STATES, cu_seqlens=ENDS)),
    ("chunk_retention", plain(head_first=True)),
    ("chunk_linear_attn", plain(initial_state=STATES, cu_seqlens=ENDS)),
    ("chunk_dplr_delta_rule", dplr(head_first=True)),
    ("chunk_dplr_delta_rule", dplr(cp_context=Context())),
    ("chunk_dplr_delta_rule", dplr(initial_state=STATES, cu_seqlens=ENDS)),
    ("fused_recurrent_dplr_delta_rule", dplr(initial_state=STATES, cu_seqlens=ENDS)),
]
NEWER = [  # what 0.5 does not check or not have
    ("chunk_dplr_delta_rule", dplr(lower_bound=1.0)),
]


def raised(function, given: dict) -> Exception:
    with torch.inference_mode(), pytest.raises(Exception) as caught:  # noqa: B017
        function(**given)
    return caught.value


@pytest.mark.filterwarnings("ignore:.*float32:RuntimeWarning")
@pytest.mark.parametrize("name, given", CALLS)
def test_a_call_that_fla_refuses(fla, name, given):
    expected = raised(getattr(fla.ops, name), given)
    found = raised(getattr(kdagen.fla, name), given)
    assert isinstance(found, type(expected))
    assert isinstance(found, (kdagen.KdagenError, TypeError))


@pytest.mark.filterwarnings("ignore:.*float32:RuntimeWarning")
@pytest.mark.parametrize("name, given", NEWER)
def test_a_call_that_newer_releases_refuse(fla, name, given):
    if fla.__version__ == "0.6.0":
        expected = raised(getattr(fla.ops, name), given)
        assert isinstance(raised(getattr(kdagen.fla, name), given), type(expected))
    else:
        assert isinstance(raised(getattr(kdagen.fla, name), given), kdagen.fla.CallError)


@pytest.mark.parametrize("name", ["fused_chunk_gla", "fused_chunk_delta_rule"])
def test_names_that_fla_keeps_only_to_refuse_them_are_not_there(fla, name):
    assert isinstance(raised(getattr(fla.ops, name), {}), NotImplementedError)
    assert not hasattr(kdagen.fla, name)
