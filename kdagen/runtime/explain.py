"""`op.explain()`: what runs an op on CPU and CUDA tensors, in training and decoding, where kernels are, what ran."""

from __future__ import annotations

import textwrap
from pathlib import Path

from kdagen.autotune.select import tables
from kdagen.errors import KdagenError
from kdagen.purposes import PURPOSES
from kdagen.runtime import manifest as manifests
from kdagen.schedule import Keep, changes, in_words
from kdagen.target import target

LABEL = 14
KIB = 1024


def explain(op) -> str:
    """Lines of "label  text" about an Op."""
    rows = [
        ("CPU tensors", "CPU backend: batched matrix products on torch, one pass over chunks of tokens"),
        *op.kernels.describe(),
        *describe_training(op),
        *describe_states(op),
        *describe_choices(op),
        ("last call", op.last or "none yet"),
    ]
    name = str(op.torch_op).removesuffix(".default")
    return "\n".join([f"{op.signature}: torch.ops.{name}", *(_row(label, text) for label, text in rows)])


def _row(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        width=120,
        initial_indent=f"{label:<{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def describe_plan(plan: dict) -> list[tuple[str, str]]:
    """What kernels of this launch plan do: target, chunk, decay, schedule."""
    gpu, dims, schedule = target(plan["target"]), plan["dims"], dict(plan["schedule"])
    decay, chunk = schedule.pop("decay", "none"), schedule.pop("chunk_size", plan["chunk_size"])
    return [
        ("CUDA tensors", f"kernels for {gpu.name} ({gpu.example}), {plan['dtype']}, K = {dims['K']}, V = {dims['V']}"),
        ("  chunk size", f"{chunk} tokens"),
        ("  decay", f"{decay}{_reason(plan, decay, chunk)}"),
        ("  schedule", in_words(schedule)),
    ]


KEPT = {
    Keep.INPUTS: "nothing beside its arguments: the backward computes all else again",
    Keep.STATES: "the state before each chunk",
    Keep.ALL: "the state before each chunk, and all that prepare made",
}


def describe_training(op) -> list[tuple[str, str]]:
    """What a forward keeps for its backward, and what both move, in bytes a token a head."""
    keep = op.training.keep
    try:
        plan, problem = op.kernels.planned({}).plan, None
    except KdagenError as error:
        plan, problem = None, error
    return [
        ("training", f"keep='{keep.value}': a forward keeps {KEPT[keep]}"),
        ("  on CPU", _kept_on_cpu(op, plan and plan["dims"])),
        ("  on GPUs", _training_on_gpus(plan) if plan else f"none: {problem}"),
    ]


def describe_states(op) -> list[tuple[str, str]]:
    """How states are stored, and what runs op.decode and op.recurrent."""
    state = op.state
    try:
        plan = op.kernels.planned({}, purpose="decode").plan
        kernel = f"one kernel for {plan['target']}, {', '.join(f'{k} {v}' for k, v in plan['schedule'].items())}"
    except KdagenError as error:
        kernel = f"none: {error}"
    stored = state.dtype if state.dtype == "bfloat16" else "float32, beside float64 arguments float64"
    return [
        ("states", f"[N, HV, {', '.join(state.dims)}] in {stored}"),
        ("decoding", "on CPU one token after another, on states in place"),
        ("  on GPUs", kernel),
        ("  on CPUs", _native(op.step.native)),
    ]


def _native(native) -> str:
    """Whether decoding on the CPU is a native loop, and if not, why."""
    if native.problem:
        return f"by torch's operations, several times slower than a native loop: {native.problem}"
    if native.path:
        return f"a native loop, compiled: {native.path}"
    return "a native loop, compiled by the C compiler at the first call; float64 by torch's operations"


def describe_choices(op) -> list[tuple[str, str]]:
    """By which schedules calls ran so far, or how many tables offer."""
    tuned = op.tuned
    given = [purpose for purpose in PURPOSES if purpose in tuned.off]
    rows = [f"{purpose}, {device}, bucket {bucket}: {words}" for (purpose, device, bucket), words in tuned.said.items()]
    if not rows and len(given) < len(PURPOSES):
        known = [e for e in tables() if e.key.recurrence == op.signature.recurrence and e.key.purpose not in given]
        devices = ", ".join(sorted({e.key.device for e in known}))
        rows = [f"{len(known)} in tables ({devices}), chosen by a call's B T HV" if known else "none in tables"]
    if given:
        rows.append(f"as given in {', '.join(given)}")
    return [("schedules" if i == 0 else "", row) for i, row in enumerate(rows)]


def _kept_on_cpu(op, dims: dict[str, int] | None) -> str:
    from kdagen.runtime import cpu

    if op.training.keep == Keep.INPUTS:
        return "keep 0 bytes a token a head"
    chunk = cpu.chunk_size(cpu.ROWS, len(op.program.canonical.solving))
    more = ", as keep='states' does" if op.training.keep == Keep.ALL else ""
    number = f": {4 * dims['K'] * dims['V'] / chunk:,.0f} where K = {dims['K']}, V = {dims['V']}" if dims else ""
    return f"keep states of chunks of {chunk} tokens{more}, 4 K V / {chunk} bytes a token a head in float32{number}"


def _training_on_gpus(plan: dict) -> str:
    kept, forward, backward = map("{:,.0f}".format, manifests.memory(plan))
    return (
        f"keep {kept} bytes a token a head; kernels for {plan['target']} with chunks of {plan['chunk_size']} tokens "
        f"move {forward} (forward) and {backward} (backward), as modelled"
    )


def describe_trained(plan: dict) -> list[tuple[str, str]]:
    """What tells a package's kernels of training from those of inference, which come before them."""
    return [("  in training", f"{plan['target']}, keep='{plan['schedule']['keep']}'")]


def describe_decoding(plan: dict) -> list[tuple[str, str]]:
    """The same of its kernel that decodes."""
    schedule = in_words(plan["schedule"])
    return [("  in decoding", f"{plan['target']}, {schedule}")]


def describe_tuned(plan: dict, untuned: dict) -> list[tuple[str, str]]:
    """What tells a package's kernels by a tuned schedule from the untuned ones."""
    changed = in_words(changes(plan["schedule"], untuned["schedule"]))
    return [("  tuned", f"{manifests.purpose(plan)}, {plan['target']}, {changed}")]


def _reason(plan: dict, decay: str, chunk: int) -> str:
    """Why the decays are kept finite in this way, where it is the compiler's own choice."""
    if not plan.get("recurrence"):
        return ""
    from kdagen.ir.canonical_json import from_json
    from kdagen.lower.decay import decay_form

    form, reason = decay_form(from_json(plan["recurrence"]["canonical"]), chunk, plan["dtype"])
    return f": {reason}" if form.value == decay else ": chosen in the schedule"


def describe_kernels(folder: Path, where: str) -> list[tuple[str, str]]:
    """The kernels that a manifest lists, with what the compiler said of them."""
    rows = [("  found in", f"{folder} ({where})")]
    for kernel in manifests.read(folder)["kernels"]:
        spilled = (kernel["spill_stores"] or 0) + (kernel["spill_loads"] or 0)
        shared = (kernel["shared_bytes"] + (kernel["static_shared_bytes"] or 0)) / KIB
        rows.append(
            (
                "",
                f"{kernel['name']}: {kernel['block'][0]} threads, {kernel['registers']} registers, "
                f"{f'{spilled} bytes spilled' if spilled else 'no spills'}, {shared:.1f} KiB of shared memory",
            )
        )
    return rows


def describe_missing(nvcc: bool, holdings: str, command: str) -> list[tuple[str, str]]:
    """What happens where no kernels were built."""
    how = "compiled at the first call" if nvcc else f"an error at the first call, for there is no nvcc; {command}"
    return [("  found in", f"neither build folder nor cache ({holdings}): {how}")]
