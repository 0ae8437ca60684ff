"""Text as tokens and back: tokenizer.json, the release's tiktoken.model, or bytes; and text as tokens come.

A rank file does not say how text is cut before its parts are merged; the release's code does. That pattern is known
here, and is used where tokenizer_config.json names that tokenizer. For others there are token ids.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kdagen.errors import ArgumentError, ToolchainError

JSON, RANKS, NAMES, CODE = "tokenizer.json", "tiktoken.model", "tokenizer_config.json", "tokenization_kimi.py"
BYTES = 256  # the vocabulary of models whose tokens are bytes
RELEASED = "TikTokenTokenizer"

# How Moonshot's tokenizers cut text: runs of Han; words, in which Han is no letter; numbers of at most three digits;
# punctuation and what ends its line; white space. As o200k_base does, but for Han, and without "/" behind punctuation.
HAN = r"[\p{Han}]"
UPPER, LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
BEFORE, AFTER = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
ALTERNATIVES = (
    *(f"{HAN}+", f"{BEFORE}{UPPER}*{LOWER}+{AFTER}", f"{BEFORE}{UPPER}+{LOWER}*{AFTER}", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
)
PART, RUN = 400_000, 25_000  # characters that are cut at a time, and of white space or of none in a row: the release's


class Bytes:
    """Tokens are bytes of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def stream(self, before: int) -> ByteStream:
        """The text of what comes behind a token."""
        return ByteStream(lambda token: bytes([token]), before)


class Ranks:
    """Pairs of bytes that are merged by rank."""

    def __init__(self, encoding):
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        """Special tokens are read where they are written."""
        return [token for part in parts(text) for token in self.encoding.encode(part, allowed_special="all")]

    def stream(self, before: int) -> ByteStream:
        return ByteStream(self.encoding.decode_single_token_bytes, before)


class Json:
    """Whatever tokenizer.json describes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def stream(self, before: int) -> JsonStream:
        return JsonStream(self.tokenizer, before)


class ByteStream:
    """The text of tokens that are bytes; a character comes with its last byte."""

    def __init__(self, spelled: Callable[[int], bytes], before: int):
        self.spelled, self.decoder = spelled, codecs.getincrementaldecoder("utf-8")("replace")
        self.put(before)

    def put(self, token: int) -> str:
        """The text that a token completes."""
        return self.decoder.decode(self.spelled(token))

    def rest(self) -> str:
        """What is left of a character that was not completed."""
        return self.decoder.decode(b"", final=True)


class JsonStream:
    """The same of tokenizer.json, where what a token says may depend on the one before."""

    def __init__(self, tokenizer, before: int):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.decoder = tokenizer, DecodeStream(skip_special_tokens=False)
        self.tokens, self.seen = [], 0
        self.put(before)

    def put(self, token: int) -> str:
        self.tokens.append(token)
        found = self.decoder.step(self.tokenizer, token) or ""
        self.seen += len(found)
        return found

    def rest(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=False)[self.seen :]


class Numbers:
    """Token ids as text: 5,17,3."""

    def __init__(self):
        self.before = ""

    def put(self, token: int) -> str:
        found, self.before = f"{self.before}{token}", ","
        return found

    def rest(self) -> str:
        return ""


class Text:
    """What a sequence says as its tokens come, up to a text at which it is to stop."""

    def __init__(self, stream, stops: Iterable[str] = ()):
        self.stream, self.stops, self.held, self.stopped = stream, tuple(stops), "", False

    def put(self, token: int) -> str:
        """What is new; the beginning of a stop is held back until it is none."""
        text = self.held + self.stream.put(token)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = (k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
        said = len(text) - max(kept, default=0)
        self.held = text[said:]
        return text[:said]

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        return "" if self.stopped else self.held + self.stream.rest()


def open_tokenizer(folder, vocab_size: int) -> Bytes | Ranks | Json | None:
    """The tokenizer of a model's folder, None where there is none.

    Raises:
        ArgumentError: its files cannot be read, or do not say all that is needed.
        ToolchainError: a package is missing.
    """
    folder = Path(folder)
    if (folder / JSON).is_file():
        return Json(_json(folder / JSON))
    if (folder / RANKS).is_file():
        return Ranks(_ranks(folder, vocab_size))
    return Bytes() if vocab_size == BYTES else None


def _json(path: Path):
    tokenizers = _package("tokenizers", path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # of that package's own, without a class
        raise ArgumentError(f"{path}: expected a tokenizer as the package tokenizers writes it: {error}") from None


def _ranks(folder: Path, vocab_size: int):
    """The encoding of the release: ranks of a file, then special tokens up to the end of the vocabulary."""
    tiktoken = _package("tiktoken", folder / RANKS)
    names, ranks = _names(folder), _read_ranks(folder / RANKS)
    if len(ranks) > vocab_size:
        raise ArgumentError(
            f"{folder / RANKS}: {len(ranks)} tokens for a model with a vocabulary of {vocab_size}: expected the file "
            f"and the config.json of one model"
        )
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), vocab_size)}
    return tiktoken.Encoding(RELEASED, pat_str="|".join(ALTERNATIVES), mergeable_ranks=ranks, special_tokens=special)


def _names(folder: Path) -> dict[int, str]:
    """Special tokens by id, where the files beside the ranks say that the tokenizer is the release's."""
    try:
        said = json.loads((folder / NAMES).read_text())
        named = {int(i): token["content"] for i, token in said.get("added_tokens_decoder", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{folder / NAMES}: expected it beside {RANKS}, with the special tokens in added_tokens_decoder: {error}"
        ) from None
    code = (folder / CODE).read_text() if (folder / CODE).is_file() else None
    if said.get("tokenizer_class") != RELEASED or (code and not all(part in code for part in ALTERNATIVES)):
        what = "another tokenizer_class" if said.get("tokenizer_class") != RELEASED else f"another pattern in {CODE}"
        raise ArgumentError(
            f"{folder}: {RANKS} with {what} than {RELEASED} of the release: how it cuts text is not known here; give "
            f"token ids by --tokens, or a {JSON}"
        )
    return named


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ArgumentError(f"{path}: expected lines of a token in base64 and its rank: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(BYTES)):
        raise ArgumentError(f"{path}: expected ranks from 0 up without gaps, those of all single bytes among them")
    return ranks


def _package(name: str, path: Path):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ToolchainError(
            f"{path} is read by the package {name}, which is not installed: pip install 'kdagen[models]', or give "
            f"token ids by --tokens"
        ) from None


def parts(text: str) -> list[str]:
    """Text in the parts that the release reads by themselves: of so many characters, and runs of so many."""
    found = []
    for start in range(0, len(text), PART):
        part = text[start : start + PART]
        long = re.finditer(rf"\s{{{RUN + 1},}}|\S{{{RUN + 1},}}", part)
        cuts = [cut for run in long for cut in range(run.start() + RUN, run.end(), RUN)]
        found += [part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)])]
    return found
