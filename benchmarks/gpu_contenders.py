"""What gpu.py times: kdagen's built kernels, and flash-linear-attention's functions where it is installed.

Here is what is alike in inference and in training; what is called, and how a peer is checked, differs:
gpu_inference.py, gpu_training.py, gpu_decode.py. Kernels' tensors and launches are in kdagen.autotune.launches.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from kdagen.autotune import launches
from kdagen.autotune.check import ELEMENTS, check
from kdagen.autotune.sweep import Task

from kdagen import zoo
from kdagen.errors import ArtefactError
from kdagen.reference import recurrence_reference
from kdagen.runtime.loader import LoadedOp, load_op

DEVICE = "cuda"
SCALE = 128**-0.5  # of the zoo's kda_softplus and kda_bounded
GATED = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@dataclass(frozen=True)
class Peer:
    """A function of flash-linear-attention that computes an entry of the zoo."""

    module: str
    function: str
    arguments: Callable[[dict], dict]  # from the op's tensors
    ragged: bool = True  # whether it takes cu_seqlens

    @property
    def label(self) -> str:
        return f"fla {self.function}"

    def __call__(self, given: dict):
        """(output, final state)."""
        called = getattr(importlib.import_module(self.module), self.function)
        more = {name: given[name] for name in ("cu_seqlens", "initial_state") if name in given}
        return called(**self.arguments(given), **more, output_final_state=True)[:2]


def _same(*names, **options):
    return lambda given: {**{name: given[name] for name in names}, "scale": 1.0, **options}


def _gated(**options):
    """KDA on pre-activations; the bias is one row there."""
    names = ("q", "k", "v", "g", "beta", "A_log")
    return lambda t: {**{n: t[n] for n in names}, "dt_bias": t["dt_bias"].flatten(), "scale": SCALE, **GATED, **options}


PEERS = {
    "linear_attention": Peer("fla.ops.linear_attn", "chunk_linear_attn", _same("q", "k", "v", normalize=False), False),
    "gla": Peer("fla.ops.gla", "chunk_gla", _same("q", "k", "v", "g")),
    "deltanet": Peer("fla.ops.delta_rule", "chunk_delta_rule", _same("q", "k", "v", "beta")),
    "gated_deltanet": Peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _same("q", "k", "v", "g", "beta")),
    "kda": Peer("fla.ops.kda", "chunk_kda", _same("q", "k", "v", "g", "beta")),
    "kda_softplus": Peer("fla.ops.kda", "chunk_kda", _gated()),
    "kda_bounded": Peer("fla.ops.kda", "chunk_kda", _gated(safe_gate=True, lower_bound=-5.0)),
    "gdn2": Peer("fla.ops.gdn2", "chunk_gdn2", _same("q", "k", "v", "g", "b", "w")),
    "dplr": Peer(
        "fla.ops.generalized_delta_rule",
        "chunk_dplr_delta_rule",
        lambda t: {**{n: t[n] for n in "qkvab"}, "gk": t["g"], "scale": 1.0},
    ),
}


# The same token by token.
DECODE_PEERS = {
    "gated_deltanet": Peer(
        "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", _same("q", "k", "v", "g", "beta")
    ),
    "kda": Peer("fla.ops.kda", "fused_recurrent_kda", _same("q", "k", "v", "g", "beta")),
}


def known_peer(name: str, purpose: str = "inference") -> Peer | None:
    """The peer of an entry, whether it is installed or not."""
    return (DECODE_PEERS if purpose == "decode" else PEERS).get(name)


def peer(name: str, purpose: str = "inference") -> Peer | None:
    """The peer of an entry, if there is one and it is installed."""
    return known_peer(name, purpose) if importlib.util.find_spec("fla") else None


def built(folders: list[Path], name: str, purpose: str = "inference") -> dict[str, LoadedOp]:
    """Kernels of an entry by the label of what they were built with, in all folders that have some."""
    found = {}
    for package in packages(folders):
        if (package / name).is_dir():
            variants = [v for v in _variants(package / name) if v.purpose == purpose]
            several = len(variants) > 1
            found |= {f"{package.name} {v.folder.name}" if several else package.name: v for v in variants}
    return found


def _variants(folder: Path) -> list[LoadedOp]:
    """Of every type of states."""
    return [_loaded(manifest.parent) for manifest in sorted(folder.glob("[!.]*/manifest.json"))]


@cache
def _loaded(folder: Path) -> LoadedOp:
    """Once in a process, hashes checked: a library stays open anyway."""
    return load_op(folder)


def packages(folders: list[Path]) -> list[Path]:
    """The packages that `kdagen build` wrote among `folders`, or one level below them."""
    found = [
        p.parent for folder in folders for p in sorted({*folder.glob("kdagen.json"), *folder.glob("*/kdagen.json")})
    ]
    if not found:
        listed = ", ".join(map(str, folders))
        raise ArtefactError(f"no built ops in {listed}: make some with benchmarks/pack_for_device.py or `kdagen build`")
    return found


def check_kernels(op: str, kernels: LoadedOp) -> dict:
    """The tuner's check of a candidate: {"ok", "reason", "errors": {name: [found, most]}}, of gradients too."""
    plan = kernels.plan
    head_dim = plan["dims"]["K"], plan["dims"]["V"]
    task = Task(op, kernels.purpose, plan["target"], DEVICE, head_dim, plan["dtype"], state=kernels.state)
    found = check(task, partial(launches.run, kernels), DEVICE, plan)
    return {**found, "errors": {n: pair for n, pair in found["errors"].items() if not n.endswith(ELEMENTS)}}


def reference(op: str, given: dict, state=None) -> tuple:
    """(output, final states) by the recurrence, token by token in float64 on the CPU."""
    return recurrence_reference(zoo.get(op), given, state)


def on_gpu(tensors: dict) -> dict:
    """Copies of tensors."""
    return launches.on_device(tensors, DEVICE)


def of(label: str, call: Callable) -> Callable:
    """A call on the tensors that a set of inputs has under a label."""
    return lambda given: call(given[label])


def modelled(kernels: LoadedOp, shape: tuple[int, int, int], what: str = "bytes") -> dict[str, float]:
    """What each kernel, each pass and the whole moves ("bytes") or multiplies ("flops") by the manifest's model.

    States are left out but in decoding; there no matrix products are counted.
    """
    states = launches.tensor_bytes(kernels, shape, "state_pool", "new_state_pool") if what == "bytes" else 0
    of = {k["name"]: k.get(f"{what}_a_token", 0) * math.prod(shape) + states for k in kernels.plan["kernels"]}
    passes = {which: sum(of[k["name"]] for k in launched) for which, launched in kernels.passes.items()}
    parts = passes if kernels.training else {}
    return {"": sum(passes.values()), **parts, **{launches.short(kernels, name): n for name, n in of.items()}}
