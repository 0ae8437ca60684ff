"""A training step on the CPU of the report's 2-layer synthetic model: kdagen.models against transformers' kimi_linear.

    pip install 'kdagen[models,dropin]' && python benchmarks/cpu_training_step.py

Both have the weights of one checkpoint, which transformers wrote, and take the same steps: forward, loss, backward,
clipping, AdamW. Losses of the first steps and gradients must agree. Then each round times a step of both in turn;
reported are medians of wall time and of the process's CPU time, which other processes disturb less, and what the
linear maps alone take, forward and backward, which no implementation of the mixer can save. Each run adds a line for
each shape to benchmarks/results/cpu_training_step.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from records import keep, machine

# The model of `examples/train_synthetic.py --report`, whose hidden size is that of all heads.
REPORT = {
    "vocab_size": 66,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "linear_head_dim": 128,
    "linear_num_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "layer_types": ["linear_attention"] * 2,
    "mlp_layer_types": ["dense"] * 2,
}
SHAPES = ((8, 256), (1, 256), (1, 1024))


def models() -> dict:
    """The same parameters in both."""
    import torch
    import transformers

    from kdagen.models import KimiLinear

    torch.manual_seed(0)
    theirs = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**REPORT)).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        own = KimiLinear.from_pretrained(folder)
    return {"kdagen": own.train(), "transformers": theirs.train()}


def steps(name: str, model, ids) -> tuple:
    """The loss and gradients of a model, and a whole step that returns its loss."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    logits = model if name == "kdagen" else lambda x: model(x, use_cache=False).logits

    def backward():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return float(loss.detach())

    def step():
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return backward, step


def agree(found: dict) -> None:
    """Losses and gradients of both, before any step: the norm of all, and those that both call alike."""
    losses = {name: backward() for name, (_, backward, _) in found.items()}
    assert abs(losses["kdagen"] - losses["transformers"]) < 1e-5, losses
    own, theirs = ({n: x.grad for n, x in model.named_parameters()} for model, *_ in found.values())
    norms = [sum(float(x.square().sum()) for x in gradients.values()) ** 0.5 for gradients in (own, theirs)]
    assert abs(norms[0] / norms[1] - 1) < 1e-4, norms
    alike = own.keys() & theirs.keys()
    assert sum("_proj" in name for name in alike) > 10
    for name in alike:
        error = float((own[name] - theirs[name]).norm() / theirs[name].norm())
        assert error < 1e-3, f"the gradients of {name} differ by {error}"


def maps(model, tokens: int):
    """Forward and backward of a model's linear maps alone."""
    import torch

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    given = [torch.randn(tokens, module.in_features, requires_grad=True) for module in linear]

    def run():
        for module, x in zip(linear, given):
            y = module(x)
            y.backward(y)

    return run


def timed(run) -> tuple[float, float]:
    """Wall and CPU milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def measure(batch: int, tokens: int, rounds: int) -> dict:
    """The comparison at one shape, as one record."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, REPORT["vocab_size"], (batch, tokens + 1), generator=draw)
    found = {name: (model, *steps(name, model, ids)) for name, model in models().items()}
    agree(found)
    runs = {name: step for name, (_, _, step) in found.items()}
    losses = {name: [run(), run()] for name, run in runs.items()}
    assert all(abs(a - b) < 1e-4 for a, b in zip(*losses.values())), losses
    runs["linear maps alone"] = maps(found["kdagen"][0], batch * tokens)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    shape = f"2 layers of {REPORT['hidden_size']}, B={batch}, T={tokens}, float32"
    medians = {name: dict(zip(("wall", "cpu"), map(statistics.median, zip(*x)))) for name, x in times.items()}
    found = machine("transformers") | {"threads": torch.get_num_threads()}
    return found | {"shape": shape, "rounds": rounds, "ms": medians}


def report(record: dict) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    ms = record["ms"]
    title = f"{record['shape']}, {record['threads']} threads of {record['cores']} cores"
    table = Table("ms a step", *ms, "ratio", title=title)
    for what in ("wall", "cpu"):
        ratio = ms["transformers"][what] / ms["kdagen"][what]
        table.add_row(what, *(f"{x[what]:.0f}" for x in ms.values()), f"{ratio:.1f}x")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="one shape alone, with --tokens")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="as many as torch takes, unless given")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    for batch, tokens in [(options.batch, options.tokens)] if options.batch else SHAPES:
        record = measure(batch, tokens, options.rounds)
        report(record)
        keep("cpu_training_step", record)


if __name__ == "__main__":
    main()
