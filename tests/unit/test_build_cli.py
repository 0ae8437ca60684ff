"""The command line: quick to answer, and options as people write them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import toy
from click.testing import CliRunner

from kdagen import cli, cli_build, debug
from kdagen.build import builder, progress
from kdagen.purposes import PURPOSES
from kdagen.state import StateType
from kdagen.target import TARGETS

HEAVY = {"torch", "tilelang", "sympy", "numpy", "jinja2", "rich", "tvm_ffi"}


@pytest.mark.parametrize("command", [["--help"], ["build", "--help"]])
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from click.testing import CliRunner
from kdagen import cli
result = CliRunner().invoke(cli.main, {command!r})
print(result.exit_code, sorted({HEAVY!r} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "0 []\n", run.stderr


def test_help_lists_commands_and_environment():
    text = CliRunner().invoke(cli.main, ["--help"]).output
    assert "build" in text
    assert all(name in text for name in debug.VARIABLES) and len(debug.VARIABLES) <= 8


def test_every_command_that_is_listed_is_there():
    listed = cli.main.list_commands(None)
    assert "build" in listed
    assert all(CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0 for name in listed)


def test_build_help_names_every_target():
    text = CliRunner().invoke(cli.main, ["build", "--help"]).output
    assert all(name in text for name in TARGETS)


@pytest.mark.parametrize(("text", "dims"), [("128", (128, 128)), ("128,64", (128, 64)), ("64, 128", (64, 128))])
def test_head_dims(text, dims):
    assert cli_build.pair("--head-dim", text) == dims


def test_schedule_choices():
    assert cli_build.choices(("chunk_size=32", "decay=tree")) == {"chunk_size": 32, "decay": "tree"}


LINE = "--arch sm90,sm80 --arch sm_120a --op one --op two --head-dim 64 --schedule stages=3 --jobs 3"


@pytest.fixture
def asked(monkeypatch):
    """What `kdagen build` asks the pipeline for, by what it asks with; its builds are under "built"."""
    found = {"inference": [], "training": [], "decode": [], "built": []}

    def compiler(which):
        def make(*options, template_folders, state):
            found[which].append(options)
            found["states"] = state
            return toy.toy(options[0])

        return make

    monkeypatch.setattr(sys.modules["kdagen.recurrence"], "load", lambda spec: spec)
    monkeypatch.setattr("kdagen.pipeline.compile_op", compiler("inference"))
    monkeypatch.setattr("kdagen.pipeline.compile_training", compiler("training"))
    monkeypatch.setattr("kdagen.pipeline.compile_decode", compiler("decode"), raising=False)
    built = lambda sources, out, jobs, shown: found["built"].append((len(sources), out, jobs)) or []  # noqa: E731
    monkeypatch.setattr(builder, "build", built)
    return found


def build(line, out):
    result = CliRunner().invoke(cli.main, ["build", *line.split(), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0


def calls(fields) -> list:
    return [
        (op, (64, 64), "bfloat16", arch, fields, None) for op in ("one", "two") for arch in ("sm90", "sm80", "sm120")
    ]


def test_options_become_sources_and_sources_are_built(asked, tmp_path):
    """--op and --arch multiply; commas and repetition both list; each is built for every purpose."""
    build(LINE, tmp_path)
    assert asked == {
        "inference": calls({"stages": 3}),
        "training": calls({"keep": "states"}),
        "decode": calls({}),
        "built": [(18, tmp_path, 3)],
        "states": StateType(),
    }


def test_training_and_decoding_have_choices_of_their_own(asked, tmp_path):
    build(f"{LINE} --keep all --training-schedule segment=4 --decode-schedule v_tile=64", tmp_path)
    assert asked["training"] == calls({"keep": "all", "segment": 4})
    assert asked["decode"] == calls({"v_tile": 64})


@pytest.mark.parametrize("purposes", [("inference",), ("training",), ("decode",), ("inference", "decode")])
def test_only_some_purposes(asked, tmp_path, purposes):
    build(f"{LINE} {' '.join(f'--only {purpose}' for purpose in purposes)}", tmp_path)
    assert {name for name in PURPOSES if asked[name]} == set(purposes)
    assert asked["built"] == [(6 * len(purposes), tmp_path, 3)]


def test_the_type_of_states(asked, tmp_path):
    build(f"{LINE} --state-layout VK --state-dtype bfloat16", tmp_path)
    assert asked["states"] == StateType("VK", "bfloat16")


def test_without_a_terminal_progress_is_plain_lines(capsys):
    jobs = {"a": progress_job("one"), "b": progress_job("two")}
    with progress.Progress().over(jobs, done={"a"}) as say:
        say("b", "lowering")
        say("b", "done")
    assert capsys.readouterr().err == "[1/2] two (sm90, training): lowering\n[2/2] two (sm90, training): done\n"


def test_nothing_to_do_shows_nothing(capsys):
    jobs = {"a": progress_job("one")}
    with progress.Progress().over(jobs, done=jobs):
        pass
    assert capsys.readouterr().err == ""


def progress_job(name):
    return SimpleNamespace(name=name, target="sm90", purpose="training" if name == "two" else "inference")


def test_what_spills_is_warned_of():
    kernel = {"name": "kda_scan", "spill_stores": 8, "spill_loads": 12, "warnings": ["ptxas info : (C7512) serialized"]}
    assert progress.warnings(kernel) == [
        "kda_scan spills 20 bytes of registers to memory: right, but slower",
        "kda_scan: ptxas info : (C7512) serialized",
    ]
    assert progress.warnings(kernel, "training")[0].startswith("kda_scan (training) spills 20 bytes")


def test_the_environment_decides_the_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KDAGEN_BUILD_DIR", str(tmp_path / "ops"))
    assert (debug.cache_dir(), debug.build_dir()) == (tmp_path / "cache", tmp_path / "ops")
    monkeypatch.delenv("KDAGEN_CACHE_DIR")
    monkeypatch.delenv("KDAGEN_BUILD_DIR")
    assert debug.cache_dir().name == "kdagen" and str(debug.build_dir()) == "kdagen_ops"


@pytest.mark.parametrize(("text", "level"), [("0", 0), ("3", 3), ("yes", 1), ("", 1)])
def test_the_debug_level(monkeypatch, text, level):
    monkeypatch.setenv("KDAGEN_DEBUG", text)
    assert debug.level() == level
