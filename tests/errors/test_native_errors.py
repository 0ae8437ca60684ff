"""Messages where the loop that decodes on the CPU cannot be compiled or loaded: ops log them and go on by torch."""

import re

import pytest
import sympy

from kdagen.build import native, toolchain
from kdagen.errors import RecurrenceError, ToolchainError
from kdagen.lower.c_expression import c_text
from kdagen.runtime import cpu_native


def raises(error, message: str):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


def compiler(path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    with raises(
        ToolchainError,
        "no C compiler found ($CC is '/nowhere/cc', which is not there); it compiles the loop that decodes on the "
        "CPU: install gcc (apt install build-essential) or set CC",
    ):
        native.library("x", "int x;")


def test_a_compiler_that_fails(cache, monkeypatch, tmp_path):
    cc = compiler(tmp_path / "cc", "echo 'x.c:1: error: no' >&2; exit 1")
    monkeypatch.setenv("CC", cc)
    with raises(
        ToolchainError,
        f"{cc} failed on x.c: x.c:1: error: no (full log {cache / 'failed' / 'x.log'}, source "
        f"{cache / 'failed' / 'x.c'})",
    ):
        native.library("x", "int x;")
    assert (cache / "failed" / "x.c").read_text() == "int x;" and not list((cache / "entries").iterdir())


def test_a_compiler_that_hangs(cache, monkeypatch, tmp_path):
    cc = compiler(tmp_path / "cc", "exec sleep 5")
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(native, "SECONDS", 0.3)
    with raises(toolchain.Died, f"{cc} hung: it was stopped after 0.3 s"):
        native.library("x", "int x;")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    message = f"^{re.escape(str(tmp_path / 'file' / 'cache'))} cannot keep a compiled library .*: set KDAGEN_CACHE_DIR "
    with pytest.raises(ToolchainError, match=message + "to a folder that can be written$"):
        native.library("x", "int x;")


def test_a_library_that_does_not_load(tmp_path):
    path = tmp_path / "x.so"
    path.write_text("not a library")
    message = f"^{re.escape(str(path))} does not load .*: remove {re.escape(str(tmp_path))}, and it is compiled again$"
    with pytest.raises(ToolchainError, match=message):
        cpu_native._loaded(path)


def test_a_function_that_c_has_not():
    x = sympy.Symbol("x", real=True)
    with pytest.raises(RecurrenceError, match=r"^'sin\(x\)' has no form in C: expected functions among exp, log, tanh"):
        c_text(sympy.sin(x), {x: "x"})
