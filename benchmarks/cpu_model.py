"""A tiny hybrid model on the CPU: kdagen.models against transformers' kimi_linear, on the same weights in the same run.

    pip install 'kdagen[models,dropin]' && python benchmarks/cpu_model.py

transformers writes a random checkpoint, both read it. Each round times both in turn: a prefill, then decoding from the
cache, greedily. Reported are tokens a second by the median, and their ratio. Logits must agree first. Each run adds a
line to benchmarks/results/cpu_model.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from records import keep, machine

TINY = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "linear_head_dim": 64,
    "linear_num_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}


def models() -> tuple:
    """The same parameters in both."""
    import torch
    import transformers

    from kdagen.models import KimiLinear

    torch.manual_seed(0)
    theirs = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**TINY)).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return KimiLinear.from_pretrained(folder), theirs


def kdagen(model):
    """Logits of tokens after a cache, and the cache."""

    def run(ids, cache):
        cache = model.new_cache(len(ids)) if cache is None else cache
        return model(ids, cache=cache), cache

    return run


def transformers(model):
    """The same."""

    def run(ids, cache):
        found = model(ids, past_key_values=cache, use_cache=True)
        return found.logits, found.past_key_values

    return run


def timed(run, ids, steps: int) -> tuple:
    """Seconds of a prefill and of `steps` tokens after it, and the logits of both."""
    start = time.perf_counter()
    logits, cache = run(ids, None)
    middle = time.perf_counter()
    seen = [logits[:, -1:]]
    for _ in range(steps):
        logits, cache = run(seen[-1].argmax(-1), cache)
        seen.append(logits)
    return middle - start, time.perf_counter() - middle, seen


def measure(tokens: int, steps: int, rounds: int, batch: int = 1) -> dict:
    """The whole comparison as one record."""
    import torch

    ids = torch.randint(1, TINY["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(0))
    own, other = models()
    runs = {"kdagen": kdagen(own), "transformers": transformers(other)}
    found = {name: {"prefill": [], "decode": []} for name in runs}
    with torch.no_grad():
        logits = {name: torch.cat(timed(run, ids, steps)[2], 1) for name, run in runs.items()}
        worst = float((logits["kdagen"] - logits["transformers"]).abs().max())
        assert worst < 5e-5, f"logits differ by {worst}"
        for _ in range(rounds):
            for name, run in runs.items():
                prefill, decode, _ = timed(run, ids, steps)
                found[name]["prefill"].append(batch * tokens / prefill)
                found[name]["decode"].append(batch * steps / decode)
    speeds = {name: {what: statistics.median(x) for what, x in each.items()} for name, each in found.items()}
    shape = (
        f"{TINY['num_hidden_layers']} layers of {TINY['hidden_size']}, B={batch}, T={tokens}, {steps} steps, float32"
    )
    threads = torch.get_num_threads()
    return {
        **machine("transformers"), "threads": threads, "shape": shape,
        "tokens_per_second": speeds,
    }  # fmt: skip


def report(record: dict) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    speeds = record["tokens_per_second"]
    table = Table(
        "tokens a second", *speeds, "ratio", title=f"{record['shape']}, {record['threads']} of {record['cores']} cores"
    )
    for what in ("prefill", "decode"):
        a, b = speeds["kdagen"][what], speeds["transformers"][what]
        table.add_row(what, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}x")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence's prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    record = measure(options.tokens, options.steps, options.rounds, options.batch)
    report(record)
    keep("cpu_model", record)


if __name__ == "__main__":
    main()
