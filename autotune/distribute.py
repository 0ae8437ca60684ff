"""Candidates spread over a Ray cluster: its devices as workers for `measure`, its cores as compilers for `compile`.

A device has an actor, on whichever host has room for it, which drives a worker process there (kdagen.autotune.pool): a
kernel that crashes ends that process, not the actor. Hosts need share no disk: a candidate's libraries travel as bytes
with the first request that needs them, each once to each actor, and kernels that were compiled travel back. Hosts need
kdagen in the Python that Ray runs, with what `measure` needs, or with what `compile` does.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kdagen.autotune.folder import Folder
from kdagen.autotune.pool import START_SECONDS, Worker, WorkerDied

from kdagen import debug, errors
from kdagen.errors import ArgumentError, KdagenError, LaunchError, ToolchainError

ROOM_SECONDS = 60  # for a host to have room; one that has none now is taken by something else
SLACK_SECONDS = 60  # beyond what an actor was given, for the way there and back


def connect(address: str | None):
    """Ray, connected to the cluster at an address, else to one at hand, else to one that is started here."""
    try:
        import ray
    except ImportError:
        raise ToolchainError("Ray is not installed: pip install 'kdagen[ray]'") from None
    if not ray.is_initialized():
        alone = {} if address else {"include_dashboard": False}
        debug.keep_ray_to_itself()
        try:
            ray.init(address, log_to_driver=False, logging_level="warning", **alone)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"--ray {address or ''}: no cluster of Ray answers ({str(error).splitlines()[0]}): expected the "
                f"address of one, such as auto or 10.0.0.1:6379, or none to start one here"
            ) from None
    return ray


# -- measuring --------------------------------------------------------------------------------------------------------


def workers(devices: list[str], address: str | None = None) -> list[RayWorker]:
    """A worker a device: "cuda:0", "cuda:1" and so on are the cluster's GPUs, "cpu" is a whole host; all GPUs if none
    are given. For `kdagen.autotune.measure.measure(..., workers=)`.

    Raises:
        LaunchError: the cluster has no room for a device.
    """
    ray = connect(address)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not (devices := devices or [f"cuda:{i}" for i in range(gpus)]):
        raise ArgumentError("the Ray cluster has no GPU: expected one, or name what to measure on by --device")
    found: list[RayWorker] = []
    try:
        for spec in devices:
            found.append(RayWorker(spec))
    except BaseException:
        for worker in found:
            worker.end()
        raise
    return found


class RayWorker:
    """A device of the cluster; asked as kdagen.autotune.pool.Worker is, by one thread at a time."""

    def __init__(self, spec: str):
        self.spec, self.actor, self.node = spec, None, None
        self._start()

    def ask(self, request: dict, timeout: float, say=None) -> dict:
        """The reply; raises WorkerDied, or the KdagenError that says why no worker starts, as a local one does."""
        import ray

        if self.actor is None:
            self._start(say)
        files = self._unsent(request)
        try:
            call = self.actor.ask.remote(request, timeout, files)
            answer = ray.get(call, timeout=max(0.0, timeout) + START_SECONDS + SLACK_SECONDS)
        except ray.exceptions.GetTimeoutError:
            self.end()
            raise WorkerDied("hang", f"no answer from {self.device} within {timeout:.3g} s", None) from None
        except ray.exceptions.RayActorError:
            self.end()
            raise WorkerDied("crash", f"the actor of {self.device} is gone", None) from None
        self.sent |= files.keys()
        for note in answer["notes"] if say else ():
            say.note(note)
        if "died" in answer:
            raise WorkerDied(*answer["died"])
        if "error" in answer:
            raise _raised(*answer["error"])
        return answer["reply"]

    def end(self) -> None:
        """Ends the actor and its process; the next request finds new ones."""
        import ray

        actor, self.actor = self.actor, None
        if actor is not None:
            with contextlib.suppress(Exception):  # whatever is the matter with it, it is killed
                ray.get(actor.end.remote(), timeout=SLACK_SECONDS)
            ray.kill(actor)

    def _start(self, say=None) -> None:
        """An actor; after the first one's death on the same host, whose device it goes on to stand for."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        if say:
            say.note(f"{self.device}: its actor is started again")
        where = {"scheduling_strategy": On(self.node, soft=False)} if self.node else {}
        room = _room(self.spec, [n["Resources"] for n in ray.nodes() if n["Alive"]])
        self.actor, self.sent = ray.remote(Remote).options(max_concurrency=2, **room, **where).remote(self.spec), set()
        try:
            self.node, self.device = ray.get(self.actor.where.remote(), timeout=ROOM_SECONDS)
        except ray.exceptions.GetTimeoutError:
            self._give_up()
            raise LaunchError(
                f"no host of the Ray cluster has room for {self.spec}, which takes {room}: it has {_has()} in all; "
                f"wait until that is free, or name other devices by --device"
            ) from None
        except ray.exceptions.RayError as error:
            self._give_up()
            raise LaunchError(_no_start(f"worker for {self.spec}", error)) from None

    def _give_up(self) -> None:
        import ray

        ray.kill(self.actor)
        self.actor = None

    def _unsent(self, request: dict) -> dict[tuple[str, str], bytes]:
        """The libraries of a request that the actor has not got yet, by name and hash."""
        wanted = {
            file: Path(c["kernels"])
            for c in request.get("contenders", ())
            if "kernels" in c
            for file in c["manifest"]["files"].items()
        }
        # What is missing here will be missing there, and is told as it would be here.
        return {f: (at / f[0]).read_bytes() for f, at in wanted.items() if f not in self.sent and (at / f[0]).exists()}


