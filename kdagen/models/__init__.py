"""Models that run on the generated ops: Kimi Linear, its variants, and any recurrence of yours in its place.

Names are imported when first used. Nothing in the compiler knows this package; it uses kdagen as any program would.

| modules | what is in them |
|---|---|
| config, config_json, checkpoint, initial | what a model is, and its parameters: read, written, checked, first values |
| model, layers, mixer, mla, moe, layout | the forward; roles and fused: the layer that a recurrence asks for |
| cache, generation | what is kept of a sequence, and new tokens; ranks: sequences split over processes |
| step, step_layers, step_writer, step.c | decoding on the CPU natively: the same layers as a program |
| asked, tokenizer, session, progress | `kdagen generate` |
| training/ | the training loop, its folder and processes, synthetic tasks |
"""

from __future__ import annotations

from kdagen.lazy import attributes

_WHERE = {
    "Config": "config",
    "LinearAttention": "config",
    "KimiLinear": "model",
    "Cache": "cache",
    "generate": "generation",
    "prefill": "generation",
}

__all__ = list(_WHERE)
__getattr__, __dir__ = attributes(__name__, {name: f"{__name__}.{module}" for name, module in _WHERE.items()})
