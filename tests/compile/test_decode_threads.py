"""Decode kernels as CUDA, thread by thread on the CPU, against the float64 recurrence: layouts and barriers hold."""

import cuda_threads
import pytest
import torch
from foreign import CASES

from kdagen import zoo
from kdagen.build import adapter
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_decode
from kdagen.reference import recurrence_reference
from kdagen.state import StateType
from kdagen.target import target

RECURRENCES = {**{name: zoo.get(name) for name in zoo.names()}, **{name: case[0] for name, case in CASES.items()}}
N, TOKENS, HEADS = 2, 3, 2


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(
    "name, head_dim, state, columns",
    [
        ("kda", (128, 128), StateType("KV"), 1),
        ("kda", (128, 128), StateType("VK", "bfloat16"), 3),
        ("kda_softplus", (64, 64), StateType("KV", "bfloat16"), 3),
        ("rwkv7", (256, 64), StateType("VK"), 1),
        ("write_by_distance", (64, 128), StateType("KV"), 1),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name or "kv" if isinstance(x, StateType) else None,
)
def test_equals_the_recurrence(name, head_dim, state, columns, tmp_path):
    recurrence, (k, v) = RECURRENCES[name], head_dim
    (kernel,) = compile_decode(recurrence, head_dim, state=state).kernels
    lowered = adapter.lower(adapter.trace(kernel.text, kernel.name, f"<{kernel.name}>"), target("sm90"))
    run = cuda_threads.compiled(lowered, tmp_path)
    dtypes = {p.name: getattr(torch, p.dtype) for p in kernel.params}
    inputs = zoo.sample(canonical(recurrence), (N, TOKENS, HEADS, k, v), "softplus", 0)
    inputs = {n: x.to(dtypes[n]).contiguous() for n, x in inputs.items() if n in dtypes}
    slots = N * columns + 1
    before = 0.1 * torch.randn(slots, HEADS, k, v, generator=torch.Generator().manual_seed(0))
    before = before.to(dtypes["state_pool"])
    pool = (before if state.layout == "KV" else before.mT).clone(memory_format=torch.contiguous_format)
    indices = torch.arange(1, slots, dtype=torch.int32).view(N, columns)
    o = torch.full((N, TOKENS, HEADS, v), float("nan"), dtype=torch.bfloat16)
    others = {
        "cu_seqlens": torch.arange(N + 1, dtype=torch.int32) * TOKENS, "state_indices": indices, "o_out": o,
        "num_accepted_tokens": torch.ones(N, dtype=torch.int32), "state_pool": pool, "new_state_pool": pool,
    }  # fmt: skip
    sizes = {"T": N * TOKENS, "N": N, "N1": N + 1, "S": slots, "W": columns, "H": HEADS, "HV": HEADS, "null_below": 1}
    run(N * v // 32, HEADS, {f"{n}_in": x for n, x in inputs.items()} | others | sizes)
    after = pool if state.layout == "KV" else pool.mT
    o_ref, final_ref = recurrence_reference(recurrence, inputs, before[indices[:, 0].long()])
    assert relative(o, o_ref) < 5e-3
    assert relative(after[indices[:, -1].long()], final_ref) < (1e-5 if state.dtype == "float32" else 5e-3)
    assert torch.equal(after[0], before[0])
