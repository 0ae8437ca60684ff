"""Weights behind each other in memory: what is computed stays what it was, whatever people do to a model."""

import pytest
import torch
from small_models import close, config, model, tokens

from kdagen.models import KimiLinear
from kdagen.models.layers import Packed

TOKENS = tokens(2, 20)


def packed(small) -> list[Packed]:
    return [x for m in small.modules() for x in vars(m).values() if isinstance(x, Packed)]


@pytest.fixture
def small():
    """A model that is packed, and not in training."""
    found = model()
    found.pack()
    return found


@torch.no_grad()
def one_by_one(small):
    """Logits, every linear map and convolution by itself."""
    for p in packed(small):
        p.whole = None
    return small(TOKENS)


@torch.no_grad()
def test_one_product_gives_what_several_give(small):
    assert packed(small) and all(p.weight() is not None for p in packed(small))
    assert close(small(TOKENS), one_by_one(small), 1e-5)


def test_parameters_are_parts_of_the_whole_and_train(small):
    before = {n: x.detach().clone() for n, x in model().named_parameters()}
    assert all(torch.equal(x, before[n]) for n, x in small.named_parameters())
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(TOKENS).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert all(p.weight() is not None for p in packed(small))
        assert close(small(TOKENS), one_by_one(small), 1e-5)


def test_a_packed_model_is_saved_and_read(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = KimiLinear.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in small.state_dict().items())


def biased(child):
    child.register_parameter("bias", torch.nn.Parameter(torch.ones(len(child.weight))))


def hooked(child):
    child.register_forward_hook(lambda m, given, out: 2 * out)


def replaced(child):
    child.weight = torch.nn.Parameter(3 * child.weight.detach())


def moved(child):
    child.weight.data = 3 * child.weight.data


@torch.no_grad()
@pytest.mark.parametrize("change", [biased, hooked, replaced, moved])
def test_who_changes_a_child_sees_it_run(small, change):
    before = small(TOKENS)
    change(small.model.layers[0].self_attn.g_a_proj)
    after = small(TOKENS)
    assert not close(after, before, 1e-4) and close(after, one_by_one(small), 1e-5)


@torch.no_grad()
def test_another_dtype_is_packed_anew(small):
    small.bfloat16()
    assert all(p.weight() is None for p in packed(small))
    small.new_cache(1)
    assert all(p.weight().dtype == torch.bfloat16 for p in packed(small))


def test_a_model_on_meta_is_left_alone():
    with torch.device("meta"):
        KimiLinear(config()).new_cache(1)
