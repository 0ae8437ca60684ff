"""Training runs: nothing lost at a kill, several processes equal to one, and models that learn."""

import io
import json
import os
import signal
import time

import pytest
import torch
from example_programs import load, run, start
from rich.console import Console
from small_models import config

from kdagen.errors import ArgumentError
from kdagen.models import KimiLinear
from kdagen.models.training import Processes, Settings, train
from kdagen.models.training.display import Display, usual
from kdagen.models.training.folder import Folder
from kdagen.models.training.loop import means
from kdagen.models.training.tasks import Palindrome

synthetic, texts = load("train_synthetic"), load("train_bytes")


def figures(folder) -> list[dict]:
    """Of each step, but for its time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name != "ms"} for line in lines]


def parameters(folder) -> dict:
    """Those of the checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_killed_run_goes_on(tmp_path):
    """The figures are those of a run that was not killed, bit for bit; steps beyond the checkpoint come once."""
    given = {"task": "mqar", "mixer": "kda", "length": 8, "head_dim": 16, "batch": 4, "lr": 0.01, "warmup": 3}
    given |= {"steps": 24, "save_every": 4}
    killed, whole = (tmp_path / name / "mqar-8-kda-0.01" for name in ("killed", "whole"))
    process = start("train_synthetic", **given, out=killed.parent)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] >= 8

    out = run(synthetic, **given, out=killed.parent)
    assert "went on" in out and "accuracy.png" in out
    run(synthetic, **given, out=whole.parent)
    assert figures(killed) == figures(whole)
    found, expected = parameters(killed), parameters(whole)
    assert all(torch.equal(found[x], expected[x]) for x in expected)
    assert (killed.parent / "accuracy.png").read_bytes().startswith(b"\x89PNG")


class Killed(BaseException):
    """What stands for the moment of a kill."""


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_kills_at_every_moment(tmp_path, monkeypatch, call):
    """A folder goes on from the last whole checkpoint, with a line of figures for each of its steps."""
    real, left = getattr(os, call), [0]

    def until(*given, **named):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return real(*given, **named)

    for moment in range(1, 12):
        folder = Folder(tmp_path / str(moment))
        left[0] = moment
        with monkeypatch.context() as patch:
            patch.setattr(os, call, until)
            try:
                folder.open({"settings": 1})
                for step in range(1, 5):
                    folder.note({"step": step})
                    if step % 2 == 0:
                        folder.save({"step": step})
            except Killed:
                if folder.metrics.exists():
                    with folder.metrics.open("a") as file:
                        file.write('{"st')  # a line that was being written
            finally:
                folder.close()
        again = Folder(tmp_path / str(moment))
        found = again.open({"settings": 1})
        assert [line["step"] for line in again.curve()] == list(range(1, (found["step"] if found else 0) + 1))
        again.close()


def test_processes_equal_one(tmp_path):
    """Under torchrun with FSDP2, a hybrid with experts: losses, parameters, and what goes on from them."""
    text, one, two = (tmp_path / name for name in ("text", "one", "two"))
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    given = {"length": 12, "batch": 4, "hidden": 32, "lr": 0.001, "warmup": 2, "evaluate_every": 2, "sample": 5}
    given |= {"experts": 16}  # some are chosen by one process alone
    process = start("train_bytes", text, **given, steps=5, out=two, processes=2)
    run(texts, text, **given, steps=5, out=one)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("bits a byte:") == 1, "the first process alone speaks"

    close(figures(two), figures(one))
    found, expected = parameters(two), parameters(one)
    assert found.keys() == expected.keys()
    assert max((found[x] - expected[x]).abs().max() for x in expected) < 1e-5
    tokens = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    models = [KimiLinear.from_pretrained(folder / "model") for folder in (one, two)]
    with torch.no_grad():
        assert (models[0](tokens) - models[1](tokens)).abs().max() < 1e-4

    for folder in (one, two):  # one process goes on from either, with more steps
        said = json.loads((folder / "run.json").read_text())
        said["settings"]["steps"] = 8
        (folder / "run.json").write_text(json.dumps(said))
        run(texts, text, **given, steps=8, out=folder)
    close(figures(two), figures(one))
    assert len(figures(two)) == 8


