"""bases/adapter.py against peft, both ways: what we write peft reads, what peft writes we read, to the same logits."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, fill, llava, logits, phi_and_siglip, write_bunny, write_library

from bases.adapter import load_adapter, save_adapter
from bases.architectures import BUNNY_3B
from bases.checkpoint import load_model
from lora import add_lora, lora_modules, merge_lora

LINEARS = 3 * 7  # decoder layers x (q, k, v, o, gate, up, down)
REGEX = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_library(llava(2), tmp_path_factory.mktemp("llava") / "w")


@pytest.fixture
def ours(folder):
    return load_model(folder)


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


# ---- both ways ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_peft_reads_ours(ours, tmp_path, rslora):
    fill(add_lora(ours, r=4, alpha=12, rslora=rslora))
    save_adapter(ours, tmp_path, "some/base")
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
    with pytest.raises(SystemExit, match="adapter_model.bin: damaged, or holds more than tensors; not opened$"):
        load_adapter(load_model(folder), tmp_path)
    assert not (tmp_path / "sentinel").exists()


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_written_in_the_bases_own_spelling_and_read_back(ours, folder, tmp_path):
    fill(add_lora(ours, r=4, alpha=12))
    save_adapter(ours, tmp_path, "b")
    state = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(state) == 2 * LINEARS and state[first].shape == (4, 32)
    again = load_model(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_bunny_round_trip(tmp_path):
    """Phi's six linears a layer, the original spelling, the decoder's layers and not the tower's."""
    phi, siglip = phi_and_siglip()
    folder = write_bunny(phi, siglip, tmp_path / "w")
    ours, again = load_model(folder), load_model(folder)
    fill(add_lora(ours, r=4, targets=BUNNY_3B.lora_targets))
    assert len(lora_modules(ours)) == 3 * 6
    save_adapter(ours, tmp_path / "a", "bunny")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.dense.lora_B.weight" in state
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


def recast(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file({name: change(t) for name, t in load_file(file).items()}, file)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop_a_key, r"1 missing: language_model\.layers\.2\.mlp\.up_proj\.lora_A"),
        (add_a_vision_key, r"1 unexpected: .*vision_tower\.encoder\.layers\.0\.self_attn\.q_proj\.lora_A"),
        (lambda f: respell(f, "language_model", "text_model"), r"42 unexpected: base_model\.model\.model\.text_model"),
        (edit_config(r=8), r"42 of wrong shape: .*\(4, 48\), expected \(8, 48\)"),
        (edit_config(r=0), "r is 0, expected a whole number from 1"),
        (edit_config(r=-1), "r is -1"),
        (edit_config(r="64"), "r is '64'"),
        (edit_config(r=10**12), "r is 1000000000000"),
        (edit_config(r=None), "r is None"),
        (edit_config(lora_alpha=None), "lora_alpha is None"),
        (edit_config(lora_alpha="12"), "lora_alpha is '12', expected a number"),
        (edit_config(lora_alpha=float("nan")), "lora_alpha is nan"),
        (edit_config(lora_alpha=-12), "lora_alpha is -12"),
        (edit_config(use_rslora="false"), "use_rslora is 'false', expected true or false"),
        (lambda f: recast(f, lambda t: t.to(torch.int8)), r"42 of a type that no weights have: .*torch\.int8"),
        (lambda f: recast(f, lambda t: t / 0), r"adapter_model\.safetensors: base_model\.\S+ holds numbers that are"),
        (lambda f: respell(f, "q_proj", "dense"), r"6 unexpected: language_model\.layers\.0\.self_attn\.dense\.lora_A"),
        (edit_config(use_dora=True), "use_dora"),
        (edit_config(peft_type="IA3"), "found IA3"),
        (edit_config(bias="all"), "bias all"),
        (cut("adapter_model.safetensors"), "damaged"),
        (cut("adapter_config.json"), r"adapter_config\.json: broken JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: not there"),
    ],
)
def test_what_does_not_fit_is_an_error(ours, tmp_path_factory, tmp_path, spoil, message):
    peft_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=message):
        load_adapter(ours, tmp_path)


def test_alpha_8_where_the_file_is_silent(ours, tmp_path):
    """peft's default: 8 / 4 = 2."""
    peft_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))
    load_adapter(ours, tmp_path)
    assert {m.scaling for m in lora_modules(ours).values()} == {2.0}
    theirs = peft.PeftModel.from_pretrained(llava(2), tmp_path).eval()
    assert_same_function(ours, theirs)


def test_fewer_linears_than_ours(ours, tmp_path):
    """An adapter on q and v alone."""
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(llava(2), config)
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert len(lora_modules(ours)) == 3 * 2
    assert_same_function(ours, theirs.eval())


def test_an_adapter_of_another_base_is_said(ours, folder, tmp_path, capsys):
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path / "own", str(folder))
    save_adapter(ours, tmp_path / "other", "llava-hf/llava-1.5-7b-hf")
    load_adapter(load_model(folder), tmp_path / "own")
    assert capsys.readouterr().out == ""
    load_adapter(load_model(folder), tmp_path / "other")
    said = capsys.readouterr().out
    assert "an adapter of 'llava-hf/llava-1.5-7b-hf', used on" in said and str(folder) in said


def test_numbers_that_are_not_finite_are_not_saved(ours, tmp_path):
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path, "b")
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    lora_modules(ours)["language_model.layers.1.mlp.up_proj"].lora_B.data[0, 0] = float("nan")
    with pytest.raises(SystemExit, match=r"1 of 42 .* not finite, \S+layers\.1\.mlp\.up_proj\.lora_B.*lower --lr"):
        save_adapter(ours, tmp_path, "b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old


def test_a_save_that_goes_wrong_leaves_the_old_file(ours, tmp_path, monkeypatch):
    """The file is read back before it takes its name."""
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path, "b")
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    fill([p for p in ours.parameters() if p.requires_grad], seed=1)

    def broken(state, file, metadata):
        save_file({k: v + (1e-3 if "layers.1" in k else 0) for k, v in state.items()}, file, metadata)

    monkeypatch.setattr("bases.tensors.save_file", broken)
    with pytest.raises(AssertionError, match="read back"):
        save_adapter(ours, tmp_path, "b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old


@pytest.mark.parametrize(
    "name, value",
    [
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
    ],
)
def test_what_would_mean_another_function_is_refused(ours, folder, tmp_path, name, value):
    """Its tensors fit: only the config says that they stand beside another base, or are used otherwise."""
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path, "b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(SystemExit, match=f"only plain LoRA .* {name}"):
        load_adapter(load_model(folder), tmp_path)


def test_weights_trained_beside_lora_are_refused_and_an_empty_file_of_them_is_not(ours, folder, tmp_path):
    fill(add_lora(ours, r=4))
    save_adapter(ours, tmp_path, str(folder))
    torch.save({}, tmp_path / "non_lora_trainables.bin")
    load_adapter(load_model(folder), tmp_path)
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(SystemExit, match="non_lora_trainables.bin: weights trained beside LoRA"):
        load_adapter(load_model(folder), tmp_path)
