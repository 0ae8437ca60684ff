"""All that wants a GPU, unattended: correctness, tests, timings, open questions, tuning; bounded in time, and resumed.

    python benchmarks/on_device.py device_ops --sweeps device_sweeps --minutes 9 --out results --earlier results_before

Each call does what the ones before left, in order, and ends in time: what it starts is killed then, and loses one unit
of work at most. OUT gets four files, and may be taken away after each call and given to the next one as --earlier:
<GPU>-<date>.json of gpu.py, steps.json, log.txt of all output, and sweeps.tar.gz with the log of each sweep. Needs what
gpu.py and `kdagen tune measure` need: no compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import click

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
STAGES = {  # of gpu.py, by step
    "correct": "correct,sanitizer",
    "time": "time",
    "questions": "roles,families,segments,overlap,ratio",
    "more": "more",
}
STEPS = ("correct", "tests", "time", "questions", "sweeps", "more")
ALONE = "beyond_32_bits"  # tests that want most of the GPU's memory
MARGIN = 15  # seconds at the end, to write what was found
LEAST = 30  # without which nothing is begun
EACH = 240  # a file of tests, at most
FACTS = (
    "import json, torch; p = torch.cuda.get_device_properties(0); "
    "print(json.dumps([p.name, torch.__version__, torch.version.cuda]))"
)


@dataclass
class Step:
    """A command, and what its outcome depends on."""

    name: str
    command: list[str]
    under: str
    seconds: float = 1e9  # at most
    environment: dict = field(default_factory=dict)
    until_done: bool = True  # whether a good end means that nothing is left


class Call:
    """One call: how much time is left, and what is known of each step."""

    def __init__(self, out: Path, until: float):
        self.out, self.until, self.lock = out, until, threading.Lock()
        self.steps = json.loads(path.read_text()) if (path := out / "steps.json").exists() else {}
        self.log = (out / "log.txt").open("a")

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def done(self, step: Step) -> bool:
        known, final = self.steps.get(step.name, {}), ("done", "failed") if step.until_done else ("done",)
        return known.get("under") == step.under and known.get("outcome") in final

    def run(self, step: Step) -> None:
        """Its command, unless it is done or there is no time; its process and all of theirs end in time."""
        if self.done(step) or self.left < LEAST:
            return
        began, most = time.monotonic(), min(step.seconds, self.left)
        status, said = run(step.command, most, step.environment)
        outcome = "cut off" if status is None else "failed" if status else "done" if step.until_done else "to go on"
        if outcome == "cut off" and most == step.seconds:
            outcome = "failed"
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        found = {"under": step.under, "outcome": outcome, "seconds": round(time.monotonic() - began, 1), "said": last}
        with self.lock:
            self.steps[step.name] = found
            (self.out / "steps.json").write_text(json.dumps(self.steps, indent=1) + "\n")
            self.log.write(f"\n== {step.name}: {outcome}, {found['seconds']} s\n{said}")
            self.log.flush()
        click.echo(f"{step.name}: {outcome}, {found['seconds']} s: {last}")

    def each(self, steps: list[Step], jobs: int) -> None:
        """Several at a time, those that were never tried first."""
        waiting = deque(sorted(steps, key=lambda step: step.name in self.steps))

        def work() -> None:
            while waiting:
                try:
                    self.run(waiting.popleft())
                except IndexError:  # another thread took the last one
                    return

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run(command: list[str], seconds: float, environment: dict | None = None) -> tuple[int | None, str]:
    """Exit status, None where it was killed after so many seconds, and all that it said. kdagen is this checkout's."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def digest(*places: Path) -> str:
    """Of what a step's outcome depends on: of folders their manifests, of files their text."""
    found = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("manifest.json")) if place.is_dir() else [place]:
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def gpu_step(name: str, ops: Path, out: Path, under: str, minutes: float) -> Step:
    """A call of gpu.py, which knows itself what is left to do."""
    command = [sys.executable, str(HERE / "gpu.py"), str(ops), "--stages", STAGES[name], "--out", str(out)]
    return Step(name, [*command, "--minutes", f"{minutes:.2f}"], under, until_done=False)


def test_steps(ops: Path, under: str) -> list[Step]:
    """A process for each file: after a kernel that reads outside its tensors, one can do no more."""
    environment = {"KDAGEN_BUILD_DIR": str(ops / "default")}
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    made = [
        Step(f"tests {f.stem}", [*pytest, "-k", f"not {ALONE}", str(f)], f"{under} {digest(f)}", EACH, environment)
        for f in files
    ]
    alone = [*pytest, "-k", ALONE, str(ROOT / "tests" / "gpu")]
    return [*made, Step(f"tests {ALONE}", alone, f"{under} {digest(*files)}", EACH, environment)]


def sweep_step(folder: Path, under: str, seconds: float) -> Step:
    """What is left of a sweep's measuring."""
    measure = [sys.executable, "-m", "kdagen.cli", "tune", "measure", "--dir", str(folder)]
    command = [*measure, "--budget", f"{int(seconds)}s"]
    return Step(f"sweep {folder.name}", command, f"{under} {digest(folder / 'sweep.json')}", until_done=False)


