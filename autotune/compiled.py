"""Compiled candidates in a folder that is carried to a GPU: each library once, whichever candidates share it.

A candidate's manifest is written last, and names each library with its hash: one that was half copied, or damaged on
the way, is found before it is loaded. Loading needs neither nvcc nor TileLang.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kdagen.autotune.folder import Folder

from kdagen.build.folder import write_file
from kdagen.errors import ArtefactError
from kdagen.runtime import manifest as manifests
from kdagen.runtime.loader import LoadedOp

FIX = "compile it again with `kdagen tune compile`"


def keep(folder: Folder, candidate: str, source, entries: dict[str, Path]) -> None:
    """Puts a candidate's libraries and manifest into the folder; `entries`: its kernels in the cache, by key."""
    from kdagen.build.builder import manifest_of
    from kdagen.build.kernel import REPORT

    reports, files = [], {}
    for key, entry in entries.items():
        report = json.loads((entry / REPORT).read_text())
        name = f"{key}/{report['library']}"
        files[name] = _put(folder.kernels / name, (entry / report["library"]).read_bytes())
        _put(folder.kernels / key / REPORT, (entry / REPORT).read_bytes())
        reports.append({**report, "library": name, "source": None, "code": None})  # these stay in the cache
    manifest = {"format": manifests.FORMAT, **manifest_of(source, reports), "files": files}
    _put(folder.candidates / f"{candidate}.json", json.dumps(manifest, indent=1).encode() + b"\n")


def load(folder: Folder, candidate: str) -> LoadedOp:
    """A candidate's kernels, once their hashes agree.

    Raises:
        ArtefactError: it is not compiled, or something of it is missing or damaged.
    """
    path = folder.candidates / f"{candidate}.json"
    try:
        manifest = folder.manifest(candidate)
        if manifest is None:
            raise ArtefactError(f"{path} is missing, so {candidate} is not compiled: {FIX}")
        assert manifest["format"] == manifests.FORMAT
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ArtefactError(f"{path} is damaged, or of another version of kdagen: {FIX}") from None
    manifests.verify(folder.kernels, files, FIX, path.name)
    return LoadedOp(folder.kernels, manifest)


def _put(path: Path, data: bytes) -> str:
    """Writes a file in one step, unless it is there already; its sha256."""
    if not path.exists() or path.read_bytes() != data:
        write_file(path, data)
    return hashlib.sha256(data).hexdigest()
