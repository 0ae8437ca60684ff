"""What a model keeps of the sequences so far: states and convolutions' inputs, latents of full attention.

States have one size however long a sequence is; of each token, latents alone are kept (`bytes`). A cache can be saved,
and a sequence go on from it in another process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch

from kdagen.errors import ArgumentError

FORMAT = "kdagen-cache-1"


@dataclass
class Cache:
    """A state for each layer, and how many tokens each sequence has; notes are saved with it, and mean nothing here."""

    layers: list
    lengths: list[int]
    notes: dict[str, str] = field(default_factory=dict)

    def advance(self, counts: tuple[int, ...]) -> None:
        """Counts tokens that all layers have taken."""
        self.lengths = [a + b for a, b in zip(self.lengths, counts)]

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.lengths)

    def select(self, sequences: list[int]) -> Cache:
        """A cache of some of the sequences, in this order; one may come twice, to go on in several ways."""
        return Cache([layer.select(sequences) for layer in self.layers], [self.lengths[n] for n in sequences])

    @torch.no_grad()
    def put(self, sequence: int, other: Cache) -> None:
        """Makes one of the sequences what another cache's only one is."""
        count = self.lengths[sequence] = other.lengths[0]
        for layer in self.layers:
            if hasattr(layer, "reserve"):
                layer.reserve(count)
        theirs = other.tensors()
        for name, x in self.tensors().items():
            used = slice(count if name.endswith("latents") else None)
            x[sequence, used] = theirs[name][0, used]

    @property
    def bytes(self) -> dict[str, int]:
        """Of all sequences: states and convolutions, which do not grow, and the latents that are in use."""
        found = {"states": 0, "convolutions": 0, "latents": 0}
        for name, x in self.tensors().items():
            kind = name.split(".")[1]
            kind = {"state": "states", "conv": "convolutions"}.get(kind, kind)
            used = x.shape[-1] * sum(self.lengths) if kind == "latents" else x.numel()
            found[kind] += used * x.element_size()
        return found

    def tensors(self) -> dict:
        """All that is kept, by name."""
        return {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.tensors().items()}

    def save(self, path) -> None:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        longest = max(self.lengths, default=0)
        tensors = {
            name: (x[:, :longest] if name.endswith("latents") else x).contiguous().cpu()
            for name, x in self.tensors().items()
        }
        said = {"format": FORMAT, "lengths": json.dumps(self.lengths), "notes": json.dumps(self.notes)}
        save_file(tensors, str(path), said)

    @classmethod
    def load(cls, path, model) -> Cache:
        """The cache that `save` wrote, for the same model.

        Raises:
            ArgumentError: the file is something else, or was saved for a model of other layers or sizes.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArgumentError(f"{path}: expected a cache that was saved by Cache.save: {error}") from None
        if said.get("format") != FORMAT:
            raise ArgumentError(f"{path}: expected a cache that was saved by Cache.save, format {FORMAT}")
        lengths = json.loads(said["lengths"])
        found = model.new_cache(len(lengths))
        for layer in found.layers:
            if hasattr(layer, "reserve"):
                layer.reserve(max(lengths, default=0))
        found._fill(tensors, str(path))
        found.lengths, found.notes = lengths, json.loads(said.get("notes", "{}"))
        return found

    @torch.no_grad()
    def _fill(self, tensors: dict, path: str) -> None:
        own = self.tensors()
        longest = {name: tensors[name].shape[1] for name in own if name.endswith("latents") and name in tensors}
        own = {name: x[:, : longest.get(name, x.shape[1])] for name, x in own.items()}
        wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
        if wrong or len(tensors) != len(own):
            shown = wrong or sorted(set(tensors) - set(own))
            raise ArgumentError(
                f"{path}: the cache of another model: {shown[0]} is {_shape(tensors.get(shown[0]))} there, "
                f"{_shape(own.get(shown[0]))} here; expected the model that it was saved for"
            )
        for name, x in own.items():
            x.copy_(tensors[name])


def _shape(tensor) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
