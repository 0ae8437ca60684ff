"""The one directory that plan, compile, measure, publish, why and report exchange, on one machine or carried between.

sweep.json            what is tuned (kdagen.autotune.sweep.Sweep)
log.jsonl             what was found (kdagen.autotune.log)
kernels/<key>/        compiled kernels, each once, whichever candidates share it
candidates/<id>.json  the manifest of a compiled candidate, whose libraries lie in kernels/
report.html
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from kdagen.autotune.log import Log
from kdagen.autotune.sweep import Sweep

from kdagen.build.folder import write_file
from kdagen.errors import ArtefactError

FORMAT = 1
SWEEP = "sweep.json"


class Folder:
    """A directory of a sweep; `create` makes one, all else wants one that is there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.log = Log(self.path / "log.jsonl")
        self.kernels, self.candidates = self.path / "kernels", self.path / "candidates"

    @staticmethod
    def create(path: str | Path, sweep: Sweep) -> Folder:
        """The directory of this sweep: new, or one that was made for the same."""
        folder = Folder(path)
        if (folder.path / SWEEP).exists():
            if folder.sweep != sweep:
                raise ArtefactError(
                    f"{folder.path} holds another sweep ({', '.join(s.task.name for s in folder.sweep.studies)}): "
                    f"choose another --dir, or go on with this one by leaving the options of `plan` out"
                )
            return folder
        if folder.path.exists() and any(folder.path.iterdir()):
            raise ArtefactError(f"{folder.path} is not empty and holds no {SWEEP}: choose a new --dir")
        write_file(folder.path / SWEEP, json.dumps({"format": FORMAT, **sweep.fields()}, indent=1) + "\n")
        return folder

    @cached_property
    def sweep(self) -> Sweep:
        """What is tuned here."""
        try:
            fields = json.loads((self.path / SWEEP).read_text())
            assert fields.pop("format") == FORMAT
            return Sweep.of(fields)
        except FileNotFoundError:
            raise ArtefactError(
                f"{self.path} holds no {SWEEP}: make it with `kdagen tune plan --dir {self.path}`"
            ) from None
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ArtefactError(
                f"{self.path / SWEEP} is damaged, or of another version of kdagen: expected format {FORMAT}; plan anew"
            ) from None

    def manifest(self, candidate: str) -> dict | None:
        """That of a compiled candidate."""
        path = self.candidates / f"{candidate}.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError:
            raise ArtefactError(f"{path} is damaged: compile it again with `kdagen tune compile`") from None

    @contextmanager
    def lock(self):
        """Held by whoever appends to the log; a second one is refused, not kept waiting."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise ArtefactError(
                f"another `kdagen tune` works in {self.path}: wait for it, or choose another --dir"
            ) from None