def facts() -> str:
    """The GPU and what figures depend on, in a line."""
    status, said = run([sys.executable, "-c", FACTS], 120)
    if status:
        raise click.ClickException(
            f"no GPU here: {said.strip().splitlines()[-1] if said.strip() else 'torch is silent'}"
        )
    return said.strip().splitlines()[-1]


def take(earlier: Path, out: Path, sweeps: list[Path]) -> None:
    """What an earlier call left, if nothing of it is in OUT."""
    for path in sorted(earlier.glob("*")):
        if path.is_file() and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)  # what came from elsewhere may be read-only
    if (packed := out / "sweeps.tar.gz").exists():
        with tarfile.open(packed) as tar:
            for sweep in sweeps:
                _put_log(tar, sweep)


def _put_log(tar: tarfile.TarFile, sweep: Path) -> None:
    """A sweep's log, where it says more than the one that is there: logs only grow."""
    name, log = f"{sweep.name}/log.jsonl", sweep / "log.jsonl"
    if name in tar.getnames():
        found = tar.extractfile(name).read()
        if not log.exists() or len(found) > log.stat().st_size:
            log.write_bytes(found)


def give(out: Path, sweeps: list[Path]) -> None:
    """The logs of all sweeps in one file."""
    if logs := [sweep / "log.jsonl" for sweep in sweeps if (sweep / "log.jsonl").exists()]:
        with tarfile.open(out / "new.tar.gz", "w:gz") as tar:
            for log in logs:
                tar.add(log, f"{log.parent.name}/log.jsonl")
        (out / "new.tar.gz").replace(out / "sweeps.tar.gz")


def left_by(out: Path) -> list[str]:
    """What the last call of gpu.py had no time for."""
    found = sorted(out.glob("*-????-??-??.json"), key=lambda path: path.stat().st_mtime)
    left = json.loads(found[-1].read_text())["left"] if found else []
    return [line for line in left if line.endswith("no time")]


def do(call: Call, name: str, ops: Path, sweeps: list[Path], under: str, jobs: int) -> None:
    """One of STEPS."""
    if name == "tests":
        *files, alone = test_steps(ops, under)
        call.each(files, jobs)
        return call.run(alone)
    if name == "sweeps":
        for sweep in sweeps:
            began, seconds = time.monotonic(), call.left - MARGIN
            step = sweep_step(sweep, under, seconds)
            call.run(step)
            _settle(call, step, time.monotonic() - began < seconds - LEAST)
        return give(call.out, sweeps)
    step = gpu_step(name, ops, call.out, under, (call.left - MARGIN) / 60)
    call.run(step)
    return _settle(call, step, not left_by(call.out))


def _settle(call: Call, step: Step, all_of_it: bool) -> None:
    """What ended well and left nothing is done."""
    known = call.steps.get(step.name)
    if known and known["outcome"] == "to go on" and all_of_it:
        known["outcome"] = "done"
        (call.out / "steps.json").write_text(json.dumps(call.steps, indent=1) + "\n")


@click.command()
@click.argument("ops", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--sweeps", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Folder of folders that `kdagen tune plan` and `compile` left.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--earlier", type=click.Path(path_type=Path, file_okay=False), help="OUT of an earlier call.")
@click.option("--minutes", default=9.0, show_default=True, help="All is over after this time.")
@click.option("--steps", default=",".join(STEPS), show_default=True, help="Which, in which order.")
@click.option("--jobs", default=4, show_default=True, help="Files of tests at a time.")
def main(ops, sweeps, out, earlier, minutes, steps, jobs) -> None:
    """Do all that wants a GPU with the packages of OPS, as pack_for_device.py leaves them."""
    until, names = time.monotonic() + 60 * minutes, [name for name in steps.split(",") if name]
    if unknown := [name for name in names if name not in STEPS]:
        raise click.UsageError(f"--steps {','.join(unknown)}: expected some of {', '.join(STEPS)}")
    ops, out = ops.resolve(), out.resolve()
    folders = [path.parent for path in sorted(sweeps.resolve().glob("*/sweep.json"))] if sweeps else []
    out.mkdir(parents=True, exist_ok=True)
    if earlier and earlier.is_dir():
        take(earlier, out, folders)
    gpu = facts()
    under, call = f"{digest(ops)} {gpu}", Call(out, until)
    click.echo(gpu)
    for name in names:
        do(call, name, ops, folders, under, jobs)
    asked = [*names, *(f"sweep {folder.name}" for folder in folders)]
    open_ = [n for n in asked if n not in ("tests", "sweeps") and call.steps.get(n, {}).get("outcome") != "done"]
    open_ += [n for n, found in call.steps.items() if n.startswith("tests ") and found["outcome"] != "done"]
    click.echo(f"{out}: to go on with, or failed: {', '.join(open_)}" if open_ else f"{out}: all is done")


if __name__ == "__main__":
    main()
