"""What the hybrid saves against full attention: cache, decoding, prefill; the report's figures beside what is measured.

    python examples/cache_and_speed.py                      # a scaled-down model, minutes on 2 cores
    python examples/cache_and_speed.py --config released    # the layer sizes of the release; wants a GPU of 140 GB,
                                                            # or --layers 8 for less

Counted: the bytes that the released model's caches hold (`Cache.bytes`, on the meta device), and how many sequences a
budget of memory therefore takes. Measured, on this device: seconds of a decode step and of a prefill, of the hybrid and
of the same model with full attention (MLA) in all layers. The two share all parameters but those of attention and take
turns in each round; then each takes as many sequences as fit into the same memory. Caches for decoding are filled with
random latents, not by a prefill; on a GPU calls are eager, and launching them counts. Modelled: bytes that a step of
the released model reads. Reported: figures of the Kimi Linear report (arXiv 2510.26692), of GPUs of the class of H100.

Writes cache_and_speed.json, with all that was measured, and cache_and_speed.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

import kdagen
from kdagen.models import Config, KimiLinear, LinearAttention, prefill

K, M = 1 << 10, 1 << 20
LENGTHS = (K, 4 * K, 16 * K, 64 * K, 256 * K)
PREFILL = (K, 2 * K, 4 * K, 8 * K)
NAMES = ("hybrid", "full")
MODELLED = (
    *("tokens", "batch hybrid", "full", "GB read a token, batch 1: hybrid", "full", "in batch: hybrid", "full"),
    *("ratio", "report's ratio"),
)
SMALL = Config(
    **{"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8},
    **{"num_attention_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 64},
    **{"num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 128, "eos_token_id": None},
    linear_attn_config=LinearAttention(head_dim=64, num_heads=4),
)
# Full attention's time over the hybrid's, by tokens; "batch": where the memory that is freed goes into more sequences.
REPORT = {
    "source": "Kimi Linear report, arXiv 2510.26692; GPUs of the class of H100",
    "prefill": {512 * K: 2.3, M: 2.9},
    "decode": {512 * K: 1.8, M: 2.2},
    "batch": {M: 6.3},
    "ms_a_token_at_1M": {"hybrid": 1.84, "full": 11.48},
}


# -- counted ----------------------------------------------------------------------------------------------------------


def in_full(config: Config) -> Config:
    """The same sizes, and full attention in all layers."""
    linear = replace(config.linear_attn_config, ratio=0, kda_layers=None, full_attn_layers=None)
    return replace(config, linear_attn_config=linear)


@cache
def on_meta(config: Config, dtype) -> KimiLinear:
    """The model without its numbers."""
    with torch.device("meta"):
        return KimiLinear(config).to(dtype)


def cache_bytes(config: Config, tokens: int, dtype) -> dict[str, int]:
    """What the cache of one sequence holds."""
    found = on_meta(replace(config, num_experts=0), dtype).new_cache(1)
    found.lengths = [tokens]
    return found.bytes


def counted(config: Config, lengths, dtype) -> dict:
    """Caches by length, where the hybrid's saving comes from, and from where on there is one."""
    size = {"hybrid": partial(cache_bytes, config), "full": partial(cache_bytes, in_full(config))}
    empty, one = ({n: f(tokens=t, dtype=dtype) for n, f in size.items()} for t in (0, 1))
    grows = {n: one[n]["latents"] for n in NAMES}
    saved = grows["full"] - grows["hybrid"]
    return {
        "a_token": grows,
        "states": empty["hybrid"]["states"],
        "convolutions": empty["hybrid"]["convolutions"],
        "saved_a_token": saved / grows["full"],
        "even_at_tokens": sum(empty["hybrid"].values()) / saved,
        "rows": [
            {"tokens": t, **{n: sum(f(tokens=t, dtype=dtype).values()) for n, f in size.items()}} for t in lengths
        ],
    }


def largest_batch(config: Config, tokens: int, dtype, budget: int) -> int:
    """Sequences whose caches fit into a budget."""
    return budget // sum(cache_bytes(config, tokens, dtype).values())


