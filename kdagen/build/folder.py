"""The folder that a build leaves: an importable package with a sub-folder for each op and variant.

    DIR/__init__.py  DIR/kdagen.json  DIR/<op>/<variant>/{manifest.json, <kernel>.py, <kernel>.cu, <kernel>.so}

A variant is swapped in whole; builds into one folder take turns; a folder that is not ours is left alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from pathlib import Path

from kdagen.errors import ArtefactError
from kdagen.runtime import manifest as manifests

MARKER = "kdagen.json"
UNFINISHED = ".tmp-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
INIT = '''"""Ops built by kdagen: {names}. Generated; `kdagen build` writes it anew.

Each is called like what `kdagen.compile` returns: o, final_state = op(q, k, v, ..., output_final_state=True).
Needs torch, apache-tvm-ffi and kdagen's runtime: no compiler, no TileLang.
"""

from pathlib import Path

from kdagen.runtime.package import BuiltOp

_here = Path(__file__).parent
{ops}
__all__ = [{quoted}]
'''


def check_ours(out: Path) -> None:
    """Refuses a folder that holds something that kdagen did not put there."""
    if out.exists() and not out.is_dir():
        raise ArtefactError(f"--out {out} is a file: expected a folder, new or made by kdagen")
    if out.is_dir() and not (out / MARKER).exists() and any(not f.name.startswith(UNFINISHED) for f in out.iterdir()):
        raise ArtefactError(
            f"--out {out} is not empty and was not made by kdagen (it has no {MARKER}): "
            f"nothing was written; choose another folder or empty this one"
        )


def write_op(out: Path, op: str, variant: str, files: list[Path], contents: dict) -> Path:
    """Puts an op's files and manifest into DIR/<op>/<variant>, in one step, and lists the op in DIR/__init__.py."""
    from filelock import FileLock

    check_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / MARKER, json.dumps({"format": manifests.FORMAT, "made_by": "kdagen"}) + "\n")
    with FileLock(out / ".lock"):
        for leftover in out.glob(f"*/{UNFINISHED}*"):  # of a build that was killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        place = write_variant(out / op / variant, files, contents)
        write_file(out / "__init__.py", _package(out))
    return place


def write_variant(place: Path, files: list[Path], contents: dict) -> Path:
    """A folder with these files and a manifest, swapped in whole for whatever is at `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=place.parent))
    try:
        os.chmod(fresh, 0o755)
        for file in files:
            shutil.copy(file, fresh)
        manifests.write(fresh, contents)
        _swap(fresh, place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def remove_tuned(place: Path, keep: set[Path]) -> None:
    """Removes folders of tuned schedules beside that of the default one: those of an earlier build."""
    for old in sorted(place.parent.glob(f"{place.name}-t*")):
        if manifests.TUNED.fullmatch(old.name.removeprefix(place.name)) and old not in keep:
            shutil.rmtree(old)


def _package(out: Path) -> str:
    names = sorted(path.parent.parent.name for path in out.glob(f"[!.]*/[!.]*/{manifests.MANIFEST}"))
    names = list(dict.fromkeys(names))
    ops = "".join(f'{name} = BuiltOp(_here / "{name}")\n' for name in names)
    return INIT.format(names=", ".join(names), ops=ops, quoted=", ".join(f'"{name}"' for name in names))


def write_file(path: Path, contents: str | bytes) -> None:
    """A small file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
    os.chmod(name, 0o644)
    os.replace(name, path)


def _swap(fresh: Path, place: Path) -> None:
    """Exchanges two folders at once where the file system can; else with a moment in which `place` is not there."""
    if not place.exists():
        os.replace(fresh, place)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    both = os.fsencode(fresh), os.fsencode(place)
    if not hasattr(libc, "renameat2") or libc.renameat2(AT_FDCWD, both[0], AT_FDCWD, both[1], RENAME_EXCHANGE):
        aside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=place.parent))
        os.replace(place, aside / "old")
        os.replace(fresh, place)
        shutil.rmtree(aside, ignore_errors=True)
