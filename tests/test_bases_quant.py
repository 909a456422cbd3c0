"""bases/quant.py: codes and scales equal bitsandbytes', the matmul and its gradients those of the rebuilt weight."""

import json
from statistics import NormalDist

import peft
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tiny_models import batch, fill, llava, phi_and_siglip, write_bunny, write_hub

from bases import quant
from bases.adapter import load_adapter, save_adapter
from bases.architectures import architecture_of
from bases.checkpoint import load_base, load_model
from lora import add_lora, lora_disabled, lora_modules, merge_lora


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(llava(2), tmp_path_factory.mktemp("quant") / "hub")


def weights(kind: str) -> torch.Tensor:
    """(48, 64): rows as trained ones, exact ties, a block of zeros, a constant block, tiny and huge numbers."""
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8
    levels = torch.tensor(quant.NF4_LEVELS)
    w[0, :15] = (levels[:-1] + levels[1:]) / 2  # between two levels, the largest magnitude of the block below
    w[0, 15:] = 1.0
    w[1] = 0.0
    w[2] = -0.25
    w[3] *= 1e-30
    w[4] *= 1e30
    w[5, ::2] = 0.0
    for row in range(6, 26):  # ties again, under scales whose reciprocals round
        w[row] = w[0] * (0.3 + 0.17 * row)
    return w if kind == "float32" else w.clamp(-6e4, 6e4).to(getattr(torch, kind))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_and_scales_equal_bitsandbytes(dtype):
    w = weights(dtype)
    codes, scales = quant.quantise_nf4(w)
    theirs, state = quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(codes, theirs.flatten())
    assert torch.equal(scales, state.absmax) and scales.dtype == torch.float32
    rebuilt = quant.dequantise(codes, scales, quant.pairs_of_levels(), (48, 64), w.dtype)
    assert torch.equal(rebuilt, dequantize_4bit(theirs, state))


def test_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: eight even steps of probability from 0.9677083 to 1/2 for one side, nine for the other."""
    top = 0.9677083
    inverse = NormalDist().inv_cdf
    positive = [inverse(top - i * (top - 0.5) / 8) for i in range(8)]
    negative = [-inverse(top - i * (top - 0.5) / 7) for i in range(7)]
    levels = sorted([*positive, 0.0, *negative])
    assert [round(level / max(levels), 5) for level in levels] == [round(level, 5) for level in quant.NF4_LEVELS]


def test_nf4_by_hand():
    """Scale 2. 2 -> 1.0 is level 15; -2 -> 0; 0 -> 7; 1 -> 0.5, nearest 0.4407 (12) by 0.059 before 0.5626 (13) by
    0.063. Codes F0 7C, then zeros: 77. Rebuilt: 2, -2, 0, 2 x 0.44070983."""
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([2.0, -2.0, 0.0, 1.0])
    codes, scales = quant.quantise_nf4(w)
    assert codes[:3].tolist() == [0xF0, 0x7C, 0x77] and scales.tolist() == [2.0]
    rebuilt = quant.dequantise(codes, scales, quant.pairs_of_levels(), (1, 64), torch.float32)
    torch.testing.assert_close(rebuilt[0, :5], torch.tensor([2.0, -2.0, 0.0, 0.88141966, 0.0]))


def test_int8_by_hand():
    """Row 1: scale 2.54 / 127 = 0.02; 1 -> 50, -2.54 -> -127, 0.03 -> 1.5, to even 2. Row 2 is zero."""
    codes, scales = quant.quantise_int8(torch.tensor([[1.0, -2.54, 0.03], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[50, -127, 2], [0, 0, 0]] and codes.dtype == torch.int8
    torch.testing.assert_close(scales, torch.tensor([[0.02], [0.0]]))
    rebuilt = quant.dequantise(codes, scales, quant.pairs_of_levels(), (2, 3), torch.float32)
    torch.testing.assert_close(rebuilt, torch.tensor([[1.0, -2.54, 0.04], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(3, 30), (5, 64), (7, 33)])
def test_a_last_block_that_is_not_full(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales = quant.quantise_nf4(w)
    rebuilt = quant.dequantise(codes, scales, quant.pairs_of_levels(), shape, torch.float32)
    assert rebuilt.shape == shape and len(scales) == -(-w.numel() // 64)
    assert (rebuilt - w).abs().max() < 0.16 * w.abs().max()  # half the widest step, 0.3038 / 2


def quantised(kind: str, dtype: torch.dtype, bias: bool = True) -> quant.QuantLinear:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        linear = torch.nn.Linear(64, 40, bias=bias, dtype=dtype).requires_grad_(False)
    module = quant.QuantLinear(linear, kind, dtype)
    module.quantise(linear.weight)
    return module


@pytest.mark.parametrize("kind", quant.KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_matmul_and_gradient_equal_those_of_the_rebuilt_weight(kind, dtype, bound):
    module = quantised(kind, dtype)
    assert module.bias is not None
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    dy = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = {}
    for name, forward in (("fast", module), ("plain", lambda x: F.linear(x, module.dequantised(), module.bias))):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(dy)
        found[name] = y.detach(), leaf.grad
    for fast, plain in zip(found["fast"], found["plain"], strict=True):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, plain, atol=bound, rtol=0)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_the_rebuilt_weight_is_not_kept_for_the_backward_pass(kind):
    """40 x 64 x 4 = 10,240 bytes; codes of int8 are 2,560, the table of levels is 2,048."""
    module = quantised(kind, torch.float32, bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        module(x).sum().backward()
    assert sizes and max(sizes) <= 2560


@pytest.mark.parametrize("kind", quant.KINDS)
def test_under_autocast(kind):
    """bfloat16 base, float32 input, as a LayerNorm leaves it: bfloat16 out, a float32 gradient."""
    module = quantised(kind, torch.bfloat16)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    expected = torch.ones(3, 40) @ module.dequantised().float()
    torch.testing.assert_close(x.grad, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_it_compiles_in_one_graph(kind):
    module = quantised(kind, torch.float32)
    x = torch.randn(3, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (module, compiled):
        leaf = x.clone().requires_grad_()
        f(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


# ---- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quant.KINDS)
def test_what_is_quantised(hub, kind):
    """3 layers x 7 linears of the decoder; the weights that it computes with are the rebuilt ones."""
    model, full = load_base(str(hub), quant=kind)[0], load_model(hub)
    swapped = {name for name, m in model.named_modules() if isinstance(m, quant.QuantLinear)}
    assert len(swapped) == 3 * 7 and all(name.startswith("language_model.layers.") for name in swapped)
    for name in swapped:
        full.get_submodule(name).weight.data = model.get_submodule(name).dequantised()
    ids, images, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, images), full(ids, images), atol=1e-6, rtol=0)
    assert quant.kind_of(model) == kind and quant.kind_of(full) is None
    kept = dict(model.named_parameters())
    assert kept["lm_head.weight"].dtype == kept["vision_tower.layers.0.mlp.fc1.weight"].dtype == torch.float32


def test_codes_are_those_of_the_stored_weight(hub):
    """Not of the weight in the model's dtype, which would round twice."""
    model, full = load_model(hub, dtype=torch.bfloat16, quant="nf4"), load_model(hub)
    name = "language_model.layers.1.mlp.up_proj"
    codes, scales = quant.quantise_nf4(full.get_submodule(name).weight)
    assert torch.equal(model.get_submodule(name).weight, codes)
    assert torch.equal(model.get_submodule(name).scales, scales)
    assert model.get_submodule(name).dequantised().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", quant.KINDS)