def read_bytes(config: Config, tokens: int, sequences: int, dtype) -> float:
    """Modelled: what a decode step reads for each sequence: the parameters that are used, and the caches once.

    Of the experts, as many as random routing of so many tokens uses on average.
    """
    c = config
    used = 1 - (1 - c.num_experts_per_token / c.num_experts) ** sequences if c.num_experts else 1
    weights = 0.0
    for name, x in on_meta(c, dtype).state_dict().items():
        share = used if ".experts." in name else sequences / c.vocab_size if "embed_tokens" in name else 1
        weights += x.numel() * x.element_size() * share
    return weights / sequences + sum(cache_bytes(c, tokens, dtype).values())


def modelled(config: Config, lengths, dtype, budget: int) -> list[dict]:
    """Batches in a budget, and bytes read a token with one sequence and with those."""
    both, rows = {"hybrid": config, "full": in_full(config)}, []
    for tokens in lengths:
        batch = {n: largest_batch(c, tokens, dtype, budget) for n, c in both.items()}
        one = {n: read_bytes(c, tokens, 1, dtype) for n, c in both.items()}
        most = {n: read_bytes(c, tokens, batch[n], dtype) for n, c in both.items() if batch[n]}
        rows.append({"tokens": tokens, "batch": batch, "bytes_a_token": one, "bytes_a_token_in_batch": most})
    return rows


# -- measured ---------------------------------------------------------------------------------------------------------


def pair(config: Config, device, dtype, seed: int = 0) -> dict[str, KimiLinear]:
    """Both models; all parameters but those of attention are shared, so that together they fit where one does."""
    from kdagen.models.initial import initialise

    with torch.device("meta"):
        hybrid, full = KimiLinear(config).to(dtype), KimiLinear(in_full(config)).to(dtype)
    hybrid.to_empty(device=device)
    for theirs, own in zip(hybrid.model.layers, full.model.layers):
        for name, module in theirs.named_children():
            if name != "self_attn" or type(module) is type(own.self_attn):
                setattr(own, name, module)
        if own.self_attn is not theirs.self_attn:
            own.self_attn.to_empty(device=device)
    full.model.embed_tokens, full.model.norm, full.lm_head = (
        hybrid.model.embed_tokens,
        hybrid.model.norm,
        hybrid.lm_head,
    )
    for model in (hybrid, full):
        initialise(model, config.initializer_range, torch.Generator(device).manual_seed(seed))
    return {"hybrid": hybrid.eval(), "full": full.eval()}


@torch.no_grad()
def filled(model: KimiLinear, tokens: int, sequences: int):
    """A cache as after so many tokens, of random numbers."""
    cache = model.new_cache(sequences)
    draw = torch.Generator(model.device).manual_seed(1)
    for layer in cache.layers:
        if not hasattr(layer, "reserve"):
            layer.state.normal_(0, 0.1, generator=draw)
            continue
        layer.reserve(tokens + 1)
        some = torch.empty_like(layer.latents[:1, :K]).normal_(generator=draw)
        for start in range(0, layer.latents.shape[1], some.shape[1]):  # drawing them all takes longer than measuring
            room = layer.latents[:, start : start + some.shape[1]]
            room.copy_(some[:, : room.shape[1]].expand_as(room))
    cache.lengths = [tokens] * sequences
    return cache


