"""Errors of builds, launches and simulations of training: each message once."""

import dataclasses

import pytest
import torch
import toy
import toy_training
from click.testing import CliRunner

from kdagen import cli, zoo
from kdagen.build.kernel import check_shared, job_of
from kdagen.errors import ArgumentError, ScheduleError
from kdagen.pipeline import compile_training
from kdagen.runtime.loader import LoadedOp
from kdagen.runtime.manifest import purpose
from kdagen.schedule import Schedule
from kdagen.simulate.run import simulate_training
from kdagen.target import target

GIVEN = {"x": torch.zeros(1, 20, 2, 64, dtype=torch.bfloat16), "g": torch.zeros(1, 20, 2), "a": torch.zeros(2)}


def run(*words):
    return CliRunner().invoke(cli.main, words)


def test_a_schedule_of_inference():
    with pytest.raises(ScheduleError, match="a Schedule is no choice here: expected a TrainingSchedule"):
        compile_training(zoo.get("gla"), schedule=Schedule())


def test_sequences_that_are_split():
    message = "split 8: sequences are split in inference alone, expected 0 in training"
    with pytest.raises(ScheduleError, match=message):
        compile_training(zoo.get("gla"), schedule={"split": 8})


def test_a_backward_without_what_the_forward_kept(tmp_path):
    op = LoadedOp(tmp_path, {"plan": toy_training.toy().plan()})
    expected = "toy: the backward lacks w: expected what the forward's launch returned under this name"
    with pytest.raises(ArgumentError, match=expected):
        op.launch(GIVEN, "backward")
    source = dataclasses.replace(toy_training.toy(), kept=("w", "v"))
    with pytest.raises(ArgumentError, match="the backward lacks w, v: .* under these names"):
        LoadedOp(tmp_path, {"plan": source.plan()}).launch(GIVEN, "backward")


def test_a_backward_of_an_op_without_one():
    with pytest.raises(ArgumentError, match="toy: has a forward only: expected what pipeline.compile_training"):
        simulate_training(toy.toy(), {name: GIVEN[name] for name in "xg"})


def test_cotangents_of_the_wrong_dtype_or_shape():
    with pytest.raises(ArgumentError, match="'d_o_in' is torch.float32 on cpu, expected torch.bfloat16"):
        simulate_training(toy_training.toy(), GIVEN, None, torch.zeros(1, 20, 2, 64))
    with pytest.raises(ArgumentError, match="'d_final_state' has shape .1, 2, 64, 32."):
        simulate_training(toy_training.toy(), GIVEN, d_final_state=torch.zeros(1, 2, 64, 32))


def test_choices_of_the_command():
    result = run("build", "--arch", "sm90", "--training-schedule", "segment")
    assert result.stderr == "error: --training-schedule segment: expected field=value, such as chunk_size=32\n"
    result = run("simulate", "kda", "--keep", "all")
    assert (
        result.exit_code == 2 and "--keep says what a forward leaves for its backward: add --backward" in result.stderr
    )


def test_a_build_says_how_to_do_without_training():
    result = run("build", "--arch", "sm90", "--op", "gla", "--training-schedule", "segments=3")
    assert result.stderr.startswith("error: unknown schedule field segments: expected some of")
    assert result.stderr.endswith("(--only inference --only decode builds without training)\n")


def test_a_training_kernel_that_does_not_fit():
    source = toy_training.toy()
    job = job_of(source.kernels[3], source)
    expected = "lower chunk_size .now 16. in the schedule of training .--only inference --only decode builds without"
    with pytest.raises(ScheduleError, match=f"toy_gradients needs 300.0 KiB of shared memory a block, .*: {expected}"):
        check_shared(job, target("sm90"), 300 * 1024)


def test_no_schedule_of_training_fits():
    expected = (
        r"kda has no training kernels for sm89 at head_dim \(128, 128\): the backward of a chunk of 16 tokens needs "
        r"\d+ KiB of shared memory, a block there has 99: expected a smaller head_dim"
    )
    with pytest.raises(ScheduleError, match=expected):
        compile_training(zoo.get("kda"), arch="sm89")


def test_a_state_too_large_for_registers():
    with pytest.raises(ScheduleError, match=r"head_dim \(256, 128\) has no backward: expected K x V of at most 16384"):
        compile_training(zoo.get("kda"), (256, 128))


def test_a_build_goes_on_without_training_where_there_is_none(monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr("kdagen.build.builder.build", lambda sources, *_: built.extend(sources) or [])
    result = run("build", "--arch", "sm89", "--op", "kda", "--out", str(tmp_path))
    assert result.stderr.startswith("no training: kda has no training kernels for sm89")
    assert [purpose(source.plan()) for source in built] == ["inference", "decode"]
    result = run("build", "--arch", "sm89", "--op", "kda", "--only", "training", "--out", str(tmp_path))
    assert result.exit_code == 1 and result.stderr.startswith("error: kda has no training kernels for sm89")
