"""The folder of a run: what it is (run.json), how it went (metrics.jsonl), where it is (checkpoint.pt).

Whatever moment a process is killed at, the folder goes on from the last checkpoint: files are written aside and
renamed, and figures of steps that came after the checkpoint are dropped, for these steps come again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from kdagen.errors import TrainingError

FORMAT = "kdagen-run-1"


class Folder:
    """A run's files."""

    def __init__(self, path):
        self.path, self.lock = Path(path), None
        self.run, self.metrics, self.checkpoint = map(
            self.path.joinpath, ("run.json", "metrics.jsonl", "checkpoint.pt")
        )

    def open(self, said: dict) -> dict | None:
        """The checkpoint to go on from, None for a new run.

        Raises:
            TrainingError: the folder is of a run with other settings, used by another process, or damaged.
        """
        self._lock()
        try:
            return self._opened(json.loads(json.dumps({"format": FORMAT, **said})))
        except BaseException:
            self.close()
            raise

    def _opened(self, said: dict) -> dict | None:
        if not self.run.exists():
            if self.checkpoint.exists() or self.metrics.exists():
                raise TrainingError(
                    f"{self.path} has no run.json beside its checkpoint: expected a new folder, or all of a run"
                )
            written(self.run, lambda path: path.write_text(json.dumps(said, indent=2) + "\n"))
        self._compare(said)
        return self._resumed()

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock")  # the system lets go of it, however a process ends
            self.lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"{self.path} is in use: another process trains there; expected a folder for each run"
            ) from None
        except OSError as error:
            raise TrainingError(f"{self.path}: expected a folder that can be written: {error}") from None

    def close(self) -> None:
        """Lets others train here."""
        if self.lock is not None:
            self.lock.release()

    def _compare(self, said: dict) -> None:
        found = self._json()
        unlike = [f"  {name}: {old!r} there, {new!r} now" for name, old, new in differences(found, said)]
        if unlike:
            raise TrainingError(
                "\n".join([f"{self.path} is of a run with other settings:", *unlike])
                + "\nexpected the same settings to go on with it, or another folder (--out) for a new run"
            )

    def _json(self) -> dict:
        try:
            found = json.loads(self.run.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.run}: expected what a run was started with: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise TrainingError(f"{self.run}: expected a run of format {FORMAT}, such as training writes")
        return found

    def _resumed(self) -> dict | None:
        import torch

        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)
            return None
        try:
            found = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, as files can be damaged
            raise TrainingError(
                f"{self.checkpoint}: expected a checkpoint: {error}; start again in a new folder"
            ) from None
        self._drop_after(found["step"])
        return found

    def _drop_after(self, step: int) -> None:
        """Of the figures those of the checkpoint's steps; a line that was cut off is one of a later step."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        if len(lines) < step or not all(line.endswith("\n") for line in lines[:step]):
            raise TrainingError(
                f"{self.metrics} has {len(lines)} steps, checkpoint.pt is of step {step}: expected a line for each; "
                f"put the file back, or start again in a new folder"
            )
        written(self.metrics, lambda path: path.write_text("".join(lines[:step])))

    def curve(self) -> list[dict]:
        """The figures of each step so far."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def note(self, figures: dict) -> None:
        """Adds a line to the figures."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(figures) + "\n")

    def save(self, state: dict) -> None:
        """Replaces the checkpoint."""
        import torch

        if self.metrics.exists():
            _on_disk(self.metrics)  # before a checkpoint that needs its lines
        written(self.checkpoint, lambda path: torch.save(state, path))


def written(path: Path, write) -> None:
    """A file written aside, then renamed: whoever reads sees the old or the new one, whole."""
    aside = path.with_name(path.name + ".new")
    write(aside)
    _on_disk(aside)
    os.replace(aside, path)
    _on_disk(path.parent)


def _on_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def differences(old: dict, new: dict, within: str = "") -> list[tuple]:
    """Where two settings differ: (name, old, new)."""
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name, "missing"), new.get(name, "missing")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{within}{name}.")
        elif a != b:
            found.append((within + name, a, b))
    return found
