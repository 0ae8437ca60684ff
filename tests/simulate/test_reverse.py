"""The scans of training executed as they are, with the GPU's rounding, against states and cotangents in float64."""

import pytest
import torch
from foreign import CASES
from scans import generated

from kdagen import zoo
from kdagen.build import adapter
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference
from kdagen.runtime.capacities import capacities
from kdagen.simulate.program import Simulator
from kdagen.simulate.run import GARBAGE
from kdagen.simulate.schedule import check_schedule
from kdagen.simulate.torch_arrays import to_numpy
from kdagen.target import target

RECURRENCES = ("kda", "kda_bounded", "dplr", "deltaproduct", "mamba2", "gla", "linear_attention", "rwkv7")
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}  # |difference| / |reference|, both norms


class Run:
    """Scans of one op on sampled inputs: what each is to be given, what came of it, what should have."""

    def __init__(self, recurrence, chunk_size=16, tokens=75, gate="mild", head_dim=64, segment=2, seeds=(), **choices):
        self.recurrence, self.segment, self.seeds = recurrence, segment, seeds
        self.target = target(choices.get("arch", "sm90"))
        schedule, self.sources = generated(self.recurrence, head_dim, chunk_size=chunk_size, segment=segment, **choices)
        self.chunk, self.specs = schedule.chunk_size, {p.name: p for s in self.sources.values() for p in s.params}
        self.tokens, self.chunks = tokens, -(-tokens // self.chunk)
        self.d_out = next(n for n, p in self.specs.items() if p.role == "d_out")
        self.ends = next(n for n, p in self.specs.items() if "NG" in p.shape and n != "segments")
        k, v = self.specs["d_final_state"].shape[2:]
        self.size = capacities(2 * tokens, 2, self.chunk, schedule.fields()) | {"H": 2, "HV": 2}
        generator = torch.Generator().manual_seed(0)
        self.memory = {n: self.new(n) for n in self.specs}
        self.memory["cu_seqlens"] = torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32)
        for given, scale in ((self.d_out, 1.0), ("d_final_state", 0.1), ("initial_state", 0.1)):
            random = scale * torch.randn(self.shape(given), generator=generator)
            self.memory[given] = random.to(self.dtype(given))
        self.inputs = zoo.sample(canonical(self.recurrence), (2, tokens, 2, k, v), gate)
        self.inputs = {n: x.to(self.dtype(n)) for n, x in self.inputs.items()}
        self.memory |= {n: x.flatten(0, 1) if self.per_token(n) else x for n, x in self.inputs.items()}
        self.execute("index")

    def new(self, name):
        dtype = self.dtype(name)
        return torch.full(self.shape(name), torch.nan if dtype.is_floating_point else GARBAGE, dtype=dtype)

    def per_token(self, name):
        return name in self.specs and self.specs[name].shape[0] == "T"

    def slots(self, length):
        """Those of both sequences, [B, slots]: of so many tokens each."""
        count, first = -(-self.tokens // length), torch.tensor([[0], [self.tokens // length + 1]])
        return first + torch.arange(count)

    def shape(self, name):
        return [self.size.get(n, n) for n in self.specs[name].shape]

    def dtype(self, name):
        return getattr(torch, self.specs[name].dtype if name in self.specs else "float32")

    def execute(self, *kernels):
        for kernel in kernels:
            source = self.sources[kernel]
            function = adapter.trace(source.text, source.name, f"<{source.name}>")
            arrays = [to_numpy(self.memory[p.name]) for p in source.params]
            if self.seeds and kernel not in ("index", "prepare"):
                report = check_schedule(function, self.target, arrays, self.seeds)
                assert report.ok, report
            Simulator(function, check_races=True)(*arrays)
        return self

    def expected(self):
        """States before each chunk and the final one, and the cotangents of all of these."""
        state = self.memory["initial_state"].double().requires_grad_()
        states, loss = [state], 0.0
        d_out = self.memory[self.d_out].double().unflatten(0, (2, self.tokens))
        for first in range(0, self.tokens, self.chunk):
            rows = slice(first, first + self.chunk)
            inputs = {n: x[:, rows] if self.per_token(n) else x for n, x in self.inputs.items()}
            o, state = recurrence_reference(self.recurrence, inputs, states[-1])
            loss = loss + (o * d_out[:, rows]).sum()
            states.append(state.clone())  # what later chunks owe to it, without this chunk's own last output
        loss = loss + (states[-1] * self.memory["d_final_state"].double()).sum()
        return [s.detach() for s in states], torch.autograd.grad(loss, states)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def check_states(run):
    states, _ = run.expected()
    kept = run.memory["S_w"][:, run.slots(run.chunk)]  # [H, B, chunks, V, K]
    assert relative(kept, torch.stack(states[:-1]).permute(2, 1, 0, 4, 3)) < TOLERANCE["bfloat16"]


def check_cotangents(run, dtype="bfloat16"):
    _, cotangents = run.expected()
    kept = [*range(run.segment, run.chunks, run.segment), run.chunks]
    slots = run.memory[run.ends][:, run.slots(run.chunk * run.segment)]  # [H, B, segments, V, K]
    assert len(kept) == slots.shape[2]
    assert relative(slots, torch.stack([cotangents[c] for c in kept]).permute(2, 1, 0, 4, 3)) < TOLERANCE[dtype]
    assert relative(run.memory["d_initial_state"], cotangents[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_size", [16, 32])
@pytest.mark.parametrize("name", RECURRENCES)
def test_cotangents_of_the_state(name, chunk_size):
    check_cotangents(Run(zoo.get(name), chunk_size).execute("prepare", "reverse"))


@pytest.mark.parametrize("chunk_size", [16, 32])
@pytest.mark.parametrize("name", RECURRENCES)
def test_states_before_each_chunk(name, chunk_size):
    run = Run(zoo.get(name), chunk_size).execute("prepare", "scan")
    check_states(run)
    kept = run.memory["S_w"].clone()
    run.memory["S_w"].fill_(torch.nan)
    run.execute("replay")
    assert torch.equal(run.memory["S_w"].isnan(), kept.isnan())  # slots without a chunk
    assert torch.equal(run.memory["S_w"][:, run.slots(run.chunk)], kept[:, run.slots(run.chunk)])


@pytest.mark.parametrize("output", ["split", "fused"])
def test_states_are_kept_whatever_becomes_of_the_output(output):
    check_states(Run(zoo.get("kda"), output=output).execute("prepare", "scan"))


@pytest.mark.parametrize("gate", ["softplus", "bounded", "extreme", "reset"])
@pytest.mark.parametrize("name", ["kda", "dplr", "gla", "gated_deltanet"])
def test_cotangents_under_every_class_of_gates(name, gate):
    check_cotangents(Run(zoo.get(name), 32, gate=gate).execute("prepare", "reverse"))


@pytest.mark.parametrize("name", CASES)
def test_recurrences_outside_the_zoo(name):
    run = Run(CASES[name][0], 32, tokens=50).execute("prepare", "replay", "reverse")
    check_states(run)
    check_cotangents(run)


@pytest.mark.parametrize("tokens, segment", [(1, 8), (16, 1), (17, 2), (64, 2), (64, 4), (80, 3), (96, 8)])
def test_any_number_of_chunks_and_segments(tokens, segment):
    check_cotangents(Run(zoo.get("kda"), tokens=tokens, segment=segment).execute("prepare", "reverse"))


@pytest.mark.parametrize("head_dim", [128, (128, 64), (64, 128), (256, 128)])
@pytest.mark.parametrize("name", ["kda", "deltaproduct"])
def test_cotangents_at_head_dims(name, head_dim):
    check_cotangents(Run(zoo.get(name), 32, tokens=70, head_dim=head_dim).execute("prepare", "reverse"))


def test_cotangents_in_fp16():
    check_cotangents(Run(zoo.get("kda"), 32, dtype="float16").execute("prepare", "reverse"), "float16")


@pytest.mark.parametrize("arch", ["sm90", "sm100"])
@pytest.mark.parametrize("name", ["kda", "dplr", "deltaproduct", "mamba2", "linear_attention"])
def test_specialised_scans_have_no_race(name, arch):
    run = Run(zoo.get(name), 16, tokens=70, arch=arch, seeds=range(3)).execute("prepare", "scan", "replay", "reverse")
    check_cotangents(run)


@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_few_chunks_have_no_race(tokens):
    check_cotangents(Run(zoo.get("kda"), 32, tokens=tokens, seeds=range(3)).execute("prepare", "reverse"))


@pytest.mark.parametrize("name", ["kda", "mamba2"])
def test_older_targets(name):
    run = Run(zoo.get(name), 32, arch="sm80").execute("prepare", "scan", "reverse")
    check_states(run)
    check_cotangents(run)