def test_lora_on_a_quantised_base(hub, kind):
    """Policy = reference at the start; gradients reach every A and B, and equal those on the rebuilt weights."""
    model, full = load_model(hub, quant=kind), load_model(hub)
    for name, m in model.named_modules():
        if isinstance(m, quant.QuantLinear):
            full.get_submodule(name).weight.data = m.dequantised()
    ids, images, _ = batch()
    grads = []
    for m in (model, full):
        fill(add_lora(m, r=4))
        m(ids, images).square().mean().backward()
        grads.append([p.grad for p in m.parameters() if p.requires_grad])
        with torch.no_grad(), lora_disabled(m):
            grads[-1].append(m(ids, images))
    assert len(grads[0]) == 2 * 21 + 1
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_bunny_keeps_its_biases(tmp_path):
    folder = write_bunny(*phi_and_siglip(), tmp_path / "w")
    model, full = load_model(folder, quant="int8"), load_model(folder)
    name = "language_model.layers.2.mlp.fc1"
    assert torch.equal(model.get_submodule(name).bias, full.get_submodule(name).bias)
    ids, images = batch(image_id=-200)[0], torch.randn(2, 3, 44, 44)
    with torch.no_grad():
        difference = (model(ids, images) - full(ids, images)).abs().max()
    assert 1e-4 < difference < 0.5
    assert len(add_lora(model, r=2, targets=architecture_of(model).lora_targets)) == 2 * 3 * 6


def test_the_adapter_says_what_it_was_trained_on(hub, tmp_path, capsys):
    model = load_model(hub, quant="nf4")
    fill(add_lora(model, r=4))
    save_adapter(model, tmp_path, str(hub))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_quantization"] == "nf4"
    load_adapter(load_model(hub, quant="nf4"), tmp_path)
    assert capsys.readouterr().out == ""
    load_adapter(load_model(hub), tmp_path)
    assert "trained on nf4 weights, used on full ones" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(llava(2), tmp_path)  # with a key that it does not know
    assert len([m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]) == 21


def test_merging_is_refused(hub):
    model = load_model(hub, quant="nf4")
    add_lora(model, r=4)
    with pytest.raises(AssertionError, match=r"layers\.0\.self_attn\.q_proj is quantised; merge into the full weights"):
        merge_lora(model)
    assert lora_modules(model)


def test_memory_of_nf4(hub):
    """4.5 bits a weight: 0.5625 bytes. 7B: 32 x (4 x 4096^2 + 3 x 4096 x 11008) = 6,476,005,376 weights, 3.64 GB."""
    model = load_model(hub, quant="nf4")
    linears = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
    kept = sum(m.weight.nbytes + m.scales.nbytes for m in linears)
    assert kept == 0.5625 * sum(m.in_features * m.out_features for m in linears)
