"""Errors of training runs: each message once."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from example_programs import load

from kdagen.errors import ArgumentError, TrainingError
from kdagen.models import Config, KimiLinear, LinearAttention
from kdagen.models.training import Processes, Settings, train
from kdagen.models.training.folder import Folder
from kdagen.models.training.plot import figure_class
from kdagen.models.training.tasks import MQAR, Palindrome, Stack

synthetic, texts = load("train_synthetic"), load("train_bytes")


def refused(module, *words) -> str:
    """What a command says that does not run."""
    done = CliRunner().invoke(module.main, [str(word) for word in words])
    assert done.exit_code != 0 and not isinstance(done.exception, (KeyError, TypeError)), done.output
    return done.output


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 0}, "steps is 0, expected a number from 1 up"),
        ({"warmup": -1}, "warmup is -1, expected a number from 0 up"),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0"),
        ({"clip": float("nan")}, "clip is nan, expected a number above 0"),
        ({"until": 95.0}, "until is 95.0, expected a share from 0 to 1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), expected a weight decay from 0 up, and betas"),
        ({"decay": "cosin"}, "decay is 'cosin', expected 'cosine' or 'linear' or 'constant'"),
    ],
)
def test_settings(given, said):
    with pytest.raises(ArgumentError, match=said):
        Settings(**given)


def test_tasks():
    with pytest.raises(ArgumentError, match="palindrome of length 1 over 16 symbols: expected a length from 2 up"):
        Palindrome(1)
    with pytest.raises(ArgumentError, match="mqar of length 80 has 20 pairs for 16 keys: .* such as symbols = 20"):
        MQAR(80)
    with pytest.raises(ArgumentError, match="mqar of length 30 has 7.5 pairs .* expected a multiple of 4"):
        MQAR(30)
    with pytest.raises(ArgumentError, match="stack has 0 stacks: expected 1 or more"):
        Stack(stacks=0)


def test_options(tmp_path):
    assert "'maze' is not one of" in refused(synthetic, "--task", "maze")
    assert "no recurrence 'lstm' in the zoo" in refused(synthetic, "--mixer", "lstm", "--out", tmp_path)
    assert "lr is -1.0" in refused(synthetic, "--lr", -1, "--out", tmp_path)
    assert "does not exist" in refused(texts, tmp_path / "none")


def test_text(tmp_path):
    assert "no files *.py: expected text" in refused(texts, tmp_path, "--out", tmp_path / "out")
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    said = refused(texts, tmp_path, "--out", tmp_path / "out")
    assert "the text has 601 bytes, 30 of them held out, for sequences of 256: expected more text" in said


def small(hidden_size: int = 32) -> KimiLinear:
    linear = LinearAttention(head_dim=16, num_heads=2, ratio=None)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 5}
    return KimiLinear(Config(**sizes, num_experts=0, linear_attn_config=linear), seed=0)


def trained(folder, model=None, processes=None, **given):
    data = Palindrome(8, 4)
    settings = Settings(**({"steps": 2, "batch": 4} | given))
    batches = lambda step: data.batch(step, settings.batch)  # noqa: E731
    return train(model or small(), batches, settings, folder, processes=processes, show=False)


def test_another_runs_folder(tmp_path):
    trained(tmp_path)
    with pytest.raises(TrainingError) as error:
        trained(tmp_path, small(hidden_size=16), lr=0.5)
    said = str(error.value).splitlines()
    assert said[0] == f"{tmp_path} is of a run with other settings:"
    assert said[1:-1] == ["  model.hidden_size: 32 there, 16 now", "  settings.lr: 0.001 there, 0.5 now"]
    assert said[-1] == "expected the same settings to go on with it, or another folder (--out) for a new run"


def test_damaged_folders(tmp_path):
    trained(tmp_path)
    checkpoint, metrics, run = (tmp_path / name for name in ("checkpoint.pt", "metrics.jsonl", "run.json"))
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match="expected a checkpoint: .*; start again in a new folder"):
        trained(tmp_path)
    checkpoint.write_bytes(whole)
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    with pytest.raises(TrainingError, match="metrics.jsonl has 1 steps, checkpoint.pt is of step 2: expected a line"):
        trained(tmp_path)
    said = json.loads(run.read_text())
    run.write_text(json.dumps(said | {"format": "other"}))
    with pytest.raises(TrainingError, match="expected a run of format kdagen-run-1"):
        trained(tmp_path)
    run.write_text("{")
    with pytest.raises(TrainingError, match="expected what a run was started with"):
        trained(tmp_path)
    run.unlink()
    with pytest.raises(TrainingError, match="has no run.json beside its checkpoint: expected a new folder"):
        trained(tmp_path)


def test_two_runs_in_a_folder(tmp_path):
    first = Folder(tmp_path)
    first.open({})
    with pytest.raises(TrainingError, match="is in use: another process trains there; expected a folder for each run"):
        trained(tmp_path)
    first.close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="expected a folder that can be written"):
        trained(tmp_path / "file")


def test_a_loss_that_is_no_number(tmp_path):
    model = small()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    for _ in range(2):  # the folder is free again
        with pytest.raises(
            TrainingError, match="step 1: the loss is nan .* train with a lower lr than 0.001, a longer"
        ):
            trained(tmp_path, model)


def test_models_that_are_not_trained(tmp_path):
    with pytest.raises(TrainingError, match="has parameters of torch.bfloat16: expected all in float32, such as model"):
        trained(tmp_path, small().bfloat16().float().to(torch.bfloat16))
    with torch.device("meta"):
        model = small()
    with pytest.raises(TrainingError, match="has parameters of meta: expected all in float32, .* with values"):
        trained(tmp_path, model)


def test_batches_that_cannot_be_divided():
    with pytest.raises(TrainingError, match="a batch of 5 sequences cannot be divided among 2 processes: .* such as 6"):
        Processes(0, 2).rows(5)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainingError, match=r"matplotlib is missing, .*: pip install 'kdagen\[report\]'"):
        figure_class()
