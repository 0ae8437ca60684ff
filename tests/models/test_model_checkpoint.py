"""Checkpoints: what is saved is read, in shards or one file; the whole inventory of the released model."""

import json
import subprocess
import sys

import pytest
import torch
from small_models import model, tokens
from test_model_config import RELEASED

from kdagen.models import Config, KimiLinear
from kdagen.models.checkpoint import INDEX, inventory

TOKENS = tokens(1, 20)


def test_the_inventory_of_the_release():
    with torch.device("meta"):
        whole = KimiLinear(Config.of(RELEASED))
    found = inventory(whole)
    assert len(found) == 20493
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 49_122_681_728
    attention = {n.removeprefix("model.layers.0.self_attn."): s for n, s in found.items() if "s.0.self_attn." in n}
    wide = dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight"), (4096, 2304))
    wide |= dict.fromkeys(("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"), (4096, 1, 4))
    wide |= dict.fromkeys(("f_a_proj.weight", "g_a_proj.weight"), (128, 2304))
    wide |= dict.fromkeys(("f_b_proj.weight", "g_b_proj.weight"), (4096, 128))
    wide |= {"b_proj.weight": (32, 2304), "A_log": (1, 1, 32, 1), "dt_bias": (4096,), "o_norm.weight": (128,)}
    assert attention == wide | {"o_proj.weight": (2304, 4096)}
    latent = {n.removeprefix("model.layers.3.self_attn."): s for n, s in found.items() if "s.3.self_attn." in n}
    assert latent == {
        "q_proj.weight": (6144, 2304),
        "kv_a_proj_with_mqa.weight": (576, 2304),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (8192, 512),
        "o_proj.weight": (2304, 4096),
    }
    assert found["model.layers.26.block_sparse_moe.experts.255.w2.weight"] == (2304, 1024)
    assert found["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"] == (256,)
    assert found["model.layers.1.block_sparse_moe.shared_experts.up_proj.weight"] == (1024, 2304)
    cache = whole.to(torch.bfloat16).new_cache(1)
    cache.advance((1,))
    assert cache.bytes == {"states": 40 << 20, "convolutions": 20 * 3 * 3 * 4096 * 2, "latents": 8064}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20000])
def test_what_is_saved_is_read(tmp_path, shard_bytes):
    small = model({"gate_lower_bound": -5.0}, attn_res_block_size=2)
    small.save_pretrained(tmp_path, shard_bytes)
    again = KimiLinear.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS), small(TOKENS))
    assert (tmp_path / INDEX).is_file() == (shard_bytes == 20000)
    if shard_bytes == 20000:
        said = json.loads((tmp_path / INDEX).read_text())
        assert set(said["weight_map"]) == set(inventory(small))
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert files == sorted(set(said["weight_map"].values())) and len(files) > 3
        small.save_pretrained(tmp_path)  # leaves no old shard behind
        assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_dtypes(tmp_path):
    model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        found = KimiLinear.from_pretrained(tmp_path, dtype=dtype)
        wide = ("A_log", "dt_bias", "e_score_correction_bias")
        kinds = {x.dtype for name, x in found.state_dict().items() if not name.endswith(wide)}
        assert kinds == {expected}
        assert {x.dtype for name, x in found.state_dict().items() if name.endswith(wide)} == {torch.float32}
        assert found(TOKENS).isfinite().all()


def test_decays_in_one_dimension(tmp_path):
    """A_log is [1, 1, H, 1] in the release, [H] in others."""
    from safetensors.torch import load_file, save_file

    small = model()
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: x.flatten() if name.endswith("A_log") else x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(KimiLinear.from_pretrained(tmp_path)(TOKENS), small(TOKENS))


def test_parameters_stay_in_float32():
    small = model()
    before = small.model.layers[0].self_attn.A_log.clone()
    small.to(torch.bfloat16).float()
    assert torch.equal(small.model.layers[0].self_attn.A_log, before)
    assert small.double().model.layers[0].self_attn.A_log.dtype == torch.float64


PEAK = """
import sys
from pathlib import Path
import torch
from kdagen.models import KimiLinear

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

KimiLinear.from_pretrained(sys.argv[1])  # what reading any model loads
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = KimiLinear.from_pretrained(sys.argv[2])
print((resident("VmHWM") - before) * 1024 / sum(x.numel() * x.element_size() for x in model.state_dict().values()))
"""


def test_memory(tmp_path):
    """Reading takes the room of the model and of a shard, not of two models."""
    model().save_pretrained(tmp_path / "small")
    large = model({"ratio": None, "num_heads": 16}, hidden_size=512, intermediate_size=2048, num_experts=0)
    large.save_pretrained(tmp_path / "large", 8 << 20)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    assert 0.9 < float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 1.4
