"""Checkpoints as models are released: config.json and safetensors, in one file or in shards with an index.

All names and shapes are compared before a number is read; then tensors are read one by one to where they stay.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from kdagen.errors import ArgumentError
from kdagen.models.config import Config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 20  # names of each kind in an error message


def load(cls, folder, dtype=None, device="cpu"):
    """A model with the parameters of a folder.

    Args:
        dtype: of the parameters; that of the checkpoint's embedding unless given. What must stay in float32 does.
        device: where they go.

    Raises:
        ArgumentError: no checkpoint, or tensors that are missing, surplus or of another shape, all listed.
    """
    folder = Path(folder)
    config = Config.load(folder)
    with torch.device("meta"):
        model = cls(config)
    shards = read_headers(folder)
    expected = inventory(model)
    found = {own_name(name, expected): entry for shard in shards.values() for name, entry in shard.items()}
    compare(expected, {name: shape for name, (shape, _) in found.items()}, str(folder))
    model.to(dtype or DTYPES[found[EMBEDDING][1]])  # on meta: says which dtype each parameter has, and holds nothing
    for path, shard in shards.items():
        with _opened(folder / path) as file:  # one at a time, for pages of a file that is open count as memory
            for name in shard:
                put(model, own_name(name, expected), file.get_tensor(name), device)
    return model.eval()


def inventory(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model by its name in checkpoints."""
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def own_name(name: str, expected: dict) -> str:
    """The name here of a tensor: transformers 5 writes dense MLPs as block_sparse_moe too."""
    other = name.replace(".block_sparse_moe.", ".mlp.")
    return other if name not in expected and other in expected else name


def read_headers(folder: Path) -> dict[str, dict]:
    """The shape and dtype of each tensor in each file of a checkpoint."""
    if (folder / INDEX).is_file():
        paths = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        if lost := [path for path in paths if not (folder / path).is_file()]:
            raise ArgumentError(f"{folder}: {INDEX} names {', '.join(lost)}, which is not there: expected all shards")
    elif (folder / SINGLE).is_file():
        paths = [SINGLE]
    else:
        raise ArgumentError(f"{folder}: expected {SINGLE}, or {INDEX} and its shards")
    found: dict = {}
    for path in paths:
        with _opened(folder / path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found[path] = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    return found


def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), "pt")
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{path}: expected a safetensors file: {error}") from None


def compare(expected: dict, found: dict, where: str) -> None:
    """Refuses a checkpoint that is not of the model: one error that lists all that is wrong."""
    shared = expected.keys() & found.keys()
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(n for n in shared if _core(expected[n]) != _core(found[n])),
    }
    if not any(wrong.values()):
        return
    lines = [f"{where}: {sum(map(len, wrong.values()))} tensors do not fit the model that config.json describes"]
    for what, names in wrong.items():
        if names:
            lines.append(f"  {what} ({len(names)}):")
            lines += [f"    {n}{_shapes(n, expected, found)}" for n in names[:SHOWN]]
            lines += [f"    and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
    raise ArgumentError("\n".join([*lines, "expected the checkpoint and the config.json of one model"]))


def _core(shape: tuple) -> tuple:
    """A shape without dimensions of one: A_log is [1, 1, H, 1] in some checkpoints, [H] in others."""
    return tuple(n for n in shape if n != 1)


def _shapes(name: str, expected: dict, found: dict) -> str:
    there = f" is {list(found[name])}" if name in found else ""
    return there + (f", expected {list(expected[name])}" if there and name in expected else "")


@torch.no_grad()
def put(model: nn.Module, name: str, tensor, device) -> None:
    """Makes a tensor the parameter or buffer of a model on meta; it is copied once, to where it stays."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    new = torch.empty(old.shape, dtype=old.dtype, device=device)
    new.copy_(tensor.view(old.shape))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, leaf, new)


def save(model: nn.Module, folder, shard_bytes: int = 5 << 30) -> None:
    """Writes config.json and the parameters, in shards of at most so many bytes, under the names of the release."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    shards = _shards(tensors, shard_bytes)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX, folder / SINGLE):
        stale.unlink(missing_ok=True)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, names in zip(files, shards):
        save_file({name: tensors[name].contiguous().cpu() for name in names}, str(folder / file), {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        total = sum(x.numel() * x.element_size() for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.save(folder)


def _shards(tensors: dict, most: int) -> list[list[str]]:
    found, room = [[]], most
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        if size > room and found[-1]:
            found.append([])
            room = most
        found[-1].append(name)
        room -= size
    return found
