"""Generating: prompts in chunks, then a token of each sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kdagen.errors import ArgumentError


def generate(
    model,
    prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | torch.Generator | None = None,
    stop: Sequence[int] | Callable[[int, list[int]], bool] | None = None,
    chunk: int = 2048,
    cache=None,
    on_tokens: Callable[[list], None] | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt; the last is a stop token where one came.

    Args:
        prompts: token ids: a tensor [B, T], or a list of lists of any lengths. With a cache, what follows it.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: of the likeliest tokens that hold this much probability.
        seed: of the drawing; the same gives the same tokens. A generator is drawn from as it is.
        stop: tokens that end a sequence; the config's end of sequence unless given, () for none. Or what is asked,
            with a sequence's number and its new tokens, whether it ends.
        chunk: tokens of each prompt that are read at a time.
        cache: goes on from it, and leaves in it what a further call goes on from, but for each sequence's last token.
        on_tokens: is given the new token of each sequence as it comes, None for those that have ended.
        on_prompt: is given how many tokens of prompts were read, as they are.
    """
    prompts = _lists(prompts)
    if max_new_tokens < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise ArgumentError(
            f"max_new_tokens = {max_new_tokens}, temperature = {temperature}, top_p = {top_p}: expected numbers from 0 "
            f"up, and a top_p above 0 and at most 1"
        )
    generator = _generator(seed, model.device)
    stop = set(model.config.stop_tokens if stop is None else stop) if not callable(stop) else stop
    ends = stop if callable(stop) else lambda _, row: row[-1] in stop
    given, cache = cache is not None, model.new_cache(len(prompts)) if cache is None else cache
    found: list[list[int]] = [[] for _ in prompts]
    ended: dict[int, object] = {}  # what a given cache holds of a sequence that has ended, while others go on
    if not max_new_tokens or not prompts:
        return found
    with torch.no_grad():
        logits = prefill(model, prompts, cache, chunk, on_prompt)
        for step in range(max_new_tokens):
            tokens = chosen(logits, temperature, top_p, generator)
            new = [None if n in ended else token for n, token in enumerate(tokens.tolist())]
            for row, token in zip(found, new):
                row += [] if token is None else [token]
            if on_tokens:
                on_tokens(new)
            over = [n for n, row in enumerate(found) if n not in ended and ends(n, row)]
            if step + 1 == max_new_tokens or len(over) + len(ended) == len(found):
                break
            ended |= {n: cache.select([n]) if given else None for n in over}
            logits = model(tokens.unsqueeze(1), cache=cache)[:, -1]
    for n, kept in ended.items() if given else ():
        cache.put(n, kept)
    return found


def _generator(seed: int | torch.Generator | None, device):
    return torch.Generator(device).manual_seed(seed) if isinstance(seed, int) else seed


def prefill(model, prompts: list[list[int]], cache, chunk: int = 2048, on_prompt=None):
    """Reads prompts into a cache, `chunk` tokens of each at a time; logits of the last of each, [N, vocab_size].

    on_prompt is given how many tokens were read, as they are.
    """
    if chunk < 1:
        raise ArgumentError(f"chunk = {chunk}, expected a number of tokens from 1 up")
    last = None
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        logits = _read(model, parts, cache)
        if on_prompt:
            on_prompt(sum(map(len, parts)))
        done = torch.tensor([bool(part) for part in parts], device=logits.device).unsqueeze(1)
        last = logits if last is None else torch.where(done, logits, last)
    return last


def _read(model, parts: list[list[int]], cache):
    lengths = [len(part) for part in parts]
    if len(set(lengths)) == 1:
        return model(torch.tensor(parts, device=model.device), cache=cache, last=True)
    ids = torch.tensor([[token for part in parts for token in part]], device=model.device)
    ends = torch.tensor([0, *lengths], device=model.device).cumsum(0)
    return model(ids, cache=cache, cu_seqlens=ends, last=True)


def chosen(logits, temperature: float, top_p: float, generator=None):
    """A token for each row of logits."""
    if not temperature:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, tokens = p.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        p = torch.zeros_like(p).scatter_(-1, tokens, ordered)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


def _lists(prompts) -> list[list[int]]:
    found = prompts.tolist() if isinstance(prompts, torch.Tensor) else [list(map(int, prompt)) for prompt in prompts]
    if any(not isinstance(prompt, list) or not prompt for prompt in found):
        raise ArgumentError(
            "a prompt is empty, or prompts are not a list of lists: expected at least one token of each"
        )
    return found