def _room(spec: str, hosts: list[dict]) -> dict:
    """What a device takes of a host, whose cores are shared among its GPUs; a CPU is all of it, not to be disturbed."""
    if spec.startswith("cuda"):
        share = min((int(h.get("CPU", 1) / h["GPU"]) for h in hosts if h.get("GPU")), default=1)
        return {"num_gpus": 1, "num_cpus": max(1, share)}
    return {"num_cpus": max((h.get("CPU", 1) for h in hosts), default=1) if spec == "cpu" else 1}


class Remote:
    """The actor of a device."""

    def __init__(self, spec: str):
        # Ray shows this process one GPU, its own.
        self.spec, self.worker = spec, Worker("cuda:0" if spec.startswith("cuda") else spec)
        self.kernels = Path(tempfile.mkdtemp(prefix="kdagen-kernels-"))

    def where(self) -> tuple[str, str]:
        """The host's id in the cluster, and what this device is called among all of them."""
        import ray

        name = f"cuda:{ray.get_gpu_ids()[0]}" if self.spec.startswith("cuda") else self.spec
        return ray.get_runtime_context().get_node_id(), f"{name}@{socket.gethostname()}"

    def ask(self, request: dict, timeout: float, files: dict[tuple[str, str], bytes]) -> dict:
        """What the worker process replies, or how it ended, as plain data."""
        for (name, _), data in files.items():
            (self.kernels / name).parent.mkdir(parents=True, exist_ok=True)
            (self.kernels / name).write_bytes(data)
        contenders = [
            {**c, "kernels": str(self.kernels)} if "kernels" in c else c for c in request.get("contenders", ())
        ]
        request, said = {**request, **({"contenders": contenders} if contenders else {})}, _Notes()
        try:
            return {"reply": self.worker.ask(request, timeout, said), "notes": said.notes}
        except WorkerDied as death:
            return {"died": death.args, "notes": said.notes}
        except KdagenError as error:
            return {"error": (type(error).__name__, str(error)), "notes": said.notes}

    def end(self) -> None:
        self.worker.end()
        shutil.rmtree(self.kernels, ignore_errors=True)


class _Notes:
    """Stands for `say` where nobody listens."""

    def __init__(self):
        self.notes: list[str] = []
        self.note = self.notes.append


