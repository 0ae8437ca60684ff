"""Messages of the log's folder, of devices and of what measures on them."""

import pytest
from kdagen.autotune import pool
from kdagen.autotune.bench import Bench
from kdagen.autotune.devices import open_device
from kdagen.autotune.folder import Folder
from kdagen.autotune.measure import measure
from kdagen.autotune.pool import Worker, WorkerDied
from kdagen.autotune.progress import Silent
from kdagen.autotune.sweep import Candidate, Policy, Sweep
from recordings import DEFAULT, SHAPE, STUDY, TASK, planned, recording

from kdagen.errors import ArgumentError, ArtefactError, KdagenError, LaunchError


def message(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    return str(raised.value)


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["gpu", "cuda", "cuda:x", "replay", "replay:", ""])
def test_a_device_that_is_none(spec):
    assert message(ArgumentError, open_device, spec) == (
        f"device '{spec}': expected cuda:N such as cuda:0, cpu, or replay:LOG.jsonl"
    )


def test_a_recording_of_nothing(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"task": "t", "candidate": "c", "rung": "model", "verdict": "kept"}\n')
    assert message(ArgumentError, open_device, f"replay:{log}") == (
        f"{log} records nothing that was measured: expected the log.jsonl of a finished sweep"
    )


def test_an_option_that_a_replay_has_not(tmp_path):
    assert message(ArgumentError, open_device, "replay:log.jsonl?faster=2") == (
        "option faster of replay: expected seed, slower or faults"
    )


def test_a_candidate_that_was_not_recorded(tmp_path):
    device = open_device(recording(tmp_path / "log.jsonl"))
    other = Candidate.of(TASK, {"v_tile": 128})
    assert message(ArgumentError, device.check, other) == (
        f"{tmp_path / 'log.jsonl'} does not record candidate {other.id} at correct"
    )
    assert message(ArgumentError, device.samplers, [(other, None)], SHAPE, Policy()) == (
        f"{tmp_path / 'log.jsonl'} does not record candidate {other.id} at screen on 64x1x32"
    )


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_whose_device_does_not_open_says_why_and_is_not_tried_again(tmp_path):
    worker = Worker("replay:nowhere.jsonl")
    assert message(ArgumentError, worker.ask, {"do": "facts"}, 5) == (
        "replay:nowhere.jsonl: nowhere.jsonl records nothing that was measured: expected the log.jsonl of a finished "
        "sweep"
    )
    assert worker.process.poll() is not None


def test_a_worker_that_does_not_start_tells_how_to_see_why(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ImportError: libtorch.so' >&2; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(script))
    assert message(LaunchError, Worker("cpu").ask, {"do": "facts"}, 5) == (
        f"no worker starts on cpu: the worker ended with exit status 3 (ImportError: libtorch.so): "
        f"try `{script} -m kdagen.autotune.worker cpu` by hand"
    )


@pytest.mark.parametrize("dies", [True, False])
def test_a_device_that_has_no_answer_to_the_first_question(dies):
    class Wordless:
        device = "cuda:0"

        def ask(self, request, timeout, say):
            if dies:
                raise WorkerDied("crash", "the worker died of SIGSEGV", None)
            return {"error": "error", "reason": "RuntimeError: no driver", "running": None}

    why = "the worker died of SIGSEGV" if dies else "RuntimeError: no driver"
    assert message(KdagenError, Bench(Wordless()).open, 1, Silent()) == (
        f"cuda:0 does not answer: {why}: expected a device that is free and works"
    )


# -- measure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices, said", [([], "(none)"), (["cpu", "cpu"], "cpu, cpu")])
def test_devices_that_are_none_or_the_same(tmp_path, devices, said):
    assert message(ArgumentError, measure, planned(tmp_path / "sweep"), devices, None, Silent()) == (
        f"devices {said}: expected one or more, each once, such as cuda:0"
    )


def test_the_last_device_that_is_lost_says_why(tmp_path):
    folder = planned(tmp_path / "sweep")

    class Lost:
        device = "cuda:0"

        def ask(self, request, timeout, say):
            if request["do"] == "facts":
                return {"facts": {"device": "G", "processors": 1, "versions": {}, "compiled": False, "kernels": "k"}}
            raise LaunchError("cuda:0: no GPU is left")

        def end(self):
            pass

    options = {"workers": [Lost()], "todo": lambda *_: [DEFAULT]}
    assert message(LaunchError, measure, folder, [], None, Silent(), **options) == "cuda:0: no GPU is left"


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_sweep(tmp_path):
    folder = planned(tmp_path / "sweep")
    assert message(ArtefactError, Folder.create, folder.path, Sweep((STUDY,), seed=1)) == (
        f"{folder.path} holds another sweep ({TASK.name}): choose another --dir, or go on with this one by leaving the "
        f"options of `plan` out"
    )


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    assert message(ArtefactError, Folder.create, tmp_path, Sweep((STUDY,))) == (
        f"{tmp_path} is not empty and holds no sweep.json: choose a new --dir"
    )


def test_a_folder_that_was_not_planned(tmp_path):
    assert message(ArtefactError, lambda: Folder(tmp_path).sweep) == (
        f"{tmp_path} holds no sweep.json: make it with `kdagen tune plan --dir {tmp_path}`"
    )


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 0}', '{"format": 1, "studies": 3}', "[]"])
def test_a_damaged_sweep(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert message(ArtefactError, lambda: Folder(tmp_path).sweep) == (
        f"{tmp_path / 'sweep.json'} is damaged, or of another version of kdagen: expected format 1; plan anew"
    )


def test_a_damaged_manifest(tmp_path):
    folder = planned(tmp_path / "sweep")
    folder.candidates.mkdir()
    (folder.candidates / "c.json").write_text("{")
    assert message(ArtefactError, folder.manifest, "c") == (
        f"{folder.candidates / 'c.json'} is damaged: compile it again with `kdagen tune compile`"
    )


def test_a_folder_in_use(tmp_path):
    folder = planned(tmp_path / "sweep")

    def twice():
        with folder.lock(), folder.lock():
            pass

    assert message(ArtefactError, twice) == (
        f"another `kdagen tune` works in {folder.path}: wait for it, or choose another --dir"
    )
