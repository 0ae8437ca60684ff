"""The manifest of a built op: the one file that says what lies in its folder and how to launch it.

Written by build/, read here without any compiler. Nothing in a folder is loaded before its hashes agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

from kdagen.errors import ArtefactError
from kdagen.state import StateType

FORMAT = 1
MANIFEST = "manifest.json"
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
LEAD = ("HV", "NC")  # dimensions of what there is one of for each chunk of a head
TUNED = re.compile("-t[0-9a-f]{8}$")  # what ends the name of a tuned variant's folder
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def canonical(data) -> str:
    """JSON in one way only: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def digest(source) -> str:
    """What tells one OpSource from another: its plan and the text of its kernels."""
    kernels = [dataclasses.asdict(kernel) for kernel in source.kernels]
    return hashlib.sha256(canonical([source.plan(), kernels]).encode()).hexdigest()


def variant(plan: dict) -> str:
    """The folder of an op's kernels for one target, dtype and head dims: "sm90-bf16-128x128".

    Arguments a token of another dtype than the op's are named too, and so are states that are not as by default, and
    what the kernels are for, if not inference: "sm90-bf16-128x128-beta.g.fp32-state.vk-training".
    """
    dims, dtype = plan["dims"], plan["dtype"]
    others: dict[str, list[str]] = {}
    for tensor in plan["tensors"].values():
        if tensor["role"] == "argument" and "T" in tensor["shape"] and tensor["dtype"] != dtype:
            others.setdefault(SHORT[tensor["dtype"]], []).append(tensor["name"])
    named = [".".join([*sorted(names), short]) for short, names in sorted(others.items())]
    state = [f"state.{name}"] if (name := state_type(plan).name) else []
    what_for = [purpose(plan)] if purpose(plan) != "inference" else []
    return "-".join([plan["target"], SHORT[dtype], f"{dims['K']}x{dims['V']}", *named, *state, *what_for])


def tuned_variant(plan: dict) -> str:
    """The folder of such kernels by a schedule that was tuned, beside those of the default one."""
    return f"{variant(plan)}-t{hashlib.sha256(canonical(plan['schedule']).encode()).hexdigest()[:8]}"


def state_type(plan: dict) -> StateType:
    """How an op's states are given and returned."""
    return StateType(**plan.get("state", {}))


def purpose(plan: dict) -> str:
    """What kernels are for: "inference", "training" or "decode"."""
    passes = plan.get("passes") or {}
    return "decode" if "decode" in passes else "training" if "backward" in passes else "inference"


def memory(plan: dict) -> tuple[float, float, float]:
    """Of training, bytes a token a head: kept from forward to backward beside the arguments, moved by each of them."""
    moved = {k["name"]: k["bytes_a_token"] for k in plan["kernels"]}
    kept = (plan["tensors"][name] for name in plan["kept"])
    chunk = sum(WIDTHS[t["dtype"]] * math.prod(n for n in t["shape"] if n not in LEAD) for t in kept)
    return chunk / plan["chunk_size"], *(sum(map(moved.get, plan["passes"][w])) for w in ("forward", "backward"))


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder but its manifest."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def write(folder: Path, contents: dict) -> None:
    """Seals a folder: manifest.json with `contents` and the hash of each file that is there."""
    manifest = {"format": FORMAT, **contents, "files": hash_files(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read(folder: Path) -> dict:
    """The manifest of a folder, its format and the hash of every file checked."""
    path, fix = folder / MANIFEST, "rebuild it with `kdagen build`"
    try:
        manifest = json.loads(path.read_text())
        found, wanted = manifest["format"], manifest["files"]
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing, so {folder} is not a built op: {fix}") from None
    except (ValueError, KeyError, TypeError):
        raise ArtefactError(f"{path} is not a manifest of kdagen (damaged?): {fix}") from None
    if found != FORMAT:
        raise ArtefactError(f"{path} has format {found}, this kdagen reads format {FORMAT}: {fix}")
    verify(folder, wanted, fix)
    return manifest


def verify(folder: Path, wanted: dict[str, str], fix: str, listing: str = MANIFEST) -> None:
    """Refuses a folder in which some file is not what `listing` says of it: `wanted`, sha256 by name."""
    for name, expected in wanted.items():
        try:
            actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            raise ArtefactError(f"{folder / name} is missing although {listing} lists it: {fix}") from None
        if actual != expected:
            raise ArtefactError(
                f"{folder / name} is corrupt or was edited: its sha256 is {actual[:12]}..., "
                f"{listing} says {expected[:12]}...: {fix}"
            )
