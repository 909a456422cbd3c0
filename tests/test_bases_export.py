"""export.py: transformers opens what we write and gives our ids, our pixels within a grey level, our logits."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import llava, phi_and_siglip, write_bunny, write_hub, write_original
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from bases import export
from bases.adapter import load_adapter, save_adapter
from bases.architectures import BUNNY_3B
from bases.checkpoint import load_base
from bases.hub_files import write_tokenizer
from bases.tokenizer import load_processor
from lora import add_lora

QUESTION = "What is in the picture?"
GREY = 1 / 255 / 0.26130258  # one grey level of 255, divided by CLIP's smallest standard deviation


def picture(w: int = 50, h: int = 31) -> Image.Image:
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x * 5, y * 8, 255 - x * 5], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter with both A and B filled, and the logits it gives."""
    model, _ = load_base(str(tiny_base))
    g = torch.Generator().manual_seed(0)
    for p in add_lora(model, r=4, alpha=8):
        p.data = torch.randn(p.shape, generator=g) / 10
    folder = tmp_path_factory.mktemp("adapter") / "a"
    save_adapter(model, folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def merged(tiny_base, adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "merged"
    export.main(["--base", str(tiny_base), "--adapter", str(adapter), "--out", str(out)])
    return out


def small_tokenizer(tiny_base, file) -> None:
    """The first 96 ids of the tiny base's tokenizer, for the models of tiny_models: <unk>, <s>, </s> and bytes. The
    last is a special token, since the tiny Bunny ends with it."""
    tokenizer = json.loads((tiny_base / "tokenizer.json").read_text())
    vocabulary = {t: i for t, i in tokenizer["model"]["vocab"].items() if i < 96}
    tokenizer["model"] |= {"vocab": vocabulary, "merges": [], "byte_fallback": False}
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < 96]
    small = Tokenizer.from_str(json.dumps(tokenizer))
    small.add_special_tokens(["<0x5C>"])
    assert small.token_to_id("<0x5C>") == 95
    small.save(str(file))


def ask(processor):
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=picture(), text=text, return_tensors="pt")