def seconds(run, device) -> float:
    """Of one call."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def in_turn(runs: dict, device, rounds: int, calls: int) -> dict:
    """Seconds of a call of each, by rounds in which each has its turn of so many calls, the first to begin changing."""
    found = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            repeat = lambda run=runs[name]: [run() for _ in range(calls)]  # noqa: E731
            found[name].append(seconds(repeat, device) / calls)
    return {name: {"median": statistics.median(x), "all": x} for name, x in found.items()}


def step(model: KimiLinear, tokens: int, sequences: int):
    """A call that decodes one token of each sequence behind `tokens`, always the same ones."""
    cache = filled(model, tokens, sequences)
    ids = torch.arange(sequences, device=model.device).unsqueeze(1) % model.config.vocab_size

    def run():
        cache.lengths = [tokens] * sequences
        return model(ids, cache=cache, last=True)

    return run


def decoding(models: dict, lengths, rounds: int, calls: int, batches=None) -> list[dict]:
    """A decode step behind each length, of one sequence or of the batches given."""
    rows = []
    for i, tokens in enumerate(lengths):
        batch = batches[i] if batches else dict.fromkeys(models, 1)
        runs = {name: step(model, tokens, batch[name]) for name, model in models.items() if batch[name]}
        in_turn(runs, models["hybrid"].device, 1, 1)
        found = in_turn(runs, models["hybrid"].device, rounds, calls)
        for name, each in found.items():
            each["a_token"] = each["median"] / batch[name]
        rows.append({"tokens": tokens, "batch": batch, **found})
        print(f"  decoding behind {words(tokens)} tokens: {said(rows[-1])}", flush=True)
    return rows


def prefilling(models: dict, lengths, rounds: int, chunk: int) -> list[dict]:
    """Whole prompts into empty caches."""
    rows, device = [], models["hybrid"].device
    for tokens in lengths:
        draw = torch.Generator().manual_seed(2)
        prompt = torch.randint(0, models["hybrid"].config.vocab_size, (1, tokens), generator=draw).tolist()
        runs = {n: partial(read, model, prompt, chunk) for n, model in models.items()}
        if not rows:
            in_turn(runs, device, 1, 1)
        rows.append({"tokens": tokens, **in_turn(runs, device, rounds, 1)})
        print(f"  prefill of {words(tokens)} tokens: {said(rows[-1])}", flush=True)
    return rows


def read(model: KimiLinear, prompt: list, chunk: int):
    """A prompt into an empty cache."""
    return prefill(model, prompt, model.new_cache(1), chunk)


def here(device, dtype) -> dict:
    """What the figures were measured on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"kdagen": kdagen.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # what else the machine does, and this
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


# -- shown ------------------------------------------------------------------------------------------------------------


def words(tokens: int) -> str:
    """1K, 64K, 1M."""
    return f"{tokens // M}M" if tokens % M == 0 else f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def marked(mark: dict) -> str:
    """What was measured on."""
    threads = f"{mark['threads']} thread{'s' * (mark['threads'] > 1)}"
    return f"{mark['device']}, {threads}, {mark['dtype']}, torch {mark['versions']['torch']}, {mark['date']}"


def ratio(row: dict) -> float | None:
    """Full attention's time a token over the hybrid's: the median of the rounds' ratios, for a machine drifts."""
    if "full" not in row or "hybrid" not in row:
        return None
    batch = row.get("batch", dict.fromkeys(NAMES, 1))
    rounds = zip(row["full"]["all"], row["hybrid"]["all"])
    return statistics.median(full / hybrid for full, hybrid in rounds) * batch["hybrid"] / batch["full"]


def said(row: dict) -> str:
    """Medians of calls and the ratio of times a token, in words."""
    batch = row.get("batch", {})
    many = lambda n: f" of {batch[n]}" if batch.get(n, 1) > 1 else ""  # noqa: E731
    times = ", ".join(f"{n}{many(n)} {row[n]['median'] * 1e3:.2f} ms" for n in NAMES if n in row)
    return times + (f", ratio {ratio(row):.2f}" if ratio(row) else "")


def tables(record: dict) -> list:
    """Caches; times and the report's; batches."""
    from rich.table import Table

    c, mark = record["cache"], record["measured_on"]
    memory = Table(title="Counted: cache of a sequence, released model, bfloat16")
    times = Table(title=f"Measured: {record['model']}; {marked(mark)}")
    model = Table(
        title=f"Counted and modelled: released model, {record['released_budget'] >> 30} GiB for caches",
    )
    for table, columns in (
        (memory, ("tokens", "hybrid MiB", "full MiB", "hybrid against full")),
        (times, ("tokens", "what", "batch", "hybrid ms", "full ms", "ratio", "report's ratio")),
        (model, MODELLED),
    ):
        for column in columns:
            table.add_column(column, justify="right")
    for row in c["rows"]:
        less = row["hybrid"] / row["full"] - 1
        memory.add_row(words(row["tokens"]), *(f"{row[n] / M:,.1f}" for n in NAMES), f"{less:+.1%}")
    for what in ("decode", "prefill", "batch"):
        rows = {row["tokens"]: row for row in record[what]}
        for tokens in sorted({*rows, *REPORT[what]}):
            times.add_row(*_time_row(what, tokens, rows.get(tokens)))
    for row in record["modelled"]:
        model.add_row(*_model_row(row))
    return [memory, times, model]


