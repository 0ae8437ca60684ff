"""examples/cache_and_speed.py: what it counts is what the equations say, what it measures is consistent."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdagen.models import Config, LinearAttention

SCRIPT = Path(__file__).parents[2] / "examples" / "cache_and_speed.py"
MIB = 1 << 20


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("cache_and_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(tokens: int, linear: int, full: int) -> int:
    """Bytes in bfloat16: states in float32, three past inputs of q, k and v, latents and the shared key of a token."""
    return linear * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2) + full * tokens * (512 + 64) * 2


def test_the_released_models_caches(example):
    lengths = (0, 1, 1000, 1 << 20)
    found = example.counted(Config(), lengths, torch.bfloat16)
    assert [(r["hybrid"], r["full"]) for r in found["rows"]] == [
        (by_hand(t, 20, 7), by_hand(t, 0, 27)) for t in lengths
    ]
    assert found["a_token"] == {"hybrid": 8064, "full": 31104}
    assert round(-100 * found["saved_a_token"], 1) == -74.1
    assert found["states"] == 40 * MIB
    even = found["even_at_tokens"]
    assert by_hand(int(even), 20, 7) > by_hand(int(even), 0, 27)
    assert by_hand(int(even) + 1, 20, 7) < by_hand(int(even) + 1, 0, 27)


def test_what_a_step_reads(example):
    """All parameters that a token uses, once for all sequences; of the embedding, a row each."""
    c = replace(example.SMALL, tie_word_embeddings=False)
    model = example.on_meta(c, torch.float32)
    size = {name: 4 * x.numel() for name, x in model.state_dict().items()}
    experts = sum(n for name, n in size.items() if ".experts." in name)
    others = sum(size.values()) - experts - size["model.embed_tokens.weight"]
    kept = sum(example.cache_bytes(c, 99, torch.float32).values())
    one = example.read_bytes(c, 99, 1, torch.float32)
    assert one == pytest.approx(others + experts * 2 / 8 + 256 * 4 + kept)
    many = example.read_bytes(c, 99, 1000, torch.float32)  # all experts are used
    assert many == pytest.approx((others + experts) / 1000 + 256 * 4 + kept)


def test_a_pair_shares_all_but_attention(example):
    pair = example.pair(example.SMALL, "cpu", torch.float32)
    hybrid, full = (dict(pair[name].named_parameters()) for name in example.NAMES)
    assert not any(x.is_meta for x in (*hybrid.values(), *full.values()))
    shared = [name for name in full if name in hybrid and full[name] is hybrid[name]]
    assert all(name in shared for name in full if "self_attn" not in name)
    assert pair["full"].config.full_attention == (True,) * 8
    assert sum(pair["hybrid"].config.full_attention) == 2
    assert "model.layers.3.self_attn.kv_b_proj.weight" in shared
    ids = torch.arange(12).unsqueeze(0)
    for model in pair.values():
        cache = model.new_cache(1)
        model(ids[:, :8], cache=cache)
        assert torch.allclose(model(ids[:, 8:], cache=cache), model(ids)[:, 8:], atol=1e-4)


def test_a_run(example, tmp_path, monkeypatch, capsys):
    """Tiny: figures agree with each other, and what is written is what was measured."""
    monkeypatch.setattr(example, "SMALL", replace(example.SMALL, hidden_size=64, vocab_size=64))
    sizes = {"lengths": "64,192", "prefill-lengths": "32,64", "rounds": 4, "calls": 2, "chunk": 32}
    given = sizes | {"released-budget": 30, "device": "cpu", "dtype": "float32", "out": tmp_path}
    found = example.main([f"--{name}={value}" for name, value in given.items()])
    assert json.loads((tmp_path / "cache_and_speed.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "cache_and_speed.png").read_bytes().startswith(b"\x89PNG")
    rounds = {"decode": 4, "prefill": 2, "batch": 2}
    for what, count in rounds.items():
        for row in found[what]:
            for name in row.keys() & example.NAMES:
                times = row[name]["all"]
                assert len(times) == count and 0 < min(times) <= row[name]["median"] <= max(times)
    config = example.SMALL
    budget = sum(example.cache_bytes(example.in_full(config), 192, torch.float32).values())
    assert found["budget"] == budget and found["batch"][1]["batch"]["full"] == 1
    for row in found["batch"]:
        for name, c in (("hybrid", config), ("full", example.in_full(config))):
            each = sum(example.cache_bytes(c, row["tokens"], torch.float32).values())
            assert row["batch"][name] * each <= budget < (row["batch"][name] + 1) * each
            if name in row:
                assert row[name]["a_token"] == row[name]["median"] / row["batch"][name]
    last = found["modelled"][-1]
    assert last["batch"] == {"hybrid": 30 * 1024 * MIB // by_hand(1 << 20, 20, 7), "full": 0}
    assert set(last["bytes_a_token_in_batch"]) == {"hybrid"}
    said = capsys.readouterr().out
    for text in ("-74.1%", "8,064 bytes", "31,104", "40.0 MiB of states", "arXiv 2510.26692", "does not fit", "6.3"):
        assert text in said
    assert found["measured_on"]["device"] in said.replace("\n", " ")
    assert found["report"]["ms_a_token_at_1M"] == {"hybrid": 1.84, "full": 11.48}


def test_ratios(example):
    """Of the rounds, in which both have the same machine; of tokens, not of calls."""
    times = {"hybrid": {"all": [1.0, 9.0, 2.0]}, "full": {"all": [3.0, 18.0, 8.0]}}
    assert example.ratio(times) == 3
    assert example.ratio({**times, "batch": {"hybrid": 6, "full": 3}}) == 6
    assert example.ratio({"full": times["full"]}) is None


def test_sizes_that_are_chosen(example, tmp_path):
    assert example.config_of("released", None) == Config()
    eight = example.config_of("released", 8)
    assert eight.full_attention == (False, False, False, True) * 2 and eight.hidden_size == 2304
    replace(example.SMALL, linear_attn_config=LinearAttention(head_dim=32)).save(tmp_path)
    assert example.config_of(str(tmp_path), None).linear_attn_config.head_dim == 32
    assert [example.words(t) for t in (1000, 1024, 65536, 1 << 20)] == ["1000", "1K", "64K", "1M"]
