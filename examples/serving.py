"""Serving with one op: ragged prompts, a pool of states, decoding in place, prefix caching. Runs on the CPU as it is.

On a GPU the calls are the same. None of them waits for the device, so CUDA graphs can capture them.

    python examples/serving.py
"""

from __future__ import annotations

import torch

import kdagen as kg

H, HV, K, V = 2, 4, 64, 64  # each head of keys serves two heads of values
op = kg.compile("kda", head_dim=(K, V), state_layout="VK")


def tokens(count: int) -> dict[str, torch.Tensor]:
    """Random inputs of `count` tokens of a sequence, [1, count, heads, channels]."""
    q, k = (torch.nn.functional.normalize(torch.randn(1, count, H, K), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(1, count, HV, V), -torch.rand(1, count, HV, K), torch.rand(1, count, HV)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


def join(parts: list[dict], dim: int) -> dict[str, torch.Tensor]:
    """Inputs behind one another: in a batch (dim 0), or in one row of tokens (dim 1)."""
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def serve(prompts: list[dict], steps: list[list[dict]]) -> float:
    """Prompts of unlike length in one call, then a token each a step; the largest error against whole sequences."""
    lengths = torch.tensor([0] + [p["q"].shape[1] for p in prompts])
    _, states = op(**join(prompts, 1), cu_seqlens=lengths.cumsum(0), output_final_state=True)
    pool, slots = torch.zeros(16, HV, V, K), torch.tensor([3, 9, 5])
    pool[slots] = states

    decoded = [op.decode(**join(step, 0), state_pool=pool, state_indices=slots) for step in steps]  # pool in place
    decoded = torch.cat(decoded, 1)

    worst = 0.0
    for n, prompt in enumerate(prompts):
        whole = join([prompt, *(step[n] for step in steps)], 1)
        o, state = op(**whole, output_final_state=True)
        errors = error(decoded[n], o[0, -len(steps) :]), error(pool[slots[n]], state[0])
        print(f"sequence {n}: {o.shape[1]} tokens; output {errors[0]:.1e}, state {errors[1]:.1e} from one call's")
        worst = max(worst, *errors)
    return worst


def resume(prompt: dict, every: int = 64) -> float:
    """Prefix caching: the state after every so many tokens, and the last part of a prompt from one of them."""
    _, final, states = op(**prompt, output_final_state=True, states_every=every)
    start = every * states.shape[1]
    rest = {name: x[:, start:] for name, x in prompt.items()}
    _, resumed = op(**rest, initial_state=states[:, -1], output_final_state=True)
    away = error(resumed, final)
    print(f"prefix cache: {states.shape[1]} states; tokens from {start} on leave a state {away:.1e} away")
    return away


def main() -> float:
    """Both, and the largest error."""
    torch.manual_seed(0)
    prompts = [tokens(count) for count in (300, 7, 131)]
    steps = [[tokens(1) for _ in prompts] for _ in range(5)]
    return max(serve(prompts, steps), resume(prompts[0]))


if __name__ == "__main__":
    main()