def test_transformers_gives_our_ids_pixels_and_logits(tiny_base, adapter, merged):
    ours, folder = load_base(str(tiny_base))
    load_adapter(ours, adapter)
    own = load_processor(folder, ours.config)
    theirs, report = LlavaForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    inputs = ask(AutoProcessor.from_pretrained(merged))
    ids = own.prompt_ids(QUESTION)
    assert inputs["input_ids"].tolist() == [ids]
    pixels = own.prepare(picture())
    assert (inputs["pixel_values"][0] - pixels).abs().max() <= 1.001 * GREY
    with torch.no_grad():
        logits = theirs.eval()(input_ids=torch.tensor([ids]), pixel_values=pixels[None]).logits
        torch.testing.assert_close(logits, ours(torch.tensor([ids]), pixels[None]), atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == 2 and theirs.dtype == torch.float32


def test_pixels_are_padded_not_cut(merged):
    """A white 60 x 30 picture: above and below the mean colour, in the middle white; a crop would be white all over."""
    white = Image.new("RGB", (60, 30), "white")
    x = AutoProcessor.from_pretrained(merged).image_processor(white, return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = (x * std[:, None, None] + mean[:, None, None]) * 255
    torch.testing.assert_close(levels[:, 0, 14], torch.tensor([122.0, 116.0, 104.0]), atol=1, rtol=0)
    torch.testing.assert_close(levels[:, 14, 14], torch.tensor([255.0] * 3), atol=1, rtol=0)


def test_chat_template(merged):
    """The Vicuna prompt, from parts or from text with <image> in it; turns, and a system prompt of one's own."""
    processor, tokenizer = AutoProcessor.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    parts = [{"type": "image"}, {"type": "text", "text": "Hi?"}]
    user, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": "Hello."}
    rendered = processor.apply_chat_template([user], add_generation_prompt=True)
    assert rendered == f"{system} USER: <image>\nHi? ASSISTANT:"
    plain = [{"role": "user", "content": "<image>\nHi?"}]  # as lmms-eval asks
    rendered = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert rendered == f"{system} USER: <image>\nHi? ASSISTANT:"
    again = [{"role": "system", "content": "Be brief."}, user, answer, {"role": "user", "content": "And?"}]
    rendered = processor.apply_chat_template(again, add_generation_prompt=True)
    assert rendered == "Be brief. USER: <image>\nHi? ASSISTANT: Hello.</s>USER: And? ASSISTANT:"


def test_an_old_bases_tokens_are_added(tmp_path, tiny_base):
    """The original layout has no rows for <image> and <pad>: they come after the 96 and are the mean of them; 96 + 2
    rounds up to 128. Its tower is in a CLIP folder; all three vision layers come along."""
    source = write_original(llava(2), tmp_path / "w")
    small_tokenizer(tiny_base, source / "tokenizer.json")
    export.main(["--base", str(source), "--out", str(tmp_path / "out")])
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    head = theirs.lm_head.weight
    assert head.shape == (128, 32) and theirs.config.image_token_id == 96 and theirs.config.pad_token_id == 97
    assert torch.equal(head[:96], llava(2).lm_head.weight)
    torch.testing.assert_close(head[96:], head[:96].mean(0).expand(32, -1), atol=1e-6, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<image>", "<pad>"]) == [96, 97]
    inputs = ask(AutoProcessor.from_pretrained(tmp_path / "out"))
    assert int((inputs["input_ids"] == 96).sum()) == 9


def test_merging_is_done_in_float32(tiny_base, adapter, tmp_path):
    """bf16 files hold round(W + 2 B A), not round(W) + round(2 B A): alpha 8 / r 4 = 2."""
    chosen = ["--out", str(tmp_path / "o"), "--dtype", "bfloat16"]
    export.main(["--base", str(tiny_base), "--adapter", str(adapter), *chosen])
    base, files = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    ab = load_file(adapter / "adapter_model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj"
    a, b = (ab[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = base[f"{name}.weight"].double() + 2 * b @ a
    assert torch.equal(files[f"{name}.weight"], exact.float().bfloat16())
    assert all(t.dtype == torch.bfloat16 for t in files.values()) and files.keys() == base.keys()
    untouched = "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"  # never runs, but belongs to the layout
    assert torch.equal(files[untouched], base[untouched].bfloat16())


def test_rslora_is_merged_with_its_own_scale(tiny_base, adapter, tmp_path):
    """8 / sqrt(4) = 4 instead of 8 / 4 = 2."""
    rslora = tmp_path / "rslora"
    shutil.copytree(adapter, rslora)
    config = json.loads((rslora / "adapter_config.json").read_text())
    (rslora / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    export.main(["--base", str(tiny_base), "--adapter", str(rslora), "--out", str(tmp_path / "o")])
    base, merged = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    ab = load_file(rslora / "adapter_model.safetensors")
    name = "language_model.model.layers.0.self_attn.v_proj"
    a, b = (ab[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 4 * b @ a, atol=1e-6, rtol=0)


def test_shards(tmp_path):
    """Tensors of 40, 40, 120 and 8 bytes, at most 100 in a shard: 40 + 40 | 120 alone | 8; the library reads them."""
    tensors = {"a": torch.arange(10.0), "b": torch.ones(2, 5), "c": torch.full((30,), 3.0), "d": torch.zeros(2)}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    export.write_shards(tmp_path, shapes, torch.float32, tensors.get, limit=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 208
    assert [index["weight_map"][n][6:11] for n in "abcd"] == ["00001", "00001", "00002", "00003"]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as f:
            assert torch.equal(f.get_tensor(name), tensors[name]) and f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_file_in_every_dtype(tmp_path, dtype):
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(7).to(dtype)}
    export.write_shards(tmp_path, {n: tuple(t.shape) for n, t in tensors.items()}, dtype, tensors.get)
    back = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("own_tower", [True, False])
def test_bunny_comes_back_in_its_own_layout(tmp_path, own_tower, tiny_base):
    source = write_bunny(*phi_and_siglip(), tmp_path / "w", own_tower)
    small_tokenizer(tiny_base, source / "tokenizer.json")
    model, _ = load_base(str(source))
    for p in add_lora(model, r=2, targets=BUNNY_3B.lora_targets):
        p.data.fill_(0.02)
    save_adapter(model, tmp_path / "a", "b")
    export.main(["--base", str(source), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    whole = write_bunny(*phi_and_siglip(), tmp_path / "whole")  # SigLIP's tower moves in, cut as BAAI's
    files, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", whole))
    assert files.keys() == expected.keys()
    again, _ = load_base(str(tmp_path / "out"))
    ids, images = torch.tensor([[5, *[-200] * 9, 7, 8]]), torch.randn(1, 3, 44, 44)
    with torch.no_grad():
        torch.testing.assert_close(again(ids, images), model(ids, images), atol=1e-4, rtol=0)


def test_a_merge_that_went_wrong_is_not_kept(tiny_base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("bases.export.scaling_of", lambda *settings: 1.0)  # it should be 2
    with pytest.raises(SystemExit, match="nothing is kept"):
        export.main(["--base", str(tiny_base), "--adapter", str(adapter), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
    export.main(
        [
            "--base",
            str(tiny_base),
            "--adapter",
            str(adapter),
            "--out",
            str(tmp_path / "out"),
            "--max-difference",
            "1000",
        ]
    )
    with pytest.raises(SystemExit, match="exists already"):
        export.main(["--base", str(tiny_base), "--out", str(tmp_path / "out")])


def test_what_it_prints(tiny_base, adapter, tmp_path, capsys):
    """What the adapter does to the logits, and that merging changed far less."""
    export.main(["--base", str(tiny_base), "--adapter", str(adapter), "--out", str(tmp_path / "o")])
    printed = capsys.readouterr().out
    effect = re.search(r"the adapter changes a logit by up to (\S+)\n", printed)
    error = re.search(r"writing it as float32 changes a logit by up to (\S+)\n", printed)
    assert float(effect[1]) > 0.01 > 1e-4 > float(error[1])


def test_a_tokenizer_of_another_base(tmp_path, tiny_base):
    folder = write_hub(llava(), tmp_path / "w")
    shutil.copy(tiny_base / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(SystemExit, match=r"<image> is \d+ in the tokenizer and 90 in config"):
        write_tokenizer(folder, tmp_path, load_base(str(folder))[0].config)


def test_a_place_that_cannot_be_written_is_found_before_the_base_is_read(tmp_path):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "merged"
    with pytest.raises(SystemExit, match="merged: cannot be written"):
        export.main(["--base", str(tmp_path / "no-base"), "--out", str(out)])
