"""The output folder: an importable package, other ops kept, swapped in whole, nobody else's folder touched."""

import subprocess
import sys

import pytest
import toy

from kdagen.build import folder
from kdagen.errors import ArtefactError
from kdagen.runtime import manifest


def write(out, tmp_path, op="toy", text="1", variant="sm90-bf16-64x64"):
    """An op of one file in the folder `out`."""
    file = tmp_path / "kernel.py"
    file.write_text(text)
    return folder.write_op(out, op, variant, [file], {"name": op, "plan": toy.toy(op).plan(), "kernels": []})


def test_a_second_op_and_a_second_variant_join_the_first(tmp_path):
    out = tmp_path / "my_ops"
    first = write(out, tmp_path, "one")
    write(out, tmp_path, "two")
    other = write(out, tmp_path, "one", variant="sm80-bf16-64x64")
    assert manifest.read(first)["name"] == manifest.read(other)["name"] == "one"
    package = (out / "__init__.py").read_text()
    assert 'one = BuiltOp(_here / "one")\ntwo = BuiltOp(_here / "two")\n' in package
    assert '__all__ = ["one", "two"]' in package


def test_the_package_imports_without_loading_a_kernel(tmp_path):
    write(tmp_path / "my_ops", tmp_path)
    code = "from my_ops import toy; print(toy.name, toy.arguments, 'torch' in __import__('sys').modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "toy ['x', 'g'] False\n", run.stderr


def test_building_again_replaces_a_variant_whole(tmp_path):
    out = tmp_path / "my_ops"
    place = write(out, tmp_path, text="old")
    (place / "left_over.py").write_text("")
    assert write(out, tmp_path, text="new") == place
    assert sorted(f.name for f in place.iterdir()) == ["kernel.py", "manifest.json"]
    assert (place / "kernel.py").read_text() == "new"


def test_a_file_system_without_exchange_gets_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda *_, **__: object())
    place = write(tmp_path / "my_ops", tmp_path, text="old")
    write(tmp_path / "my_ops", tmp_path, text="new")
    assert (place / "kernel.py").read_text() == "new"
    assert [f.name for f in place.parent.iterdir()] == [place.name]


def test_what_a_killed_build_left_is_removed(tmp_path):
    out = tmp_path / "my_ops"
    write(out, tmp_path)
    (out / "toy" / f"{folder.UNFINISHED}abc").mkdir()
    write(out, tmp_path)
    assert [f.name for f in (out / "toy").iterdir()] == ["sm90-bf16-64x64"]


def test_a_folder_of_which_only_the_start_was_made_is_ours(tmp_path):
    out = tmp_path / "my_ops"
    out.mkdir()
    (out / f"{folder.UNFINISHED}abc").write_text("")
    assert write(out, tmp_path).exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match="is not empty and was not made by kdagen .it has no kdagen.json"):
        write(tmp_path / "mine", tmp_path)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="file is a file: expected a folder"):
        write(tmp_path / "file", tmp_path)
