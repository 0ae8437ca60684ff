"""Messages of kdagen.fla: what was given, what was expected. Types of errors against FLA's own are in tests/dropin."""

import logging

import pytest
import torch

import kdagen
from kdagen import fla

B, T, H, HV, K, V = 1, 12, 2, 4, 16, 8


def kda(**others) -> dict:
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV,)}
    return {name: torch.zeros(B, T, *shape) for name, shape in shapes.items()} | others


def gdn(**others) -> dict:
    return kda(g=torch.zeros(B, T, HV)) | others


def plain(*more: str, **others) -> dict:
    return {name: torch.zeros(B, T, H, K) for name in ("q", "k", "v", *more)} | others


ENDS = torch.tensor([0, 5, 12])
CASES = [
    (fla.chunk_kda, kda(q=torch.zeros(B, T, K)), r"q has shape \[1, 12, 16\] and k \[1, 12, 2, 16\]: expected the sa"),
    (fla.chunk_gla, plain("g", q=torch.zeros(1)), r"q, k and g have shapes .*: expected one, \[B, T, H, K\]"),
    (fla.chunk_linear_attn, plain(q=torch.zeros(B, T, K)), r"q has shape \[1, 12, 16\]: expected \[B, T, H, K\]"),
    (fla.chunk_kda, kda(v=torch.zeros(B, T, 3, V)), "v has 3 heads, q and k 2: expected a multiple of them"),
    (fla.chunk_kda, kda(state_v_first=True, transpose_state_layout=True), "are one option, under its new and its old"),
    (fla.chunk_kda, kda(head_first=False), r"head_first was removed: expected tensors as \[B, T, H, \.\.\.\]"),
    (fla.chunk_kda, kda(chunk_size=16), "chunk_size = 16: expected one of 32, 64"),
    (fla.chunk_gdn, gdn(chunk_size=128), "chunk_size = 128: expected one of 16, 32, 64"),
    (fla.chunk_simple_gla, plain(chunk_size=48), "chunk_size = 48: expected a power of 2"),
    (fla.chunk_kda, kda(cp_context=object()), "cp_context: sequences split over devices are not served by kdagen"),
    (fla.chunk_kda, kda(initial_state=torch.zeros(B, HV, K, V).half()), "initial_state is torch.float16: expected fl"),
    (fla.chunk_kda, kda(allow_neg_eigval=True), "doubles sigmoid.beta.: expected use_beta_sigmoid_in_kernel=True too"),
    (
        fla.chunk_kda,
        kda(use_gate_in_kernel=True, A_log=torch.zeros(H)),
        r"A_log has shape \[2\]: expected 4 elements, \[4\]",
    ),
    (
        fla.chunk_kda,
        kda(use_gate_in_kernel=True, A_log=torch.zeros(HV), dt_bias=torch.zeros(HV)),
        r"dt_bias has shape \[4\]: expected 64 elements, \[4, 16\]",
    ),
    (fla.chunk_kda, kda(use_gate_in_kernel=True), r"needs A_log \(HV elements\), unless there is a lower_bound"),
    (fla.fused_recurrent_kda, kda(use_gate_in_kernel=True), r"needs A_log \(HV elements\), unless there is a lower_b"),
    (
        fla.chunk_kda,
        kda(use_gate_in_kernel=True, safe_gate=True, lower_bound=-7.0),
        r"lower_bound = -7.0: expected one in \[-5, 0\) with safe_gate=True",
    ),
    (
        fla.chunk_kda,
        kda(use_graph=True, max_num_seqs=4, cu_seqlens=ENDS),
        "max_num_seqs = 4 and cu_seqlens of 2 sequences: expected as many, the last ones empty",
    ),
    (fla.chunk_kda, kda(return_intermediate_states=True), r"needs torch.inference_mode\(\) and disable_recompute=Fa"),
    (fla.chunk_kda, kda(cu_seqlens=ENDS, initial_state=torch.zeros(3, HV, K, V)), "initial_state"),
    (fla.chunk_gdn, gdn(use_gate_in_kernel=True), "needs A_log, an element for each value head"),
    (fla.chunk_gdn, gdn(beta=torch.zeros(B, T, HV, V)), r"beta has shape \[1, 12, 4, 8\]: expected one a head"),
    (fla.fused_recurrent_gdn, gdn(gv=torch.zeros(B, T, HV, V)), "gv: decay of value channels is outside kdagen's fam"),
    (fla.fused_recurrent_gdn, gdn(g=None, use_gate_in_kernel=True), "needs g, which the gate is computed from"),
    (
        fla.fused_recurrent_gdn,
        gdn(gk=torch.zeros(B, T, HV, K), use_gate_in_kernel=True, A_log=torch.zeros(HV)),
        "gk beside a gate computed in the kernel is not served: compute the gate before, as g",
    ),
    (
        fla.chunk_delta_rule,
        plain(beta=torch.zeros(B, T, H), v=torch.zeros(B, T, H, K).half()),
        "q, k and v are torch.float32, torch.float32 and torch.float16: expected one dtype",
    ),
    (fla.fused_recurrent_delta_rule, plain(scale=0.0), "scale = 0.0: expected a positive one"),
    (fla.fused_recurrent_gla, plain(gv=torch.zeros(B, T, H, K)), "gv: decay of value channels .* expected gk alone"),
    (
        fla.chunk_dplr_delta_rule,
        plain("a", "b", "gk", lower_bound=0.5),
        "lower_bound = 0.5: expected a negative one, as gk is a log decay",
    ),
]


@pytest.mark.parametrize("function, given, message", CASES)
def test_message(function, given, message):
    with pytest.raises(fla.CallError, match=message) as caught:
        function(**given)
    assert isinstance(caught.value, (kdagen.ArgumentError, ValueError, AssertionError))


def test_what_the_op_refuses_is_an_error_of_a_call():
    with pytest.raises(fla.CallError, match="g"):
        fla.chunk_kda(**kda(g=torch.zeros(B, T, HV, 5)))


def test_unknown_options_are_ignored_as_fla_does_and_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="kdagen"):
        fla.chunk_kda(**kda(surplus=1, other=2))
    assert "chunk_kda ignores other, surplus" in caplog.text


def test_options_that_raise_like_fla():
    with pytest.raises(DeprecationWarning):
        fla.chunk_kda(**kda(head_first=True))
    with pytest.raises(NotImplementedError):
        fla.fused_recurrent_gla(**plain(gv=torch.zeros(B, T, H, K)))
