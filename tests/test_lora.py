"""lora.py against peft, both ways: what we write peft reads, what peft writes we read, to the same logits."""

import json
import math
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import batch, llava, phi_and_siglip, write_bunny, write_library

from bases.adapter import load_adapter, save_adapter
from bases.bunny import Bunny
from bases.bunny import Config as BunnyConfig
from bases.checkpoint import load_model
from lora import LoRALinear, add_lora, lora_disabled, lora_modules, merge_lora
from model import BASES, LLaVA

LINEARS = 3 * 7  # decoder layers x (q, k, v, o, gate, up, down)
REGEX = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_library(llava(2), tmp_path_factory.mktemp("llava") / "w")


@pytest.fixture
def ours(folder):
    return load_model(folder)


def fill(parameters, seed: int = 0) -> None:
    """A and B both non-zero, as after training."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = torch.randn(p.shape, generator=g) / 4


def logits(model) -> torch.Tensor:
    ids, images, _ = batch()
    images = images.to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, LLaVA):
            return model(ids, images)
        return model(input_ids=ids, pixel_values=images).logits


def assert_same_function(ours, theirs) -> None:
    """Equal logits in float64: this adapter is large enough to grow float32's rounding to 1e-4 in three layers."""
    torch.testing.assert_close(logits(ours.double()), logits(theirs.double()), atol=1e-6, rtol=0)


def peft_adapter(folder, rslora: bool = False):
    """A peft model with a filled adapter, r 4, alpha 12, saved to `folder`."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=REGEX, use_rslora=rslora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llava(2), config)
    fill(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return model.eval()


def respell(folder, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k.replace(old, new): v.clone() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


# ---- the layer -----------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("build, count", [(lambda: LLaVA(BASES["llava-1.5-7b"]), 2_498_560),
                                          (lambda: Bunny(BunnyConfig()), 1_474_560)])  # fmt: skip
def test_real_sizes(build, count):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in add_lora(model, r=1)) == count


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


def test_merge_equals_pefts(ours, tmp_path):
    theirs = peft_adapter(tmp_path)
    load_adapter(ours, tmp_path)
    before = logits(ours)
    merge_lora(ours)
    assert not lora_modules(ours)
    merged = theirs.merge_and_unload().model.language_model.state_dict()
    for name, weight in ours.language_model.state_dict().items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(ours), before, atol=1e-3, rtol=0)


def test_merge_adds_in_float32():
    """bf16 keeps 8 bits: 1 + 2^-9 is 1 there; two updates' worth, 2^-8 + 2^-9 added at once, rounds to 1 + 2^-7."""
    model = torch.nn.Module()
    model.proj = LoRALinear(torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), 1, 1.0, torch.Generator())
    model.proj.base.weight.data.fill_(1.0)
    model.proj.lora_A.data.fill_(1.0)
    model.proj.lora_B.data.fill_(2**-8 + 2**-9)
    merge_lora(model)
    assert model.proj.weight.item() == 1 + 2**-7 and model.proj.weight.dtype == torch.bfloat16


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("spelling", ["hub", "transformers5"])
def test_peft_reads_ours(ours, tmp_path, spelling, rslora):
    fill(add_lora(ours, r=4, alpha=12, rslora=rslora))
    save_adapter(ours, tmp_path, "some/base", spelling)
    theirs = peft.PeftModel.from_pretrained(llava(2), tmp_path).eval()
    assert_same_function(ours, theirs)
    wrapped = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == LINEARS and not [n for n in wrapped if "vision" in n]
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("spelling", ["as written", "hub", "original", ".default."])
def test_we_read_pefts(ours, tmp_path, spelling, rslora):
    theirs = peft_adapter(tmp_path, rslora)
    written = "base_model.model.model.language_model.layers"
    if spelling == "hub":
        respell(tmp_path, written, "base_model.model.language_model.model.layers")
    elif spelling == "original":
        respell(tmp_path, written, "base_model.model.model.layers")
    elif spelling == ".default.":
        respell(tmp_path, ".weight", ".default.weight")
    load_adapter(ours, tmp_path)
    assert_same_function(ours, theirs)