def _time_row(what: str, tokens: int, row: dict | None) -> list[str]:
    named = {"decode": "decode step", "prefill": "prefill", "batch": "decode, a token"}[what]
    reported = REPORT[what].get(tokens)
    report = "" if reported is None else f"{reported}"
    if row is None:
        return [words(tokens), named, "", "", "", "", report]
    key = "a_token" if what == "batch" else "median"
    batch = "/".join(str(row["batch"][n]) for n in NAMES) if "batch" in row else "1"
    times = [f"{row[n][key] * 1e3:,.2f}" if n in row else "does not fit" for n in NAMES]
    return [words(tokens), named, batch, *times, f"{ratio(row):.2f}" if ratio(row) else "", report]


def _model_row(row: dict) -> list[str]:
    one, most = row["bytes_a_token"], row["bytes_a_token_in_batch"]
    ends = f"{most['full'] / most['hybrid']:.2f}" if len(most) == 2 else ""
    reported = f"{REPORT['batch'].get(row['tokens'], '')}"
    figures = [f"{x[n] / 1e9:.2f}" if n in x else "" for x in (one, most) for n in NAMES]
    return [words(row["tokens"]), *(str(row["batch"][n]) for n in NAMES), *figures, ends, reported]


def explained(record: dict) -> str:
    """Where the saving comes from."""
    c = record["cache"]
    h, f = (c["a_token"][n] for n in NAMES)
    return (
        f"A token adds {h:,} bytes to the hybrid's cache and {f:,} to full attention's: "
        f"{-c['saved_a_token']:.1%}.\nThe hybrid has {c['states'] / M:.1f} MiB of states a sequence and "
        f"{c['convolutions'] / M:.1f} MiB of convolutions' inputs, whatever its length: below "
        f"{c['even_at_tokens']:,.0f} tokens it holds more than full attention."
    )


