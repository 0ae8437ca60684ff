"""The sweep that someone asks for in a few words: what is left open follows from the purpose and the device at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdagen.autotune import gpus
from kdagen.autotune.sweep import CPU, Policy, Study, Sweep, Task, Workload

from kdagen.errors import ArgumentError
from kdagen.purposes import PURPOSES
from kdagen.state import DEFAULT, StateType

# One sequence of a long prompt, by heads as a whole model and its slices have them, one very long, six ragged.
PROMPTS = ("1x8192x64", "1x8192x96", "1x8192x24", "1x8192x12", "1x65536x12", "1300+547+2048+963+271+3063:64")
STEPS = ("1x1x32", "4x1x32", "16x1x32", "64x1x32", "256x1x32")  # of decoding: from one sequence to a server's batch
SHAPES = {"inference": PROMPTS, "training": PROMPTS, "decode": STEPS}
SMALL = ("1x2048x8", "1x256x8")  # for a CPU: calls of some ten milliseconds, minutes in all on two cores
CPU_SHAPES = {"inference": SMALL, "training": SMALL, "decode": ("1x1x32", "8x1x32")}


@dataclass(frozen=True)
class Asked:
    """What `kdagen tune` was asked for; None and () stand for what suits the device."""

    ops: tuple[str, ...] = ("kda",)
    purposes: tuple[str, ...] = ()
    gpu: str | None = None
    devices: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    head_dim: tuple[int, int] = (128, 128)
    dtype: str | None = None
    gate_dtype: str | None = None
    state: StateType = DEFAULT
    policy: str | None = None
    seed: int = 0
    exhaustive: int = 200
    fixed: tuple[tuple[str, tuple], ...] = ()


def sweep_of(asked: Asked) -> Sweep:
    """The sweep; its tasks are refused here where there is no such op or device, so that no folder is made for them."""
    from kdagen.recurrence import load

    if asked.shapes and len(asked.purposes) != 1:
        raise ArgumentError(
            f"--shape {asked.shapes[0]}: a shape is of one purpose: say which by --purpose {', '.join(PURPOSES[:-1])} "
            f"or {PURPOSES[-1]}"
        )
    for op in asked.ops:
        load(op)
    device = device_of(asked)
    shapes = CPU_SHAPES if device == CPU else SHAPES
    studies = tuple(
        Study(_task(asked, op, purpose, device), tuple(map(Workload.parse, asked.shapes or shapes[purpose])))
        for op in asked.ops
        for purpose in asked.purposes or PURPOSES
    )
    _check_fixed(asked, studies)
    policy = _policy(asked.policy, device)
    return Sweep(studies, policy, asked.seed, asked.exhaustive, fixed={f: list(v) for f, v in asked.fixed})


def _task(asked: Asked, op: str, purpose: str, device: str) -> Task:
    target = CPU if device == CPU else gpus.GPUS[device].target
    dtype = asked.dtype or ("float32" if device == CPU else "bfloat16")
    return Task(op, purpose, target, device, asked.head_dim, dtype, asked.gate_dtype, asked.state)


def _policy(text: str | None, device: str) -> Policy:
    if device != CPU:
        return Policy.parse(text) if text else Policy()
    if (policy := Policy.parse(text or "eager cold")).mode != "eager":
        raise ArgumentError(f"--policy '{policy}': expected 'eager cold' or 'eager warm' on the CPU")
    return policy


def _check_fixed(asked: Asked, studies: tuple[Study, ...]) -> None:
    """Each field must be an axis of some study's space; of others it is none."""
    from kdagen.autotune.space import space_of

    if not asked.fixed:
        return
    fields = sorted({axis.field for study in studies for axis in space_of(study.task).axes})
    if unknown := [field for field, _ in asked.fixed if field not in fields]:
        raise ArgumentError(f"--fix {unknown[0]}: expected one of {', '.join(fields)}")


def device_of(asked: Asked) -> str:
    """The name of the device that candidates are for: as gpus knows it, or "cpu"."""
    if asked.gpu:
        return _named(asked.gpu).name
    if CPU in asked.devices:
        return CPU
    for spec in asked.devices:
        if spec.startswith("replay:"):
            return recorded(spec).studies[0].task.device
    here = sorted({name for _, name in gpus_here()})
    if not here:
        raise ArgumentError(
            f"there is no GPU here: expected --gpu with the one that you tune for, of {', '.join(gpus.GPUS)}, "
            f"or --device cpu"
        )
    if len(here) > 1:
        raise ArgumentError(f"several kinds of GPU are here ({', '.join(here)}): choose one by --gpu, the other later")
    return _named(here[0]).name


def _named(name: str) -> gpus.Gpu:
    if (gpu := gpus.find(name)) is None:
        raise ArgumentError(
            f"no facts about the GPU '{name}': expected one of {', '.join(gpus.GPUS)}; --gpu takes the most like it"
        )
    return gpu


def recorded(spec: str) -> Sweep:
    """The sweep whose recording a replay is: that beside the log."""
    from kdagen.autotune.folder import Folder

    return Folder(Path(spec.removeprefix("replay:").partition("?")[0]).parent).sweep


def gpus_here() -> list[tuple[str, str]]:
    """Spec and own name of each GPU that this process sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]


def devices_for(sweep: Sweep) -> list[str]:
    """What a sweep is measured on unless told otherwise: the CPU, or all GPUs at hand of its kind."""
    kinds = {study.task.device for study in sweep.studies}
    if kinds == {CPU}:
        return [CPU]
    found = [spec for spec, name in gpus_here() if (gpu := gpus.find(name)) and gpu.name in kinds]
    if not found:
        raise ArgumentError(
            f"there is no {' or '.join(sorted(kinds))} here: carry the folder to a machine that has one and go on "
            f"there with `kdagen tune measure`, or say --device"
        )
    return found
