"""Functions of kdagen.fla take what those of FLA take: names, order, kinds and defaults."""

import inspect

import pytest

import kdagen.fla

FUNCTIONS = [name for name in kdagen.fla.__all__ if name.startswith(("chunk_", "fused_"))]


def parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def theirs(fla, name: str):
    return getattr(fla.ops, name, None) or fla.ops.rwkv7.fused_mul_recurrent_rwkv7


def test_all_functions_of_the_families_are_there():
    assert {"chunk_kda", "fused_recurrent_kda", "chunk_gated_delta_rule", "chunk_gla", "chunk_rwkv7"} < set(FUNCTIONS)
    assert len(FUNCTIONS) == 24


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(fla, name):
    expected, found = parameters(theirs(fla, name)), parameters(getattr(kdagen.fla, name))
    if fla.__version__ == "0.6.0":
        assert found == expected
    else:  # 0.6 has a few more, which a call written for 0.5 does not give
        added = [p for p in found if p not in expected]
        assert all(p[2] is not inspect.Parameter.empty for p in added)
        dropped = [p for p in expected if p not in found]
        assert [p[0] for p in dropped] in ([], ["kwargs"])
