"""lora.py: the layer and its start by hand, what is wrapped and what trains, the reference, the merge."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, fill, llava, logits, write_library

from bases import bunny
from bases.architectures import ARCHITECTURES
from bases.checkpoint import load_model
from lora import LoRALinear, add_lora, lora_disabled, lora_modules, merge_lora
from model import BASES

LINEARS = 3 * 7  # decoder layers x (q, k, v, o, gate, up, down)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_library(llava(2), tmp_path_factory.mktemp("llava") / "w")


@pytest.fixture
def ours(folder):
    return load_model(folder)


def test_one_linear_by_hand():
    """W = [[1, 2]], A = [[3, 1]], B = [[0.5]], x = (1, 1), s = 4/1: 1 + 2 = 3; 4 x 0.5 x (3 + 1) = 8; sum 11."""
    base = torch.nn.Linear(2, 1, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0]])
    m = LoRALinear(base, r=1, scaling=4.0, generator=torch.Generator())
    m.lora_A.data, m.lora_B.data = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5]])
    assert m(torch.ones(1, 2)).item() == 11.0
    m.enabled = False
    assert m(torch.ones(1, 2)).item() == 3.0


@pytest.mark.parametrize("rslora, scaling", [(False, 3.0), (True, 6.0)])  # 12 / 4; 12 / sqrt 4
def test_scaling(ours, rslora, scaling):
    add_lora(ours, r=4, alpha=12, rslora=rslora)
    assert {m.scaling for m in lora_modules(ours).values()} == {scaling}


def test_start(ours):
    """B is zero, so policy = reference exactly; A is uniform in 1/sqrt(in), as peft draws it; the seed decides."""
    before = logits(ours)
    parameters = add_lora(ours, r=64, alpha=128, seed=7)
    assert torch.equal(logits(ours), before)
    assert all(not m.lora_B.any() for m in lora_modules(ours).values())
    A = torch.cat([m.lora_A.flatten() * math.sqrt(m.base.in_features) for m in lora_modules(ours).values()])
    assert 0.999 < A.abs().max() <= 1 and abs(A.std().item() - 1 / math.sqrt(3)) < 0.01  # U(-1, 1) has variance 1/3
    assert all(p.dtype == torch.float32 for p in parameters) and len(parameters) == 2 * LINEARS


def test_seed_decides_a(folder):
    a, b, c = (load_model(folder) for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        torch.rand(3)  # the global state has no say
        add_lora(model, seed=seed)
    A = [m.language_model.layers[0].mlp.up_proj.lora_A for m in (a, b, c)]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])


def test_what_is_wrapped_and_what_trains(ours):
    parameters = add_lora(ours, r=4)
    names = list(lora_modules(ours))
    assert len(names) == LINEARS and all(n.startswith("language_model.layers.") for n in names)
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) == len(parameters) and all(".lora_" in n for n in trained)
    assert not [n for n in names if "vision" in n or "projector" in n or "lm_head" in n]
    assert not [m for m in ours.modules() if isinstance(m, torch.nn.Dropout)]
    with pytest.raises(AssertionError, match="already"):
        add_lora(ours)


# 7B: 32 layers x r x (q, k, v, o: 4 x (4096 + 4096); gate, up, down: 3 x (4096 + 11008)) = 32 r (32,768 + 45,312)
# Bunny: 32 x r x (q, k, v, dense: 4 x (2560 + 2560); fc1, fc2: 2 x (2560 + 10240)) = 32 r (20,480 + 25,600)
@pytest.mark.parametrize("config, count", [(BASES["llava-1.5-7b"], 2_498_560), (bunny.Config(), 1_474_560)])
def test_real_sizes(config, count):
    [architecture] = [a for a in ARCHITECTURES if a.config is type(config)]
    with torch.device("meta"):
        model = architecture.model(config)
    assert sum(p.numel() for p in add_lora(model, r=1, targets=architecture.lora_targets)) == count


def test_a_target_that_no_layer_has(ours):
    """Bunny's `dense` on a Llama: half of the linears would stay without an adapter, unseen."""
    with pytest.raises(AssertionError, match="no \\['dense'\\]"):
        add_lora(ours, targets=("q_proj", "dense"))


def test_the_reference_is_the_base_exactly(ours):
    before = logits(ours)
    fill(add_lora(ours, r=4))
    assert (logits(ours) - before).abs().max() > 0.1
    with lora_disabled(ours):
        assert torch.equal(logits(ours), before)
    assert (logits(ours) - before).abs().max() > 0.1
    with pytest.raises(KeyError), lora_disabled(ours):
        raise KeyError
    assert all(m.enabled for m in lora_modules(ours).values())  # on again after an error too


def test_gradients_reach_the_adapter_alone(ours):
    """By autograd through the merged weight: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    fill(add_lora(ours, r=4, alpha=12))
    ids, images, _ = batch()
    ours(ids, images).square().mean().backward()
    m = ours.language_model.layers[1].self_attn.v_proj
    grads = m.lora_A.grad, m.lora_B.grad
    W = (m.base.weight + 3.0 * m.lora_B @ m.lora_A).detach().requires_grad_()
    m.forward = lambda x: F.linear(x, W)
    ours(ids, images).square().mean().backward()
    torch.testing.assert_close(grads[0], 3.0 * m.lora_B.T @ W.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(grads[1], 3.0 * W.grad @ m.lora_A.T, atol=1e-5, rtol=1e-3)
    assert ours.mm_projector[0].weight.grad is None


def test_merge_adds_in_float32():
    """bf16 keeps 8 bits. The update 2^-8 + 2^-17, rounded alone, is 2^-8: a tie, and 1 would stay 1. In float32 the sum
    lies above the tie and rounds to 1 + 2^-7."""
    model = torch.nn.Module()
    model.proj = LoRALinear(torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), 1, 1.0, torch.Generator())
    model.proj.base.weight.data.fill_(1.0)
    model.proj.lora_A.data.fill_(1.0)
    model.proj.lora_B.data.fill_(2**-8 + 2**-17)
    merge_lora(model)
    assert model.proj.weight.item() == 1 + 2**-7 and model.proj.weight.dtype == torch.bfloat16