def _raised(kind: str, message: str) -> Exception:
    return getattr(errors, kind, KdagenError)(message)


# -- compiling --------------------------------------------------------------------------------------------------------


def compile_candidates(
    folder: Folder, jobs: int | None, deadline: float | None, say, address: str | None = None
) -> None:
    """As kdagen.autotune.compile has it, but that the cluster compiles: a kernel a free core, or fewer by `jobs`."""
    from kdagen.autotune import compile

    ray = connect(address)
    free = max(1, int(ray.available_resources().get("CPU", 1)))
    compile.compile_candidates(folder, min(jobs or free, free), deadline, say, compile_each=compile_each)


def compile_each(take: Callable[[], tuple | None], root: Path, actors: int, timeout: float | None = None) -> Iterator:
    """As kdagen.build.pool.compile_each, by actors; the stages of a kernel are told when it is done."""
    import ray

    from kdagen.build.cache import Cache
    from kdagen.build.pool import Event
    from kdagen.build.toolchain import Died

    idle, busy, cache = [], {}, Cache(root)
    try:
        while True:
            while len(busy) < actors and (item := take()):
                actor = idle.pop() if idle else _compiler(ray)
                busy[actor.run.remote(*item, timeout)] = actor, item
            if not busy:
                return
            (call,), _ = ray.wait(list(busy), num_returns=1)
            actor, (key, job) = busy.pop(call)
            try:
                stages, files, error = ray.get(call)
                idle.append(actor)
            except ray.exceptions.RayActorError:
                stages, files, error = [], {}, Died(f"the actor that compiled {job.name} is gone", "crash")
            if getattr(error, "death", "") == "start":
                raise error
            if error is None:
                cache.make(key, partial(_fill, files))
            yield from (Event(key, stage, **more) for stage, more in stages)
            yield Event(key, "failed" if error else "done", error=error)
    finally:
        for actor in (*idle, *(actor for actor, _ in busy.values())):
            ray.kill(actor)


def _compiler(ray):
    actor = ray.remote(Compiler).options(num_cpus=1).remote()
    try:
        ray.get(actor.ready.remote(), timeout=ROOM_SECONDS)
    except ray.exceptions.RayError as error:
        ray.kill(actor)
        raise LaunchError(_no_start("compiler", error)) from None
    return actor


def _no_start(what: str, error: Exception) -> str:
    gist = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (
        f"no {what} starts on the Ray cluster: {gist[-1].strip()}: expected a free host, whose Ray runs a Python with "
        f"the same kdagen in it; it has {_has()} in all"
    )


def _has() -> dict:
    import ray

    return {n: v for n, v in ray.cluster_resources().items() if n in ("CPU", "GPU")}


def _fill(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


class Compiler:
    """An actor that compiles kernels, into the cache of its host."""

    def __init__(self):
        self.worker = None

    def ready(self) -> None:
        """Answers once a host has room, and kdagen."""

    def run(self, key: str, job, timeout: float | None) -> tuple[list, dict, Exception | None]:
        """The stages that a kernel came to, and the files of its cache entry, or why there is none."""
        from kdagen.build.builder import job_key
        from kdagen.build.cache import SEAL
        from kdagen.build.pool import Worker as Process
        from kdagen.build.toolchain import Died

        if job_key(job) != key:
            reason = "expected the same kdagen, TileLang and nvcc on all hosts of the Ray cluster"
            return [], {}, Died(f"{socket.gethostname()} compiles otherwise than the host that asks: {reason}", "start")
        stages: list = []
        if self.worker is None or not self.worker.alive:
            self.worker = Process(debug.cache_dir())
        try:
            self.worker.run(key, job, lambda stage, **more: stages.append((stage, more)), timeout)
        except KdagenError as error:
            return stages, {}, error
        entry = debug.cache_dir() / "entries" / key
        return stages, {f.name: f.read_bytes() for f in entry.iterdir() if f.name != SEAL}, None
