"""kdagen as a backend of real releases of FLA: FLA's own functions, through FLA's own dispatcher, on the CPU."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import kdagen.fla
from kdagen.fla import backend

B, T, H, HV, K, V = 2, 20, 2, 4, 16, 8


@pytest.fixture
def served(fla, monkeypatch):
    """FLA with kdagen registered; without it again after the test."""
    monkeypatch.delenv("FLA_KDAGEN", raising=False)
    assert kdagen.fla.register()
    yield fla
    for registry in registries(fla):
        registry._backends.pop("kdagen", None)


def registries(fla) -> list:
    """Every registry that holds kdagen."""
    if fla.__version__ == "0.6.0":
        found = [*fla.backends._operation_registries.values(), *fla.backends._function_registries.values()]
    else:
        found = list(fla.ops.backends.BackendRegistry._registries.values())
    return [registry for registry in found if "kdagen" in registry._backends]


def kda_inputs(**others) -> dict:
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(B, T, HV, V),
        "g": -torch.rand(B, T, HV, K),
        "beta": torch.rand(B, T, HV),
        **others,
    }


def near(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_where_it_is_registered(served):
    names = {registry.operation_name for registry in registries(served)}
    if served.__version__ == "0.6.0":
        simple = {f"fla.ops.simple_gla.{which}" for which in ("fused_chunk", "fused_recurrent")}
        assert names == {"kda", "gated_delta_rule", "generalized_delta_rule.dplr", "fla.ops.kda.chunk", *simple}
    else:
        assert names == {"kda", "gated_delta_rule"}
    for registry in registries(served):
        assert registry._get_sorted_backends()[0].backend_type in ("kdagen", "triton_ascend")


def test_chunk_kda_of_fla_is_kdagens(served, caplog):
    x = kda_inputs(initial_state=torch.randn(B, HV, K, V), output_final_state=True)
    expected = served.ops.kda.naive.naive_recurrent_kda(**x)
    x["q"].requires_grad_()
    with caplog.at_level(logging.INFO, logger="kdagen"):
        o, final = served.ops.chunk_kda(**x)
    near((o, final), expected)
    o.sum().backward()
    assert x["q"].grad.norm() > 0


def test_other_functions_of_fla(served):
    x = kda_inputs()
    q, k, v, beta = x["q"], x["k"], x["v"][:, :, :H], x["beta"][:, :, :H]
    g = x["g"][:, :, :H]
    naive = served.ops.gated_delta_rule.naive_recurrent_gated_delta_rule
    expected = naive(q, k, v, beta, g[..., 0], output_final_state=True)
    near(served.ops.chunk_gated_delta_rule(q, k, v, g[..., 0], beta, output_final_state=True), expected)
    if served.__version__ != "0.6.0":
        return
    near(
        served.ops.fused_recurrent_kda(**x, output_final_state=True),
        served.ops.kda.naive.naive_recurrent_kda(**x, output_final_state=True),
    )
    expected = served.ops.simple_gla.naive.naive_recurrent_simple_gla(q, k, v, g[..., 0])
    for name in ("fused_chunk_simple_gla", "fused_recurrent_simple_gla"):
        near(getattr(served.ops, name)(q, k, v, g[..., 0], output_final_state=True), expected)
    given = (q, k, v, -k, k * beta.unsqueeze(-1), g)
    naive = served.ops.generalized_delta_rule.dplr.naive.dplr_recurrence
    o, final = naive(*(y.transpose(1, 2) for y in given))
    near(served.ops.chunk_dplr_delta_rule(*given, output_final_state=True), (o.transpose(1, 2), final))


@pytest.mark.parametrize("fla", ["0.6.0"], indirect=True)  # 0.5 does not dispatch it
def test_state_in_place_below_flas_checks(served):
    x = kda_inputs(initial_state=torch.randn(B, HV, K, V))
    expected = served.ops.kda.naive.naive_recurrent_kda(**x, output_final_state=True)
    out = torch.empty(B, T, HV, V)
    o, final = served.ops.kda.fused_recurrent.fused_recurrent_kda_fwd(**x, out=out)
    assert o is out and final is x["initial_state"]
    near((o, final), expected)


def test_flas_switch_turns_it_off(served, monkeypatch):
    monkeypatch.setenv("FLA_KDAGEN", "0")
    assert not any(registry._backends["kdagen"].is_enabled() for registry in registries(served))
    with pytest.raises(Exception) as caught:  # noqa: B017
        served.ops.chunk_kda(**kda_inputs())
    assert not isinstance(caught.value, kdagen.KdagenError)  # FLA went its own way, to a kernel that needs a GPU


def test_what_it_refuses_goes_the_way_it_went_before(served):
    chosen = registries(served)[0]._backends["kdagen"]
    context = type("Context", (), {"cu_seqlens": None, "cu_seqlens_cpu": None})()
    verdict = chosen.verify("chunk_kda", **kda_inputs(), cp_context=context)
    assert verdict == (False, "kdagen does not serve cp_context")
    accepted, reason = chosen.verify("chunk_kda", torch.zeros(1))
    assert not accepted and "missing a required argument" in reason
    assert chosen.verify("chunk_kda", **kda_inputs()) == (True, None)
    with pytest.raises(AssertionError, match="cu_seqlens is required for CP"):
        served.ops.chunk_kda(**kda_inputs(), cp_context=context)


class Tensor:
    """What a verifier looks at, on a device that is not there."""

    requires_grad = False

    def __init__(self, dim: int = 128, dtype=torch.bfloat16, device="cuda:0", requires_grad=False):
        self.shape, self.dtype, self.device = (1, 8, 2, dim), dtype, torch.device(device)
        self.requires_grad = requires_grad

    def is_floating_point(self):
        return self.dtype.is_floating_point


@pytest.mark.parametrize(
    "capability, q, v, expected",
    [
        ((9, 0), Tensor(), Tensor(), None),
        ((8, 0), Tensor(64), Tensor(256), None),
        ((9, 0), Tensor(256, requires_grad=True), Tensor(128), "train up to K x V = 128 x 128, not 256 x 128"),
        ((9, 0), Tensor(96), Tensor(), "head dims of (64, 128, 256), not (96, 128)"),
        ((9, 0), Tensor(), Tensor(dtype=torch.float32), "take torch.bfloat16 or torch.float16, not torch.float32"),
        ((7, 0), Tensor(), Tensor(), "no kernels for cuda:0"),
        ((9, 0), Tensor(device="xpu:0"), Tensor(device="xpu:0"), "no kernels for xpu:0"),
        ((9, 0), Tensor(dtype=torch.int32, device="cpu"), Tensor(), "takes floating point, not torch.int32"),
    ],
)
def test_verdict_for_a_gpu(monkeypatch, capability, q, v, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    accepted, reason = backend._runs({"q": q, "v": v})
    assert accepted == (expected is None)
    assert reason is None if expected is None else expected in reason


def test_without_fla_nothing_happens():
    code = "import kdagen.fla, sys; assert not kdagen.fla.register(); assert not {'fla', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_an_fla_that_cannot_be_imported_is_left_alone(tmp_path, caplog, monkeypatch):
    (tmp_path / "fla" / "ops" / "kda").mkdir(parents=True)
    for folder in ("fla", "fla/ops", "fla/ops/kda"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "fla" / "ops" / "kda" / "__init__.py").write_text("import triton_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    assert not kdagen.fla.register()
    assert "not a backend of the FLA that is installed: ModuleNotFoundError" in caplog.text
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