def plot(record: dict, path: Path) -> None:
    """Four plots: caches, decoding, prefill, ratios with the report's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(f"Measured: {record['model']}; {marked(record['measured_on'])}", fontsize=9)
    colours = {"hybrid": "tab:blue", "full": "tab:red"}
    rows = record["cache"]["rows"]
    for name in NAMES:
        label = {"hybrid": "hybrid 3:1", "full": "full MLA"}[name]
        style = {"color": colours[name], "marker": "o", "label": label}
        axes[0, 0].plot([r["tokens"] for r in rows], [r[name] / M for r in rows], **style)
        for axis, what in ((axes[0, 1], "decode"), (axes[1, 0], "prefill")):
            axis.plot([r["tokens"] for r in record[what]], [r[name]["median"] * 1e3 for r in record[what]], **style)
    titles = ("counted: cache of a sequence, released model", "measured: a decode step, batch 1", "measured: prefill")
    for axis, title, unit in zip((axes[0, 0], axes[0, 1], axes[1, 0]), titles, ("MiB", "ms", "ms")):
        axis.set(title=title, ylabel=unit, yscale="log")
    last = axes[1, 1]
    for what, colour in (("decode", "tab:green"), ("prefill", "tab:orange"), ("batch", "tab:purple")):
        label = {"batch": "decode, freed memory spent on batch"}.get(what, what)
        points = [(r["tokens"], ratio(r)) for r in record[what] if ratio(r)]
        last.plot(*zip(*points), color=colour, marker="o", label=f"{label}, measured here")
        reported = sorted(REPORT[what].items())
        last.plot(*zip(*reported), color=colour, marker="*", ms=11, ls=":", label=f"{label}, the report's (H100 class)")
    last.set(title="time a token, full MLA over hybrid")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        ticks = [t for t in (K, 4 * K, 16 * K, 64 * K, 256 * K, M) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
        axis.set_xticks(ticks or [K], [words(t) for t in ticks or [K]])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=72)
    pyplot.close(figure)


# -- the whole --------------------------------------------------------------------------------------------------------


def measure(config: Config, device, dtype, options) -> dict:
    """The whole record."""
    released = Config()
    models = pair(config, device, dtype)
    print("alternating, hybrid and full attention on the same parameters:")
    decode = decoding(models, options.lengths, options.rounds, options.calls)
    prefills = prefilling(models, options.prefill_lengths, max(1, options.rounds // 2), options.chunk)
    full = in_full(config)
    budget = options.budget << 20 or sum(cache_bytes(full, max(options.lengths), dtype).values())
    sizes = {"hybrid": config, "full": full}
    batches = [{n: largest_batch(c, t, dtype, budget) for n, c in sizes.items()} for t in options.lengths]
    print(f"as many sequences as {budget / M:,.0f} MiB hold:")
    batch = decoding(models, options.lengths, max(1, options.rounds // 2), 1, batches)
    bf16, gib = torch.bfloat16, options.released_budget << 30
    return {
        "model": described(config),
        "measured_on": here(device, dtype),
        "config": config.json(),
        "caches_for_decoding": "random latents and states, not of a prefill",
        "rounds": options.rounds,
        "cache": counted(released, sorted({*LENGTHS, M, *options.lengths}), bf16),
        "decode": decode,
        "prefill": prefills,
        "prefill_chunk": options.chunk,
        "budget": budget,
        "batch": batch,
        "released_budget": gib,
        "modelled": modelled(released, [64 * K, 256 * K, 512 * K, M], bf16, gib),
        "report": REPORT,
    }


def described(c: Config) -> str:
    """The sizes in a line."""
    linear = sum(not full for full in c.full_attention)
    return (
        f"{c.num_hidden_layers} layers ({linear} KDA, {c.num_hidden_layers - linear} MLA) of {c.hidden_size}, "
        f"{c.num_attention_heads} heads, latents {c.kv_lora_rank}+{c.qk_rope_head_dim}, {c.num_experts} experts"
    )


def config_of(name: str, layers: int | None) -> Config:
    """Of the name of a choice, or of a model's folder."""
    found = {"small": SMALL, "released": Config()}.get(name) or Config.load(name)
    if layers is None:
        return found
    linear = replace(found.linear_attn_config, kda_layers=None, full_attn_layers=None)
    return replace(found, num_hidden_layers=layers, linear_attn_config=linear)


def arguments(words_given=None):
    """The command line."""
    numbers = lambda text: tuple(int(n) for n in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="small", help="small, released, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="so many of the layers, for less memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on CPUs, bfloat16 on GPUs")
    parser.add_argument("--lengths", type=numbers, default=LENGTHS, help="tokens before a decode step: 1024,65536")
    parser.add_argument("--prefill-lengths", type=numbers, default=PREFILL)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt read at a time")
    parser.add_argument("--rounds", type=int, default=7, help="half as many of prefills and batches")
    parser.add_argument("--calls", type=int, default=5, help="decode steps of one sequence in a turn")
    parser.add_argument("--budget", type=int, default=0, help="MiB for caches; one full sequence of the longest length")
    parser.add_argument("--released-budget", type=int, default=40, help="GiB for caches of the released model")
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder for the JSON and the plot")
    return parser.parse_args(words_given)


def main(words_given=None) -> dict:
    """Measures, prints, writes; the record."""
    from rich.console import Console

    options = arguments(words_given)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    record = measure(config_of(options.config, options.layers), options.device, dtype, options)
    console = Console()
    console.width = max(console.width, 112)
    for table in tables(record):
        title, table.title = table.title, None
        console.print(f"\n{title}", highlight=False, soft_wrap=True)
        console.print(table)
    print(explained(record))
    print(f"The report's: {REPORT['source']}; 1.84 against 11.48 ms a token at 1M with freed memory spent on batch.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cache_and_speed.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    return record


if __name__ == "__main__":
    main()
