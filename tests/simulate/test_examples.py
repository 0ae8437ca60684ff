"""The examples run, on fewer tokens, and say what they promise."""

import importlib.util
import re
import sys
from pathlib import Path

import packages
import pytest
from click.testing import CliRunner

import kdagen as kg
from kdagen.pipeline import compile_op

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_recurrence(capsys):
    errors = load("own_recurrence").main(tokens=70, simulated_tokens=20)
    cpu_o, cpu_state, simulated_o, simulated_state = errors.values()
    assert max(cpu_o, cpu_state) < 1e-5 and max(simulated_o, simulated_state) < 5e-3
    assert "erase(q, k, v, e, g, beta, D): torch.ops.kdagen.erase" in capsys.readouterr().out


def test_serving(capsys):
    assert load("serving").main() < 1e-5
    assert "sequence 1: 12 tokens" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What `kdagen build --op gla --head-dim 64` leaves, but for the libraries."""
    packages.write(tmp_path / "gla_ops", compile_op(kg.load("gla"), 64), tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "gla_ops"


def test_quickstart(folder):
    words = ["--op", "gla", "--build", str(folder), "--tokens", "70", "--simulated-tokens", "20"]
    result = CliRunner().invoke(load("quickstart").main, words)
    assert result.exit_code == 0, result.output
    assert "CPU op: float32, T = 70" in result.output and "sm90 programs: bfloat16, T = 20" in result.output
    for name in ("output", "final state"):
        errors = re.search(rf"{name} +(\S+) +1e-05 +(\S+) +0.005 +yes", result.output).groups()
        assert all(0 < float(error) < 5e-3 for error in errors)
    for name in ("q", "k", "v", "g"):
        assert 0 < float(re.search(rf"d_{name} +(\S+) +1e-05 +- +- +yes", result.output).group(1)) < 1e-5
    assert re.search(r"gla_scan +\d+ +96 +0 +4.0 +gla_scan.so", result.output)
    assert "from gla_ops import gla" in result.output


@pytest.mark.parametrize("name", ["kda", "gla"])
def test_quickstart_without_a_build_says_what_to_run(folder, name):
    place = folder if name == "kda" else folder.parent / "nowhere"
    result = CliRunner().invoke(load("quickstart").main, ["--op", name, "--build", str(place)])
    assert result.exit_code == 1
    assert f"has no op {name}: run `kdagen build --arch sm90 --op {name} --out {place}` first" in result.output
