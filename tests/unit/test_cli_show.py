"""`kdagen show` prints each stage in its own notation."""

import pytest
from click.testing import CliRunner

from kdagen.cli import main

EXPECTED = {
    "recurrence": "S' = S1 + outer(k, beta * (v - S1.T @ k))",
    "canonical": '"scale"',
    "tensor": "P = ",
    "tile": "scan kda_scan <scan_specialised, 256 threads>",
    "tilelang": "T.wgmma_gemm(",
}


@pytest.mark.parametrize("stage", EXPECTED)
def test_stages(stage):
    result = CliRunner().invoke(main, ["show", "kda", "--stage", stage])
    assert result.exit_code == 0
    assert EXPECTED[stage] in result.output


def test_choices_reach_the_schedule():
    result = CliRunner().invoke(main, ["show", "kda", "--stage", "tile", "--schedule", "chunk_size=32"])
    assert "k_in_s: bfloat16[32, 128]" in result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--stage", "adjoint"), "\nreverse:\n  d_P[C, V]        = A^T @ d_O + X @ d_S_next"),
        (("--stage", "tile", "--backward"), "gradients kda_gradients <gradients, "),
        (("--backward",), "def kda_reverse():"),
    ],
)
def test_stages_of_training(words, expected):
    result = CliRunner().invoke(main, ["show", "kda", *words])
    assert result.exit_code == 0, result.output
    assert expected in result.output