def test_an_old_bin_file_is_read_and_its_code_does_not_run(ours, folder, tmp_path):
    theirs = peft_adapter(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    load_adapter(ours, tmp_path)
    assert_same_function(ours, theirs)
    torch.save(state | {"x": Bomb(tmp_path / "sentinel")}, tmp_path / "adapter_model.bin")
    with pytest.raises(SystemExit, match="damaged"):
        load_adapter(load_model(folder), tmp_path)
    assert not (tmp_path / "sentinel").exists()


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("spelling, prefix", [
    ("hub", "base_model.model.language_model.model.layers.0.self_attn.q_proj"),
    ("transformers5", "base_model.model.model.language_model.layers.0.self_attn.q_proj"),
    ("original", "base_model.model.model.layers.0.self_attn.q_proj"),
])  # fmt: skip
def test_spellings_written_and_read(ours, folder, tmp_path, spelling, prefix):
    fill(add_lora(ours, r=4, alpha=12))
    save_adapter(ours, tmp_path, "b", spelling)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * LINEARS and state[f"{prefix}.lora_A.weight"].shape == (4, 32)
    again = load_model(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_bunny_round_trip(tmp_path):
    """Phi's six linears a layer, the original spelling, the decoder's layers and not the tower's."""
    phi, siglip = phi_and_siglip()
    folder = write_bunny(phi, siglip, tmp_path / "w")
    ours, again = load_model(folder), load_model(folder)
    fill(add_lora(ours, r=4))
    assert len(lora_modules(ours)) == 3 * 6
    save_adapter(ours, tmp_path / "a", "bunny")
    load_adapter(again, tmp_path / "a")
    ids, images = batch(image_id=-200)[0], torch.randn(2, 3, 44, 44, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids, images), ours(ids, images))
    phi = peft.PeftModel.from_pretrained(phi, tmp_path / "a")  # Phi alone has the same names
    assert len([m for m in phi.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]) == 3 * 6
    pattern = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(pattern, "model.layers.0.mlp.fc1")  # PEFT asks for a full match
    assert not re.fullmatch(pattern, "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1")


def drop_a_key(folder):
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    del state[next(k for k in sorted(state) if "layers.2.mlp.up_proj.lora_A" in k)]
    save_file(state, file)


def add_a_vision_key(folder):
    file = folder / "adapter_model.safetensors"
    key = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(file) | {key: torch.zeros(4, 16)}, file)


def edit_config(**change):
    def edit(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


@pytest.mark.parametrize("spoil, message", [
    (drop_a_key, r"1 missing: language_model\.layers\.2\.mlp\.up_proj\.lora_A"),
    (add_a_vision_key, r"1 unexpected: .*vision_tower\.encoder\.layers\.0\.self_attn\.q_proj\.lora_A"),
    (lambda f: respell(f, "language_model", "text_model"), r"42 unexpected: base_model\.model\.model\.text_model"),
    (edit_config(r=8), r"42 of wrong shape: .*\(4, 48\), expected \(8, 48\)"),
    (edit_config(use_dora=True), "use_dora"),
    (edit_config(peft_type="IA3"), "found IA3"),
    (edit_config(bias="all"), "bias all"),
    (cut("adapter_model.safetensors"), "damaged"),
    (cut("adapter_config.json"), "damaged"),
    (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: not there"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error(ours, tmp_path_factory, tmp_path, spoil, message):
    peft_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=message):
        load_adapter(ours, tmp_path)


def test_a_save_that_goes_wrong_leaves_the_old_file(ours, tmp_path, monkeypatch):
    """The file is read back before it takes its name."""
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path, "b")
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    fill([p for p in ours.parameters() if p.requires_grad], seed=1)

    def broken(state, file, metadata):
        save_file({k: v + (1e-3 if "layers.1" in k else 0) for k, v in state.items()}, file, metadata)

    monkeypatch.setattr("bases.adapter.save_file", broken)
    with pytest.raises(AssertionError, match="read back"):
        save_adapter(ours, tmp_path, "b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old
