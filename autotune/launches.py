"""Built kernels as calls: their tensors at a shape, what launches them, and the op that people would call.

For whoever times or checks them on a GPU. Knows nothing of clocks (kdagen.autotune.devices.clock), nor of what is right
(kdagen.autotune.check).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kdagen.autotune.cases import Case, taken

from kdagen.ir.tile import BYTES
from kdagen.runtime.capacities import ZERO, capacities
from kdagen.runtime.layout import ALLOCATED
from kdagen.runtime.loader import LoadedOp

SAMPLED = 512  # tokens drawn; longer sequences repeat them

# -- tensors


def arguments(
    kernels: LoadedOp, shape: tuple[int, int, int], gate: str = "mild", seed: int = 0, group: int = 1
) -> dict:
    """Arguments for (B, T, HV) on the CPU, in the plan's dtypes; a head of keys serves a `group` of value heads."""
    from kdagen import zoo
    from kdagen.ir.canonical_json import from_json

    plan = kernels.plan
    canonical = from_json(plan["recurrence"]["canonical"])
    drawn = zoo.sample(canonical, (*shape, plan["dims"]["K"], plan["dims"]["V"]), gate, seed)
    return taken(canonical, drawn, {name: plan["tensors"][name]["dtype"] for name in drawn}, group)


def on_device(tensors: dict, device) -> dict:
    """Copies of tensors."""
    return {name: x.to(device) for name, x in tensors.items()}


def stretched(kernels: LoadedOp, given: dict, tokens: int) -> dict:
    """Arguments of at most SAMPLED tokens, as many tokens long as asked for."""
    import torch

    if tokens <= SAMPLED:
        return given
    order = torch.arange(tokens, device=next(iter(given.values())).device) % SAMPLED
    long = [n for n in given if "T" in kernels.plan["tensors"][n]["shape"]]
    return {**given, **{n: given[n].index_select(1, order) for n in long}}


