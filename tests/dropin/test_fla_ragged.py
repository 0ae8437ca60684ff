"""Ragged batches, states on the way and reversed sequences of kdagen.fla: each sequence alone by FLA's references."""

import pytest
import torch
from real_fla import VERSIONS
from torch.nn.functional import normalize

import kdagen.fla

pytestmark = pytest.mark.parametrize("fla", VERSIONS[-1:], indirect=True)  # the references of 0.5 are the same
H, HV, K, V = 2, 4, 16, 8
ENDS = torch.tensor([0, 70, 70, 71, 199])
LENGTHS = [b - a for a, b in zip(ENDS.tolist(), ENDS.tolist()[1:])]
T, N = int(ENDS[-1]), len(LENGTHS)


def draw(*shape: int, seed: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(heads: int = HV, batch: int = 1) -> dict:
    return {
        "q": draw(batch, T, H, K, seed=0),
        "k": normalize(draw(batch, T, H, K, seed=1), dim=-1),
        "v": draw(batch, T, heads, V, seed=2),
        "g": -draw(batch, T, heads, K, seed=3).abs(),
        "beta": draw(batch, T, heads, seed=4).sigmoid(),
    }


def states(heads: int = HV):
    return draw(N, heads, K, V, seed=5)


def alone(reference, x: dict, initial, *names: str, reverse: bool = False) -> tuple:
    """Output and final states of each sequence by itself."""
    results = []
    for i, (a, b) in enumerate(zip(ENDS, ENDS[1:])):
        part = [x[name][:, a:b].flip(1) if reverse else x[name][:, a:b] for name in names]
        o, final = reference(*part, initial_state=initial[i : i + 1], output_final_state=True)
        results.append((o.flip(1) if reverse else o, final))
    return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*results), (1, 0)))


def near(found, expected, bound: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_sequences_behind_each_other(fla, name, dtype, gradients):
    x, initial = inputs(), states()
    given = [y.requires_grad_(gradients) for y in (*x.values(), initial)]
    expected = alone(fla.ops.kda.naive.naive_recurrent_kda, x, initial, *x)
    options = {"initial_state": initial, "output_final_state": True, "cu_seqlens": ENDS.to(dtype)}
    found = getattr(kdagen.fla, name)(**x, **options)
    near(found, expected)
    if gradients:
        shown = [draw(*y.shape, seed=9) for y in expected]
        near(*(torch.autograd.grad(results, given, shown) for results in (found, expected)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["gla", "simple_gla"])
def test_reversed_sequences(fla, name, first):
    x, initial = inputs(H), states(H)
    x["g"] = x["g"] if name == "gla" else x["g"][..., 0]
    reference = getattr(getattr(fla.ops, name).naive, f"naive_recurrent_{name}")
    o, final = alone(reference, x, initial, "q", "k", "v", "g", reverse=True)
    options = {"output_final_state": True, "cu_seqlens": ENDS, "reverse": True, "state_v_first": first}
    function = getattr(kdagen.fla, f"fused_recurrent_{name}")
    found = function(x["q"], x["k"], x["v"], x["g"], initial_state=turn(initial, first), **options)
    near(found, (o, turn(final, first)))


def turn(state, first: bool):
    return state.transpose(2, 3).contiguous() if first else state


@pytest.mark.parametrize("reverse", [True, False])
def test_normalised_linear_attention(fla, reverse):
    x = {name: y.abs() for name, y in inputs(H).items()}
    initial, keys = states(H), draw(N, 1, H, K, seed=6).abs()
    reference, results = fla.ops.linear_attn.naive.naive_recurrent_linear_attn, []
    for i, (a, b) in enumerate(zip(ENDS, ENDS[1:])):
        if a == b:
            results.append((x["v"][:, a:b], initial[i : i + 1], keys[i : i + 1]))
            continue
        part = [x[name][:, a:b].flip(1) if reverse else x[name][:, a:b] for name in "qkv"]
        pair = initial[i : i + 1], keys[i : i + 1]
        o, ends = reference(*part, initial_state=pair, output_final_state=True, normalize=True)
        results.append((o.flip(1) if reverse else o, *ends))
    expected = [torch.cat(parts, dim) for parts, dim in zip(zip(*results), (1, 0, 0))]
    options = {"initial_state": (initial, keys), "output_final_state": True, "cu_seqlens": ENDS, "normalize": True}
    o, ends = kdagen.fla.fused_recurrent_linear_attn(x["q"], x["k"], x["v"], reverse=reverse, **options)
    near((o, *ends), expected)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_states_before_each_chunk(fla, size, ragged, given, first):
    x = inputs() if ragged else inputs(batch=2)
    x = {name: y.bfloat16() if name in "qkv" else y for name, y in x.items()}
    initial = states() if ragged else states()[:2]
    zeros = initial if given else torch.zeros_like(initial)
    naive = fla.ops.kda.naive.naive_recurrent_kda
    rows = []
    for n in range(N if ragged else 2):
        a, b = (int(ENDS[n]), int(ENDS[n + 1])) if ragged else (0, T)
        sequence = {name: y[:1] if ragged else y[n : n + 1] for name, y in x.items()}
        state = zeros[n : n + 1]
        for t in range(a, b, size):
            rows.append(state)
            part = {name: y[:, t : t + size] for name, y in sequence.items()}
            state = naive(**part, initial_state=state, output_final_state=True)[1]
    expected = torch.cat(rows)
    expected = expected.unsqueeze(0) if ragged else expected.view(2, -1, *expected.shape[1:])
    options = {"cu_seqlens": ENDS, "cu_seqlens_cpu": ENDS} if ragged else {}
    with torch.inference_mode():
        o, final, h = kdagen.fla.chunk_kda(
            **x,
            initial_state=turn(initial, first) if given else None,
            return_intermediate_states=True,
            state_v_first=first,
            chunk_size=size,
            **options,
        )
    assert final is None and o.dtype == h.dtype == torch.bfloat16
    expected = expected.transpose(3, 4) if first else expected
    near([h.float()], [expected], 4e-3)


def test_a_graphs_number_of_sequences(fla):
    x = {name: y.detach() for name, y in inputs().items()}
    options = {"cu_seqlens": ENDS, "use_graph": True}
    assert torch.equal(
        kdagen.fla.chunk_kda(**x, **options, max_num_seqs=N)[0], kdagen.fla.chunk_kda(**x, cu_seqlens=ENDS)[0]
    )