def close(found: list[dict], expected: list[dict]) -> None:
    """Figures that differ by 1e-5 at most, relative where above 1."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for a, b in zip(found, expected):
        assert all(abs(a[name] - b[name]) <= 1e-5 * max(1, abs(b[name])) for name in b), (a, b)


def test_learning(tmp_path):
    """KDA tells palindromes; the run ends when it is good enough, and called again there is nothing more to do."""
    given = {"task": "palindrome", "mixer": "kda", "length": 8, "symbols": 4, "head_dim": 16, "batch": 32}
    given |= {"lr": 0.01, "until": 0.97, "steps": 300, "out": tmp_path}
    out = run(synthetic, **given)
    folder = tmp_path / "palindrome-8-kda-0.01"
    found = figures(folder)
    assert len(found) < 300 and found[0]["accuracy"] < 0.5
    assert means([line["accuracy"] for line in found])[-1] >= 0.97
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    again = run(synthetic, **given)
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before
    table = out.index("task  ")
    assert "kda" in out[table:] and out[table:] == again[again.index("task  ") :]  # and the plot's name


def test_text(tmp_path):
    """Bytes of files in order, a part held out, batches by (seed, step) alone."""
    for name, said in {"b.py": "second", "a.py": "first", "c.txt": "other"}.items():
        (tmp_path / name).write_text(said)
    assert texts.read(tmp_path, "*.py", 1000) == b"first\0second\0"
    assert texts.read(tmp_path, "*.py", 8) == b"first\0se"
    data = bytes(range(200)) * 2
    text = texts.Text(data, 10, seed=3)
    assert len(text.held_out) == 20 and bytes(text.train) + bytes(text.held_out) == data
    ids, targets = text.batch(7, 4)
    assert all(bytes([*row.tolist(), last]) in data for row, last in zip(ids, targets[:, -1].tolist()))
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert torch.equal(texts.Text(data, 10, seed=3).batch(7, 4)[0], ids)
    assert not torch.equal(text.batch(8, 4)[0], ids) and not torch.equal(texts.Text(data, 10).batch(7, 4)[0], ids)


def test_the_standard_library_is_text():
    data = texts.read(None, "*.py", 200_000)
    assert len(data) == 200_000 and b"\ndef " in data


def test_rates():
    rates = Settings(steps=100, lr=1.0, warmup=10, final=0.1).lr_at
    assert [rates(0), rates(9), rates(10)] == [0.1, 1.0, 1.0]
    assert abs(rates(55) - 0.55) < 1e-9 and 0.1 < rates(99) < 0.101
    linear = Settings(steps=100, lr=1.0, warmup=0, final=0.0, decay="linear").lr_at
    assert [linear(0), linear(25)] == [1.0, 0.75]
    assert Settings(steps=5, lr=2.0, warmup=0, decay="constant").lr_at(4) == 2.0


def test_decay_of_weights(tmp_path):
    """Without gradients weights of linear maps shrink; norms, embeddings and parameters of heads do not."""
    from kdagen.models.training.loop import adamw

    model = KimiLinear(config({"ratio": None}, num_experts=0, num_hidden_layers=1), seed=0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    adamw(model, Settings(lr=0.1, weight_decay=0.5)).step()
    shrunk = {name for name, x in model.named_parameters() if torch.allclose(x, before[name] * 0.95) and x.abs().sum()}
    kept = {name for name, x in model.named_parameters() if torch.equal(x, before[name])}
    assert shrunk | kept == set(before)
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= shrunk
    others = ("model.embed_tokens.weight", "model.norm.weight", "A_log", "dt_bias", "q_conv1d.weight")
    assert all(any(name.endswith(other) for name in kept) for other in others)


def test_evaluation(tmp_path):
    """What is held out is evaluated when asked for and at the end, and changes nothing of the run."""
    task = Palindrome(8, 4)
    held_out, runs = [task.batch(10**6, 4)], {}
    for every in (2, 100):
        model = KimiLinear(config({"ratio": None}, num_experts=0, num_hidden_layers=1, vocab_size=5), seed=0)
        given = Settings(steps=3, batch=4), tmp_path / str(every), None, held_out, every
        runs[every] = train(model, lambda step: task.batch(step, 4), *given, processes=Processes(), show=False)
    assert [("held_out_loss" in line) for line in runs[2].curve] == [False, True, True]
    assert [("held_out_loss" in line) for line in runs[100].curve] == [False, False, True]
    assert [line["loss"] for line in runs[2].curve] == [line["loss"] for line in runs[100].curve]
    ids, targets = held_out[0]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(runs[2].model(ids).flatten(0, 1), targets.flatten())
    assert abs(float(loss) - runs[2].curve[-1]["held_out_loss"]) < 1e-6


def test_what_is_shown():
    """On a terminal a line that lives; elsewhere a line of the first step, of every tenth part and of the last."""
    figures = {"loss": 1.25, "accuracy": 0.5, "ms": 7.0}
    said = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        with Display("run", 30, True, usual, console) as display:
            for step in range(1, 31):
                display.show(figures | {"step": step} | ({"held_out_loss": 0.75} if step == 20 else {}))
        said[terminal] = console.file.getvalue()
    assert "30/30" in said[True] and "loss 1.2500, accuracy  50.0%, held out 0.7500, 7 ms" in said[True]
    assert ["held out" in line for line in said[False].splitlines()] == [False] * 7 + [True] * 4, "the last is kept"
    assert [int(line.split()[2]) for line in said[False].splitlines()] == [1, *range(3, 31, 3)]


def test_what_the_first_process_finds(monkeypatch):
    """What it reads, and what it refuses, is so on all processes."""
    sent = []
    first, second = Processes(0, 2), Processes(1, 2)
    refuse = lambda: Settings(steps=0)  # noqa: E731
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found: sent.append(list(found)))
    assert first.agreed(lambda: 7) == 7
    with pytest.raises(ArgumentError, match="steps is 0"):
        first.agreed(refuse)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found: found.__setitem__(0, sent.pop(0)[0]))
    assert second.agreed(refuse) == 7
    with pytest.raises(ArgumentError, match="steps is 0"):
        second.agreed(lambda: 7)
