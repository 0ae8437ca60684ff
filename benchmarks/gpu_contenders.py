"""What gpu.py times: kdagen's built kernels, and flash-linear-attention's functions where it is installed.

Here are their tensors and bytes, alike in inference and in training; what is called, and how it is checked, differs:
gpu_inference.py, gpu_training.py, gpu_decode.py.
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
from kdagen.runtime.capacities import ZERO, capacities
from kdagen.runtime.layout import ALLOCATED
from kdagen.runtime.loader import LoadedOp, load_op
from kdagen.runtime.package import BuiltOp

DEVICE = "cuda"
SCALE = 128**-0.5  # of the zoo's kda_softplus and kda_bounded
SAMPLED = 512  # tokens drawn; longer sequences repeat them
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
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
    return [load_op(manifest.parent) for manifest in sorted(folder.glob("[!.]*/manifest.json"))]


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
    """Arguments for (B, T, H) on the CPU, in the dtypes of the plan; at most SAMPLED tokens."""
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


def ragged(arguments: dict, lengths) -> dict:
    """The same as sequences of these lengths; arguments of a batch if there are none."""
    import torch

    if not lengths:
        return arguments
    device = next(iter(arguments.values())).device
    return {**arguments, "cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0)}


def reference(op: str, kernels: LoadedOp, given: dict, state=None) -> tuple:
    """(output, final states) by the recurrence, token by token in float64 on the CPU; `given` may be ragged."""
    import torch

    given, entry = dict(given), zoo.get(op)
    if (ends := given.pop("cu_seqlens", None)) is None:
        return recurrence_reference(entry, given, state)
    tokens = {n for n in given if "T" in kernels.plan["tensors"][n]["shape"]}
    rows = [slice(*pair) for pair in zip(ends.tolist(), ends.tolist()[1:])]
    found = [recurrence_reference(entry, {n: x[:, r] if n in tokens else x for n, x in given.items()}) for r in rows]
    outs, finals = zip(*found)
    return torch.cat(outs, 1), torch.cat(finals)


def plain(kernels: LoadedOp, state):
    """A state of these kernels as the recurrence has it: [N, HV, K, V]."""
    return state if kernels.state.layout == "KV" else state.mT


def of_type(kernels: LoadedOp, state):
    """A state [N, HV, K, V] as these kernels take it."""
    import torch

    return plain(kernels, state).contiguous().to(getattr(torch, kernels.state.dtype))


def on_gpu(tensors: dict) -> dict:
    """Copies of tensors."""
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def with_results(kernels: LoadedOp, given: dict) -> dict:
    """What kernels take for these arguments: with zero states and cotangents, workspaces and results, all in place."""
    import torch

    memory, roles = {}, {name: spec["role"] for name, spec in kernels.plan["tensors"].items()}

    def zeros(shape, dtype, device, zero):
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    for which in kernels.passes:
        shared = {n: x for n, x in memory.items() if n not in given and roles[n] in (*ALLOCATED, *ZERO)}
        memory |= kernels.memory({**given, **shared}, which, zeros)
    return memory


def short(kernels: LoadedOp, name: str) -> str:
    """A kernel's name without its op's: two of one family, such as scans, are told apart."""
    return name.removeprefix(f"{kernels.plan['name']}_")


def kernel_calls(kernels: LoadedOp, label: str) -> dict[str, Callable]:
    """Each kernel by itself, by its short name, on a set of inputs that has its tensors under `label`."""
    functions = kernels.functions()

    def alone(launch: dict) -> Callable:
        function = functions[launch["name"]]
        return lambda given: function(*(given[label][name] for name in launch["params"]))

    return {short(kernels, launch["name"]): alone(launch) for launch in kernels.plan["kernels"]}


def pass_call(kernels: LoadedOp, label: str, which: str) -> Callable:
    """The kernels of a pass, one after the other."""
    alone = kernel_calls(kernels, label)
    launches = [alone[short(kernels, launch["name"])] for launch in kernels.passes[which]]
    return lambda given: [launch(given) for launch in launches]


def called(kernels: LoadedOp) -> Callable:
    """The op that people call, of the folder that these kernels are in, on arguments by name."""
    op = op_of(kernels)
    return lambda tensors: op(**tensors, output_final_state=True)


def op_of(kernels: LoadedOp) -> BuiltOp:
    """That op, for the type of states of these kernels."""
    return BuiltOp(kernels.folder.parent, kernels.state)


def tensor_bytes(kernels: LoadedOp, shape: tuple[int, int, int], *roles: str, sequences: int = 0) -> int:
    """Bytes of all tensors of these roles, for (B, T, H) or, in all these tokens, so many sequences."""
    (batch, tokens, heads), plan = shape, kernels.plan
    count = sequences or batch
    dims = {**plan["dims"], "H": heads, "HV": heads, "S": count, "W": 1}
    dims |= capacities(batch * tokens, count, plan["chunk_size"] or 1, plan["schedule"])
    specs = [spec for spec in plan["tensors"].values() if spec["role"] in roles]
    return sum(math.prod(kernels.shape(spec["name"], dims)) * BYTES[spec["dtype"]] for spec in specs)


def least_bytes(kernels: LoadedOp, shape: tuple[int, int, int]) -> dict[str, int]:
    """The least that any kernels could move: in inference, each argument read once and the output written once.

    In training that is the forward's; the backward reads arguments and the output's cotangent, and writes gradients.
    In decoding states are read and written besides. Parts are named as `modelled_bytes` names them; "" is the whole.
    """
    forward = tensor_bytes(kernels, shape, "argument", "out")
    if kernels.purpose == "decode":
        return {"": forward + tensor_bytes(kernels, shape, "state_pool", "new_state_pool")}
    if not kernels.training:
        return {"": forward}
    backward = tensor_bytes(kernels, shape, "argument", "d_out", "gradient")
    return {"": forward + backward, "forward": forward, "backward": backward}


def modelled_bytes(kernels: LoadedOp, shape: tuple[int, int, int]) -> dict[str, float]:
    """What each kernel, each pass and the whole moves by the manifest's model, states left out but in decoding."""
    states = tensor_bytes(kernels, shape, "state_pool", "new_state_pool")
    moved = {k["name"]: k["bytes_a_token"] * math.prod(shape) + states for k in kernels.plan["kernels"]}
    passes = {which: sum(moved[k["name"]] for k in launches) for which, launches in kernels.passes.items()}
    parts = passes if kernels.training else {}
    return {"": sum(passes.values()), **parts, **{short(kernels, name): n for name, n in moved.items()}}


def merged(errors: list[dict]) -> dict[str, tuple[float, float]]:
    """The largest error of each result, with what it may be at most."""
    return {name: (worst([found[name][0] for found in errors]), most) for name, (_, most) in errors[0].items()}


def sound(errors: dict[str, tuple[float, float]]) -> bool:
    """Whether there are errors, each at most what it may be (NaN is not)."""
    return bool(errors) and all(error <= most for error, most in errors.values())


def worst(errors: list[float]) -> float:
    """The largest; NaN is larger than any."""
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)
