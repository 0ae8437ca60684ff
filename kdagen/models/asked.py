"""The prompts that `kdagen generate` was given, as tokens: checked before a model is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from kdagen.errors import ArgumentError


@dataclass
class Prompts:
    """What was asked for, checked without reading the model."""

    folder: Path
    texts: tuple[str, ...]
    files: tuple[str, ...]
    ids: tuple[str, ...]
    stops: tuple[str, ...]
    going_on: bool

    def __post_init__(self):
        if self.ids and (self.texts or self.files):
            raise ArgumentError(
                "--tokens beside --prompt or --prompt-file: expected all prompts as ids, or all as text"
            )
        if not (self.ids or self.texts or self.files or self.going_on):
            raise ArgumentError(
                "no prompt: expected --prompt, --prompt-file or --tokens, or --load-cache to go on from"
            )
        if (self.texts or self.files) and self.tokenizer is None:
            raise ArgumentError(
                f"{self.folder} has no tokenizer.json and no tiktoken.model, and a vocabulary of "
                f"{self.config.vocab_size}, not of 256 bytes: expected a tokenizer, or token ids by --tokens 1,2,3"
            )
        if self.ids:
            self.stop_ids()
        self.tokens = [self._ids("--tokens", text) for text in self.ids] or [self._encoded(t) for t in self._texts()]

    @cached_property
    def config(self):
        from kdagen.models import Config

        return Config.load(self.folder)

    @cached_property
    def tokenizer(self):
        from kdagen.models.tokenizer import open_tokenizer

        return open_tokenizer(self.folder, self.config.vocab_size)

    def _texts(self) -> list[str]:
        return [*self.texts, *map(_text, self.files)]

    def _encoded(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise ArgumentError("a prompt is empty: expected some text")
        return self._known("the tokenizer's", tokens)

    def _ids(self, option: str, text: str) -> list[int]:
        try:
            return self._known(f"{option} {text}:", [int(word) for word in text.split(",")])
        except ValueError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(
                f"{option} {text}: expected token ids with commas between them, such as 1,2,3"
            ) from None

    def _known(self, whose: str, tokens: list[int]) -> list[int]:
        if wrong := [token for token in tokens if not 0 <= token < self.config.vocab_size]:
            raise ArgumentError(
                f"{whose} {wrong[0]} is outside the model's vocabulary: expected token ids from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        return tokens

    def stop_ids(self) -> set[int]:
        """--stop where ids are written."""
        return {token for text in self.stops for token in self._ids("--stop", text)}


def _text(name: str) -> str:
    try:
        with click.open_file(name, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--prompt-file {name}: expected a file of text in UTF-8: {error}") from None
