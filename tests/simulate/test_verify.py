"""Comparing a program with its recurrence: `kdagen simulate`, the verdict, and programs of a built folder."""

import dataclasses
import re

import packages
import pytest
from click.testing import CliRunner

import kdagen as kg
from kdagen import cli, zoo
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate import verify as module
from kdagen.simulate.memory import Statistics
from kdagen.simulate.verify import Verdict, built_source, draw, verify, verify_training
from kdagen.state import StateType
from kdagen.tolerance import loosely


def simulate(*words: str):
    return CliRunner().invoke(cli.main, ["simulate", *words])


def test_the_command_shows_errors_traffic_and_races():
    result = simulate("gated_deltanet", "--head-dim", "64", "--tokens", "40", "--heads", "1", "--check-schedules")
    assert result.exit_code == 0, result.output
    head, schedule, _, titles, index, prepare, scan, total, *_ = result.output.splitlines()
    assert head == "gated_deltanet for sm90, bfloat16, K = 64, V = 64: B = 1, T = 40, H = 1, mild gate"
    assert schedule.startswith("schedule: chunk_size ")
    moved = [int(line.split()[-2].replace(",", "")) for line in (index, prepare, scan, total)]
    assert index.startswith("gated_deltanet_index ") and 0 < moved[0] < 5
    assert moved[1] > 0 and moved[2] > 0 and abs(sum(moved[:3]) - moved[3]) <= 1
    assert "initial and final states: 32,768 bytes a head" in result.output
    for row in ("output", "final state"):
        error, good = re.search(rf"^{row} +(\S+) +\S+ +(\S+)$", result.output, re.MULTILINE).groups()
        assert 0 < float(error) < 5e-3 and good == "yes"
    assert "gated_deltanet_scan: 3 roles of warps; 6 random orders" in result.output
    assert "gated_deltanet_prepare: all warps have one role" in result.output


def test_a_recurrence_of_a_file_and_a_choice_of_the_schedule(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import kdagen as kg\n\n@kg.recurrence\ndef plain(S, q, k, v, g):\n"
        "    S = kg.exp(g) * S + kg.outer(k, v)\n    return S, S.T @ q\n"
    )
    words = ("--arch", "sm80", "--gate", "reset", "--head-dim", "64", "--tokens", "20", "--heads", "1")
    result = simulate(f"{tmp_path / 'mine.py'}:plain", "--schedule", "chunk_size=16", "--dtype", "float16", *words)
    assert result.exit_code == 0, result.output
    assert "plain for sm80, float16, K = 64, V = 64: B = 1, T = 20, H = 1, reset gate" in result.output
    assert "chunk_size 16" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "error: no recurrence 'nothing' in the zoo"),
        (("kda", "--gate", "wild"), "error: unknown gate class 'wild': expected one of mild, softplus"),
        (("kda", "--arch", "sm70"), "error: unknown arch 'sm70'"),
    ],
)
def test_an_error_is_one_line(words, message):
    result = simulate(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_a_program_that_is_off_fails(monkeypatch):
    statistics = {"gla_prepare": Statistics(), "gla_scan": Statistics()}
    wrong = Verdict(0.1, float("nan"), 5e-3, statistics, (1, 20, 1), 0.0)
    monkeypatch.setattr(module, "verify", lambda *_: wrong)
    result = simulate("gla", "--head-dim", "64")
    assert result.exit_code == 1
    assert result.stderr == "error: gla for sm90 is off by more than is allowed: see the errors above\n"
    assert len(re.findall(r" NO$", result.output, re.MULTILINE)) == 2


def test_a_wrong_recurrence_is_noticed():
    @kg.recurrence
    def twice(S, q, k, v, g):
        S = kg.diag(kg.exp(g)) @ S + 2 * kg.outer(k, v)
        return S, S.T @ q

    verdict = verify(compile_op(zoo.get("gla"), 64), twice, (1, 20, 1))
    assert not verdict.ok and verdict.output > 0.1


def test_inputs_are_drawn_in_the_dtypes_of_the_kernels():
    tensors, state = draw(compile_op(zoo.get("kda_softplus"), (64, 128), gate_dtype="float32"), (2, 20, 3))
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in tensors.items()}
    assert dtypes == dict.fromkeys("qkv", "bfloat16") | dict.fromkeys(("g", "beta", "A_log", "dt_bias"), "float32")
    assert tuple(state.shape) == (2, 3, 64, 128)


@pytest.mark.parametrize("state", [StateType(), StateType("VK", "bfloat16")], ids=lambda state: state.name)
def test_the_program_of_a_built_folder_is_the_one_that_was_built(tmp_path, state):
    source = compile_op(zoo.get("deltaproduct"), (64, 128), state=state)
    found = built_source(packages.write(tmp_path / "out", source, tmp_path))
    assert found == dataclasses.replace(source, kernels=found.kernels, passes=source.plan()["passes"])
    assert found.plan() == source.plan()
    assert [k.text for k in found.kernels] == [k.text for k in source.kernels]
    assert [k.params for k in found.kernels] == [k.params for k in source.kernels]


def test_the_command_shows_gradients():
    words = ("--backward", "--keep", "all", "--head-dim", "64", "--tokens", "40", "--heads", "1")
    result = simulate("gated_deltanet", *words)
    assert result.exit_code == 0, result.output
    kernels = re.findall(r"^(forward|backward) gated_deltanet_(\w+) ", result.output, re.MULTILINE)
    forward, backward = ("index", "prepare", "scan"), ("index", "reverse", "gradients")
    assert kernels == [*(("forward", k) for k in forward), *(("backward", k) for k in backward)]
    rows = re.findall(r"^(d_\w+) +(\S+) +(\S+) +(yes|NO)$", result.output, re.MULTILINE)
    assert {name: most for name, _, most, _ in rows} == {
        "d_q": "0.008", "d_k": "0.008", "d_v": "0.008", "d_g": "0.02", "d_beta": "0.02", "d_initial_state": "0.008"
    }  # fmt: skip
    assert all(0 < float(error) <= float(most) for _, error, most, _ in rows)


def test_a_wrong_gradient_is_noticed():
    @kg.recurrence
    def twice(S, q, k, v, g):
        S = kg.diag(kg.exp(g)) @ S + 2 * kg.outer(k, v)
        return S, S.T @ q

    verdict = verify_training(compile_training(zoo.get("gla"), 64), twice, (1, 20, 1))
    assert not verdict.ok
    assert 0.4 < verdict.gradients["v"][0] < 0.6  # half of what it should be


def test_the_program_of_a_built_folder_for_training_is_the_one_that_was_built(tmp_path):
    source = compile_training(zoo.get("kda_softplus"), 64)
    found = built_source(packages.write(tmp_path / "out", source, tmp_path))
    assert found.plan() == source.plan()
    assert [k.text for k in found.kernels_of("backward")] == [k.text for k in source.kernels_of("backward")]


def test_tolerances_are_wide_for_what_decays_and_scales():
    forms = {name: loosely(canonical(zoo.get(name))) for name in ("kda", "kda_softplus", "dplr", "hgrn2")}
    assert forms == {
        "kda": {"g", "beta"}, "kda_softplus": {"g", "beta", "A_log", "dt_bias"}, "dplr": {"g"}, "hgrn2": set()
    }  # fmt: skip
