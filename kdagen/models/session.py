"""A generation that is printed as it goes, and that can be saved and gone on from: what `kdagen generate` does.

The cache holds all tokens but the last of each sequence; its notes hold that one, which sequences have ended, and what
the next tokens are drawn with, so that a run in two parts gives what one run gives.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

from kdagen.errors import ArgumentError
from kdagen.models.asked import Prompts
from kdagen.models.cache import Cache
from kdagen.models.generation import prefill
from kdagen.models.tokenizer import Numbers, Text


@dataclass
class Run:
    """A generation: the sequences of a cache, of which those in `rows` go on."""

    model: object
    cache: object
    rows: list[int]
    prompts: list[list[int]]  # of the rows: what is yet to be read
    as_ids: bool
    written: list  # of the rows: kdagen.models.tokenizer.Text
    ends: set[int]
    pieces: list[list[str]] = field(default_factory=list)
    pending: dict[int, list[int]] = field(default_factory=dict)  # by sequence: the last token, which no cache holds
    over: list[int] = field(default_factory=list)  # sequences that have ended

    @classmethod
    def begun(cls, model, asked: Prompts, load: Path | None) -> Run:
        """A run from what was asked for and, if there is one, what was saved."""
        cache = Cache.load(load, model) if load else model.new_cache(len(asked.tokens))
        pending, over = _pending(cache, load, asked)
        rows = [n for n in range(cache.sequences) if asked.tokens or n not in over]
        prompts = [pending.get(n, []) + (asked.tokens[n] if asked.tokens else []) for n in rows]
        as_ids = asked.ids or (not asked.tokens and cache.notes.get("ids") == "yes") or asked.tokenizer is None
        ends = set(model.config.stop_tokens) | (asked.stop_ids() if as_ids else set())
        texts = [Text(Numbers()) if as_ids else Text(asked.tokenizer.stream(p[-1]), asked.stops) for p in prompts]
        over = [n for n in over if n not in rows]
        return cls(model, cache, rows, prompts, bool(as_ids), texts, ends, [[] for _ in rows], pending, over)

    def generator(self, seed: int | None):
        """What is drawn with: by a seed, or as a saved run left it, or at random."""
        found = torch.Generator(self.model.device)
        kind, _, state = self.cache.notes.get("generator", "").partition(":")
        if seed is not None:
            found.manual_seed(seed)
        elif kind == self.model.device.type:
            found.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
        else:
            found.seed()
        return found

    def generate(self, shown, most: int, chunk: int, drawing: dict) -> None:
        """New tokens of all rows; `shown` is told of them."""
        whole = self.rows == list(range(self.cache.sequences))
        cache = self.cache if whole else self.cache.select(self.rows)
        if most:
            put = lambda new: self._put(new, shown)  # noqa: E731
            options = {"chunk": chunk, "cache": cache, "on_tokens": put, "on_prompt": shown.read}
            found = self.model.generate(self.prompts, most, stop=self._stop, **options, **drawing)
        else:  # what is saved of a prompt has all but its last token
            self._read_only(cache, chunk, shown)
            found = [prompt[-1:] for prompt in self.prompts]
        for n, tokens in zip(self.rows, found):
            self.pending[n] = tokens[-1:]
        if not whole:
            for i, n in enumerate(self.rows):
                self.cache.put(n, cache.select([i]))
        for n, text in enumerate(self.written):
            self._say(n, text.rest(), shown)

    def _read_only(self, cache, chunk: int, shown) -> None:
        with torch.no_grad():
            if any(len(prompt) > 1 for prompt in self.prompts):
                prefill(self.model, [prompt[:-1] for prompt in self.prompts], cache, chunk, shown.read)

    def _stop(self, row: int, tokens: list[int]) -> bool:
        ends = tokens[-1] in self.ends or self.written[row].stopped
        self.over += [self.rows[row]] * ends
        return ends

    def _put(self, new: list, shown) -> None:
        for row, token in enumerate(new):
            if token is not None and (self.as_ids or token not in self.ends):
                self._say(row, self.written[row].put(token), shown)
        shown.wrote(sum(token is not None for token in new))

    def _say(self, row: int, piece: str, shown) -> None:
        self.pieces[row].append(piece)
        if len(self.rows) == 1:
            shown.text(piece)

    def print(self) -> None:
        """Prints several sequences; a single one was printed as it came."""
        texts = ["".join(pieces) for pieces in self.pieces]
        if len(texts) == 1:
            return
        if self.as_ids:
            click.echo("\n".join(texts))
        else:
            for n, text in zip(self.rows, texts):
                click.echo(f"[{n + 1}]\n{text}")

    def save(self, path: Path, generator) -> None:
        """The cache, and what goes on from it."""
        state = generator and base64.b64encode(bytes(generator.get_state().tolist())).decode()
        self.cache.notes = {
            "pending": json.dumps([self.pending[n] for n in range(self.cache.sequences)]),
            "over": json.dumps(sorted(self.over)),
            "ids": "yes" if self.as_ids else "no",
            **({"generator": f"{self.model.device.type}:{state}"} if state else {}),
        }
        self.cache.save(path)


def _pending(cache, load: Path | None, asked: Prompts) -> tuple[dict, list]:
    """Of a saved cache: the tokens that each sequence still has to read, and which have ended."""
    if load is None:
        return {}, []
    if asked.tokens and len(asked.tokens) != cache.sequences:
        raise ArgumentError(
            f"{load} holds {cache.sequences} sequences, and there are {len(asked.tokens)} prompts: expected one for "
            f"each, or none"
        )
    pending = dict(enumerate(json.loads(cache.notes.get("pending", "[]"))))
    over = json.loads(cache.notes.get("over", "[]"))
    if not asked.tokens and not pending:
        raise ArgumentError(f"{load} does not say which token comes next: expected --prompt or --tokens to go on with")
    if not asked.tokens and len(over) == cache.sequences:
        raise ArgumentError(f"{load}: all of its sequences have ended: expected --prompt or --tokens to go on with")
    return pending, over