def ragged(given: dict, lengths) -> dict:
    """The same as sequences of these lengths; arguments of a batch if there are none."""
    import torch

    if not lengths:
        return given
    device = next(iter(given.values())).device
    return {**given, "cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0)}


def states(kernels: LoadedOp, given: dict, seed: int = 0):
    """States to begin with, [N, HV, K, V] in float32, where the arguments are."""
    import torch

    dims, device = kernels.dims(given), next(iter(given.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    return 0.1 * torch.randn(*(dims[d] for d in ("N", "HV", "K", "V")), generator=generator, device=device)


def cotangent(kernels: LoadedOp, given: dict, seed: int = 0):
    """That of the output, where the arguments are."""
    import torch

    dims, device = kernels.dims(given), next(iter(given.values())).device
    tokens, generator = min(dims["tokens"], SAMPLED), torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn(dims["B"], tokens, dims["HV"], dims["V"], generator=generator)
    drawn = drawn.to(getattr(torch, kernels.plan["dtype"])).to(device)
    return drawn[:, torch.arange(dims["tokens"], device=device) % tokens]


def plain(kernels: LoadedOp, state):
    """A state of these kernels as the recurrence has it: [N, HV, K, V]."""
    return state if kernels.state.layout == "KV" else state.mT


def of_type(kernels: LoadedOp, state):
    """A state [N, HV, K, V] as these kernels take it."""
    import torch

    return plain(kernels, state).contiguous().to(getattr(torch, kernels.state.dtype))


def shared_inputs(kernels: LoadedOp, given: dict, seed: int) -> dict:
    """What all kernels of one task take for these arguments: "arguments", and what their purpose wants besides."""
    match kernels.purpose:
        case "decode":
            return {"arguments": given, "states": states(kernels, given, seed)}
        case "training":
            return {"arguments": given, "leaves": leaves(given), "d_out": cotangent(kernels, given, seed)}
    return {"arguments": given}


def leaves(given: dict) -> dict:
    """The same memory, as tensors whose gradients are wanted."""
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items()}


def memory(kernels: LoadedOp, shared: dict) -> dict:
    """What these kernels are launched on: `shared` inputs, zero states and cotangents, workspaces and results."""
    import torch

    given, found = dict(shared["arguments"]), {}
    if "states" in shared:
        given["state_pool"] = of_type(kernels, shared["states"]).clone()
    if "d_out" in shared:
        given[kernels.by_role["d_out"]] = shared["d_out"]
    roles = {name: spec["role"] for name, spec in kernels.plan["tensors"].items()}

    def zeros(shape, dtype, device, zero):
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    for which in kernels.passes:
        kept = {n: x for n, x in found.items() if n not in given and roles[n] in (*ALLOCATED, *ZERO)}
        found |= kernels.memory({**given, **kept}, which, zeros)
    return found


def tensor_bytes(
    kernels: LoadedOp, shape: tuple[int, int, int], *roles: str, sequences: int = 0, key_heads: int = 0
) -> int:
    """Bytes of all tensors of these roles, for (B, T, HV) or, in all these tokens, so many sequences."""
    (batch, tokens, heads), plan = shape, kernels.plan
    count = sequences or batch
    dims = {**plan["dims"], "H": key_heads or heads, "HV": heads, "S": count, "W": 1}
    dims |= capacities(batch * tokens, count, plan["chunk_size"] or 1, plan["schedule"])
    specs = [spec for spec in plan["tensors"].values() if spec["role"] in roles]
    return sum(math.prod(kernels.shape(spec["name"], dims)) * BYTES[spec["dtype"]] for spec in specs)


def least_bytes(kernels: LoadedOp, shape: tuple[int, int, int], **more) -> dict[str, int]:
    """The least that any kernels could move: in inference, each argument read once and the output written once.

    In training that is the forward's; the backward reads arguments and the output's cotangent, and writes gradients.
    In decoding states are read and written besides. Parts are named by passes; "" is the whole.
    """
    forward = tensor_bytes(kernels, shape, "argument", "out", **more)
    if kernels.purpose == "decode":
        return {"": forward + tensor_bytes(kernels, shape, "state_pool", "new_state_pool", **more)}
    if not kernels.training:
        return {"": forward}
    backward = tensor_bytes(kernels, shape, "argument", "d_out", "gradient", **more)
    return {"": forward + backward, "forward": forward, "backward": backward}


# -- calls


def short(kernels: LoadedOp, name: str) -> str:
    """A kernel's name without its op's: two of one family, such as scans, are told apart."""
    return name.removeprefix(f"{kernels.plan['name']}_")


def kernel_calls(kernels: LoadedOp) -> dict[str, Callable]:
    """Each kernel by itself, by its short name, on what `memory` gives."""
    functions = kernels.functions()

    def alone(launch: dict) -> Callable:
        function = functions[launch["name"]]
        return lambda tensors: function(*(tensors[name] for name in launch["params"]))

    return {short(kernels, launch["name"]): alone(launch) for launch in kernels.plan["kernels"]}


def pass_call(kernels: LoadedOp, which: str) -> Callable:
    """The kernels of a pass, one after the other."""
    alone = kernel_calls(kernels)
    launches = [alone[short(kernels, launch["name"])] for launch in kernels.passes[which]]

    def call(tensors: dict) -> dict:
        for launch in launches:
            launch(tensors)
        return kernels.gradients(tensors) if which == "backward" else {}

    return call


def whole_call(kernels: LoadedOp) -> Callable:
    """All passes: in training the forward and the backward, with the sum that a head's parameter needs."""
    passes = [pass_call(kernels, which) for which in kernels.passes]
    return lambda tensors: [call(tensors) for call in passes]


class Only:
    """What an op finds its kernels by: these alone, whatever is asked for."""

    def __init__(self, kernels: LoadedOp):
        self.kernels, self.choices = kernels, {}

    def fitting(self, tensors: dict, capability: str, purpose: str = "inference", want=None) -> LoadedOp:
        """Refused as by kdagen.runtime.package, which looks as long."""
        from kdagen.errors import ArgumentError

        if problem := self.kernels.mismatch(tensors, capability):
            raise ArgumentError(f"{self.kernels.plan['name']}: {problem}: expected tensors that these kernels take")
        return self.kernels

    def planned(self, tensors: dict, *_, **__) -> LoadedOp:
        return self.kernels


def op_of(kernels: LoadedOp):
    """The op that people call, on these kernels."""
    from kdagen.ir.canonical_json import from_json
    from kdagen.purposes import PURPOSES
    from kdagen.runtime import torch_op
    from kdagen.runtime.op import Op, shared
    from kdagen.runtime.signature import signature
    from kdagen.schedule import Keep

    recurrence = kernels.plan["recurrence"]
    identity = torch_op.identity("measured", str(kernels.folder), kernels.manifest["digest"])
    keep = Keep(kernels.plan["schedule"].get("keep", Keep.STATES))
    form = lambda: from_json(recurrence["canonical"])  # noqa: E731
    rest = form, Only(kernels), keep, (), kernels.state, frozenset(PURPOSES)
    return shared(identity, lambda: Op(signature(recurrence), identity, *rest))


def as_called(kernels: LoadedOp) -> Callable:
    """What people would call, on `shared_inputs` and, in decoding, its "state_pool": all that an op does is in it."""
    op = op_of(kernels)
    match kernels.purpose:
        case "decode":
            return lambda given: op.decode(**given["arguments"], state_pool=given["state_pool"])
        case "training":
            forward, backward = through_autograd(lambda tensors: op(**tensors, output_final_state=True))
            return lambda given: backward(forward(given))
    return lambda given: op(**given["arguments"], output_final_state=True)


def through_autograd(function: Callable) -> tuple[Callable, Callable]:
    """Forward and backward of a function that torch differentiates; the second takes what the first makes of inputs."""
    import torch

    def forward(given: dict):
        with torch.enable_grad():
            return given, function(given["leaves"])[0]

    def backward(made):
        given, out = made
        wanted = [x for x in given["leaves"].values() if x.requires_grad]
        return torch.autograd.grad(out, wanted, given["d_out"], allow_unused=True)

    return forward, backward


def run(kernels: LoadedOp, case: Case) -> dict:
    """What kdagen.autotune.check wants to know: the results of one case."""
    given = {**case.arguments, **({"cu_seqlens": case.cu_seqlens} if case.cu_seqlens is not None else {})}
    by_role = kernels.by_role
    if kernels.purpose == "decode":
        made = kernels.launch(
            {**case.arguments, **case.given}, "decode", case.allocate, {"null_below": case.null_below}
        )
        return {"out": made[by_role["out"]]}
    named = lambda *roles: {by_role[r]: case.given[r] for r in roles if r in case.given}  # noqa: E731
    given |= named("initial_state")
    forward = kernels.launch(given, "forward", case.allocate)
    found = {name: forward[by_role[name]] for name in ("out", "final_state")}
    if not kernels.training:
        return found
    kept = {name: forward[name] for name in kernels.kept}
    backward = kernels.launch({**given, **kept, **named("d_out", "d_final_state")}, "backward", case.allocate)
    found |= {f"d_{name}": x for name, x in kernels.gradients(backward).items()}
    return found | {"d_initial_state": backward[by_role["d_initial_state"]]}
