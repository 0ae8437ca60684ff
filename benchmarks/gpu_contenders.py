"""What gpu_forward.py times: kdagen's built kernels, and flash-linear-attention's where it is installed.

Each contender takes one set of inputs, a dict of tensors by name, and computes the same recurrence; each is checked
against the float64 recurrence before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdagen import zoo
from kdagen.errors import ArtefactError
from kdagen.ir.canonical_json import from_json
from kdagen.reference import recurrence_reference
from kdagen.runtime.loader import ALLOCATED, LoadedOp
from kdagen.runtime.package import BuiltOp

DEVICE = "cuda"
SCALE = 128**-0.5  # of the zoo's kda_softplus and kda_bounded
SAMPLED = 512  # tokens drawn; longer sequences repeat them
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GATED = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@dataclass(frozen=True)
class Peer:
    """A function of flash-linear-attention that computes an entry of the zoo."""

    module: str
    function: str
    arguments: Callable[[dict], dict]  # from the op's tensors

    @property
    def label(self) -> str:
        return f"fla {self.function}"

    def __call__(self, given: dict):
        """(output, final state)."""
        called = getattr(importlib.import_module(self.module), self.function)
        return called(**self.arguments(given), output_final_state=True)[:2]


def _same(*names, **options):
    return lambda given: {**{name: given[name] for name in names}, "scale": 1.0, **options}


def _gated(**options):
    """KDA on pre-activations; the bias is one row there."""
    return lambda t: {**t, "dt_bias": t["dt_bias"].flatten(), "scale": SCALE, **GATED, **options}


PEERS = {
    "linear_attention": Peer("fla.ops.linear_attn", "chunk_linear_attn", _same("q", "k", "v", normalize=False)),
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


def peer(name: str) -> Peer | None:
    """The peer of an entry, if there is one and it is installed."""
    return PEERS.get(name) if importlib.util.find_spec("fla") else None


def built(folders: list[Path], name: str) -> dict[str, LoadedOp]:
    """Kernels of an entry by the label of what they were built with, in all folders that have some."""
    found = {}
    for package in packages(folders):
        if (package / name).is_dir():
            variants = BuiltOp(package / name).variants
            more = {v.folder.name: v for v in variants} if len(variants) > 1 else {"": variants[0]}
            found |= {f"{package.name} {suffix}".strip(): v for suffix, v in more.items()}
    return found


def packages(folders: list[Path]) -> list[Path]:
    """The packages that `kdagen build` wrote among `folders`, or one level below them."""
    found = [
        p.parent for folder in folders for p in sorted({*folder.glob("kdagen.json"), *folder.glob("*/kdagen.json")})
    ]
    if not found:
        listed = ", ".join(map(str, folders))
        raise ArtefactError(f"no built ops in {listed}: make some with benchmarks/pack_for_device.py or `kdagen build`")
    return found


def arguments(kernels: LoadedOp, shape: tuple[int, int, int], seed: int = 0, gate: str = "mild") -> dict:
    """Arguments for (B, T, H) on the CPU, in the dtypes of the plan; past SAMPLED tokens they repeat."""
    import torch

    (batch, tokens, heads), plan = shape, kernels.plan
    dims = (batch, min(tokens, SAMPLED), heads, plan["dims"]["K"], plan["dims"]["V"])
    drawn = zoo.sample(from_json(plan["recurrence"]["canonical"]), dims, gate, seed)
    return {n: x.to(getattr(torch, plan["tensors"][n]["dtype"])) for n, x in drawn.items()}


def stretched(kernels: LoadedOp, drawn: dict, tokens: int) -> dict:
    """The same on the GPU, as many tokens long as asked for."""
    import torch

    moved = on_gpu(drawn)
    if tokens <= SAMPLED:
        return moved
    order = torch.arange(tokens, device=DEVICE) % SAMPLED
    long = [n for n in moved if "T" in kernels.plan["tensors"][n]["shape"]]
    return {**moved, **{n: moved[n].index_select(1, order) for n in long}}


def on_gpu(tensors: dict) -> dict:
    """Copies of tensors."""
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def with_results(kernels: LoadedOp, given: dict) -> dict:
    """The arguments with a zero initial state, workspaces and results, so that a launch allocates nothing."""
    import torch

    dims, made = kernels.dims(given), dict(given)
    for name, spec in kernels.plan["tensors"].items():
        if spec["role"] in (*ALLOCATED, "initial_state"):
            made[name] = torch.zeros(kernels.shape(name, dims), dtype=getattr(torch, spec["dtype"]), device=DEVICE)
    return made


def kernel_calls(kernels: LoadedOp) -> dict[str, Callable]:
    """Each kernel by itself, by the family that it is of."""

    def alone(launch: dict) -> Callable:
        function = kernels.functions()[launch["name"]]
        return lambda given: function(*(given[name] for name in launch["params"]))

    families = {k["name"]: k["family"] for k in kernels.manifest["kernels"]}
    return {families[launch["name"]]: alone(launch) for launch in kernels.plan["kernels"]}


def tensor_bytes(kernels: LoadedOp, shape: tuple[int, int, int], *roles: str) -> int:
    """Bytes of all tensors of these roles, for (B, T, H)."""
    batch, tokens, heads = shape
    dims = {**kernels.plan["dims"], "B": batch, "T": tokens, "H": heads}
    dims["NC"] = -(-tokens // kernels.plan["chunk_size"])
    specs = [spec for spec in kernels.plan["tensors"].values() if spec["role"] in roles]
    return sum(math.prod(kernels.shape(spec["name"], dims)) * BYTES[spec["dtype"]] for spec in specs)


def floor_bytes(kernels: LoadedOp, shape: tuple[int, int, int]) -> int:
    """The least that any kernel could move: each argument read once, the output written once."""
    return tensor_bytes(kernels, shape, "argument", "out")


def modelled_bytes(kernels: LoadedOp, shape: tuple[int, int, int]) -> dict[str, float]:
    """What each family moves by the manifest's model, states left out."""
    families = {k["name"]: k["family"] for k in kernels.manifest["kernels"]}
    return {families[k["name"]]: k["bytes_a_token"] * math.prod(shape) for k in kernels.plan["kernels"]}


def error(name: str, found, given: dict) -> float:
    """The larger relative error of output and final state against the recurrence, token by token in float64."""
    expected = recurrence_reference(zoo.get(name), {n: x.cpu() for n, x in given.items()})
    return worst([float((f.double().cpu() - e).norm() / e.norm()) for f, e in zip(found, expected)])


def worst(errors: list[float]) -> float:
    """The largest; NaN is larger than any."""
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)
