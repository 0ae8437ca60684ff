"""Each message that `kdagen tune` can give by itself: one line, and how to go on."""

import sys

import pytest
import tune_logs
from click.testing import CliRunner
from kdagen.autotune import asked

from kdagen import cli


@pytest.fixture
def here(monkeypatch):
    """A function that sets the GPUs of this machine; there are none at first."""

    def these(*names: str) -> None:
        monkeypatch.setattr(asked, "gpus_here", lambda: [(f"cuda:{i}", name) for i, name in enumerate(names)])

    these()
    return these


def error(*arguments) -> str:
    result = CliRunner().invoke(cli.main, ["tune", *map(str, arguments)])
    assert result.exit_code == 1, (result.output, result.exception)
    *before, last = result.stderr.splitlines()
    assert all(line.startswith("going on in ") for line in before)
    return last.removeprefix("error: ")


def plan(tmp_path, *arguments) -> str:
    """The message; nothing is left behind."""
    said = error("plan", "--dir", tmp_path / "sweep", *arguments)
    assert not (tmp_path / "sweep").exists()
    return said


def test_no_gpu(tmp_path, here):
    assert plan(tmp_path) == (
        "there is no GPU here: expected --gpu with the one that you tune for, of H100, H200, A100, B200, RTX 4090, "
        "RTX 5090, MI300X, or --device cpu"
    )


def test_several_kinds_of_gpus(tmp_path, here):
    here("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090")
    assert plan(tmp_path) == (
        "several kinds of GPU are here (NVIDIA GeForce RTX 4090, NVIDIA H100 80GB HBM3): choose one by --gpu, the "
        "other later"
    )


@pytest.mark.parametrize("way", ["asked for", "at hand"])
def test_a_gpu_without_facts(tmp_path, here, way):
    here("Riva 128")
    assert plan(tmp_path, *(["--gpu", "Riva 128"] if way == "asked for" else [])) == (
        "no facts about the GPU 'Riva 128': expected one of H100, H200, A100, B200, RTX 4090, RTX 5090, MI300X; "
        "--gpu takes the most like it"
    )


def test_no_gpu_to_measure_on(tmp_path, here):
    folder = tune_logs.planned(tmp_path / "sweep")
    here("NVIDIA GeForce RTX 4090")
    assert error("measure", "--dir", folder.path) == (
        "there is no H100 here: carry the folder to a machine that has one and go on there with `kdagen tune measure`, "
        "or say --device"
    )


def test_a_shape_of_no_purpose(tmp_path):
    assert plan(tmp_path, "--gpu", "H100", "--shape", "1x64x4") == (
        "--shape 1x64x4: a shape is of one purpose: say which by --purpose inference, training or decode"
    )


def test_a_shape_that_is_none(tmp_path):
    assert plan(tmp_path, "--gpu", "H100", "--purpose", "decode", "--shape", "64x4").startswith(
        "shape '64x4': expected BxTxH such as 1x8192x64"
    )


@pytest.mark.parametrize("text", ["20", "m", "0s", "-3m", "1d"])
def test_budget(tmp_path, text):
    folder = tune_logs.planned(tmp_path / "sweep")
    said = error("measure", "--dir", folder.path, "--device", "cpu", f"--budget={text}")
    assert said == f"--budget {text}: expected a time such as 90s, 20m or 2h"


def test_a_field_that_is_no_axis(tmp_path):
    assert plan(tmp_path, "--device", "cpu", "--fix", "chunk_size=16") == (
        "--fix chunk_size: expected one of rows, span, threads"
    )


def test_a_field_without_values(tmp_path):
    assert plan(tmp_path, "--device", "cpu", "--fix", "rows") == (
        "--fix rows: expected field=value, such as chunk_size=32"
    )


def test_a_policy_of_gpus_on_the_cpu(tmp_path):
    assert plan(tmp_path, "--device", "cpu", "--policy", "graph cold") == (
        "--policy 'graph cold': expected 'eager cold' or 'eager warm' on the CPU"
    )


def test_a_policy_that_is_none(tmp_path):
    assert plan(tmp_path, "--gpu", "H100", "--policy", "tepid").startswith(
        "timing policy 'tepid cold': expected one of"
    )


def test_an_op_that_is_none(tmp_path):
    assert "nosuch" in plan(tmp_path, "--gpu", "H100", "--op", "nosuch")


def test_another_sweep_is_there(tmp_path):
    folder = tune_logs.planned(tmp_path / "sweep")
    said = error("plan", "--dir", folder.path, "--gpu", "H100", "--purpose", "decode")
    assert said.startswith(f"{folder.path} holds another sweep ({tune_logs.INFERENCE.name}, {tune_logs.DECODE.name})")


@pytest.mark.parametrize("command", ["compile", "measure", "publish", "why", "report"])
def test_no_sweep_is_there(tmp_path, command):
    said = error(command, "--dir", tmp_path / "nothing")
    assert said.startswith(f"{tmp_path / 'nothing'} holds no sweep.json: make it with `kdagen tune plan --dir")


def test_a_replay_of_nothing(tmp_path):
    said = plan(tmp_path, "--device", f"replay:{tmp_path / 'elsewhere' / 'log.jsonl'}")
    assert said.startswith(f"{tmp_path / 'elsewhere'} holds no sweep.json")


def test_options_before_the_command(tmp_path):
    result = CliRunner().invoke(cli.main, ["tune", "--dir", str(tmp_path), "why"])
    assert result.exit_code == 2
    assert "options come behind the command: kdagen tune why --dir ..." in result.stderr


def test_a_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tune_logs.planned(tmp_path / "sweep")
    assert error("report", "--dir", folder.path) == (
        "matplotlib is missing, which draws the plots of a report: pip install 'kdagen[report]' (`kdagen tune why` "
        "says the same as text, without it)"
    )


def test_all_of_it_without_matplotlib(tmp_path, monkeypatch, here):
    """What was tuned is published all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("kdagen.autotune.tune.tune", lambda *_: [tmp_path / "a.json"])
    folder = tune_logs.measured(tmp_path / "sweep")
    result = CliRunner().invoke(cli.main, ["tune", "--dir", str(folder.path), "--device", "cpu"])
    assert result.exit_code == 0
    assert f"published {tmp_path / 'a.json'}\nno report: matplotlib is missing" in result.stdout


def test_nothing_to_publish(tmp_path):
    folder = tune_logs.planned(tmp_path / "sweep")
    result = CliRunner().invoke(cli.main, ["tune", "publish", "--dir", str(folder.path), "--into", str(tmp_path / "t")])
    assert result.stdout == (
        "published nothing: the untuned default was in no finals yet (those on a recording count for --into alone)\n"
    )
