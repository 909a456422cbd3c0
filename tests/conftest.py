"""A tiny LLaVA in the hub's layout with a Llama-like tokenizer, and a few preference pairs with pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

torch.set_num_threads(1)  # the models are tiny: two threads only wait for each other, most of all on a busy machine
SIZES = dict(width=32, ffn=48, layers=2, heads=4, kv_heads=2, v_width=16, v_ffn=24, v_layers=3, image=28, patch=14)
QUESTIONS = ("What is in the picture?", "How many people are there?", "Describe it.", "Is it blue?", "Where is this?")
ANSWERS = ("A red square on a green field.", "Two dogs.", "It shows a long road, some trees and a house.", "No.", "Yes")


def llama_like_tokenizer() -> Tokenizer:
    """BPE with byte fallback, a dummy blank, <unk> <s> </s> first and <image> <pad> last: 300 ids and those two."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*QUESTIONS, *ANSWERS] * 3, trainer)
    model = json.loads(tokenizer.to_str())
    model["added_tokens"] = [t for t in model["added_tokens"] if not t["content"].startswith("<0x")]
    model["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(model))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    return tokenizer


def hub_tensors(s: dict, vocab: int) -> dict[str, torch.Tensor]:
    """Random weights under the hub's names, written out by hand (what the library writes is tested in test_weights)."""
    g = torch.Generator().manual_seed(0)

    def t(*shape, scale=0.4):
        return torch.randn(shape, generator=g) * scale / (shape[-1] ** 0.5 if len(shape) > 1 else 4)

    vision = "vision_tower.vision_model."
    w = {
        vision + "embeddings.class_embedding": t(s["v_width"]),
        vision + "embeddings.patch_embedding.weight": t(s["v_width"], 3, s["patch"], s["patch"]),
        vision + "embeddings.position_embedding.weight": t((s["image"] // s["patch"]) ** 2 + 1, s["v_width"]),
        vision + "pre_layrnorm.weight": 1 + t(s["v_width"]),
        vision + "pre_layrnorm.bias": t(s["v_width"]),
        vision + "post_layernorm.weight": 1 + t(s["v_width"]),
        vision + "post_layernorm.bias": t(s["v_width"]),
        "multi_modal_projector.linear_1.weight": t(s["width"], s["v_width"], scale=2),
        "multi_modal_projector.linear_1.bias": t(s["width"]),
        "multi_modal_projector.linear_2.weight": t(s["width"], s["width"], scale=2),
        "multi_modal_projector.linear_2.bias": t(s["width"]),
        "language_model.model.embed_tokens.weight": t(vocab, s["width"], scale=4),
        "language_model.model.norm.weight": 1 + t(s["width"]),
        "language_model.lm_head.weight": t(vocab, s["width"], scale=4),
    }
    for i in range(s["v_layers"]):
        p = f"{vision}encoder.layers.{i}."
        shapes = {f"self_attn.{n}_proj": (s["v_width"], s["v_width"]) for n in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (s["v_ffn"], s["v_width"]), "mlp.fc2": (s["v_width"], s["v_ffn"])}
        w |= {f"{p}{n}.weight": t(*shape) for n, shape in shapes.items()}
        w |= {f"{p}{n}.bias": t(shape[0]) for n, shape in shapes.items()}
        w |= {f"{p}layer_norm{n}.{k}": (k == "weight") + t(s["v_width"]) for n in (1, 2) for k in ("weight", "bias")}
    kv = s["width"] // s["heads"] * s["kv_heads"]
    for i in range(s["layers"]):
        p = f"language_model.model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (s["width"], s["width"]),
            "self_attn.k_proj": (kv, s["width"]),
            "self_attn.v_proj": (kv, s["width"]),
            "self_attn.o_proj": (s["width"], s["width"]),
            "mlp.gate_proj": (s["ffn"], s["width"]),
            "mlp.up_proj": (s["ffn"], s["width"]),
            "mlp.down_proj": (s["width"], s["ffn"]),
        }
        w |= {f"{p}{n}.weight": t(*shape, scale=1.5) for n, shape in shapes.items()}
        w |= {f"{p}{n}.weight": 1 + t(s["width"]) for n in ("input_layernorm", "post_attention_layernorm")}
    return w


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tiny-base"))


def write_base(folder: Path) -> Path:
    """A checkpoint folder: 2 decoder layers, 4 query and 2 key heads, 4 image tokens."""
    s = SIZES
    tokenizer = llama_like_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    image_id, vocab = tokenizer.token_to_id("<image>"), 384
    assert image_id < vocab, image_id
    text = dict(
        vocab_size=vocab,
        hidden_size=s["width"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        intermediate_size=s["ffn"],
        rms_norm_eps=1e-5,
    )
    vision = dict(
        hidden_size=s["v_width"],
        num_hidden_layers=s["v_layers"],
        num_attention_heads=2,
        intermediate_size=s["v_ffn"],
        image_size=s["image"],
        patch_size=s["patch"],
    )
    config = dict(
        model_type="llava",
        text_config=text,
        vision_config=vision,
        image_token_index=image_id,
        pad_token_id=tokenizer.token_to_id("<pad>"),
        vision_feature_layer=-2,
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hub_tensors(s, vocab), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def write_pairs(folder: Path) -> Path:
    """Five good pairs in the plain format, pictures of different shapes beside them."""
    rng, rows = np.random.default_rng(0), []
    for i in range(5):
        size = (40 + 7 * i, 60 - 5 * i, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(dict(id=f"p{i}", image=f"{i}.png", prompt=QUESTIONS[i], chosen=ANSWERS[i], rejected=ANSWERS[i - 2]))
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory):
    """A folder with a tiny ImageReward, ArmoRM and CLIP in the published layouts."""
    from pds import tiny

    folder = tmp_path_factory.mktemp("judges")
    tiny.write_imagereward(folder / "imagereward")
    tiny.write_armorm(folder / "armorm")
    tiny.write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def tiny_generators(tmp_path_factory):
    """A folder with a tiny StableDiffusion3Pipeline and an untrained base of the toy world's shape."""
    from lab import pds_demo
    from pds import tiny

    folder = tmp_path_factory.mktemp("generators")
    tiny.write_sd3(folder / "sd3")
    pds_demo.write_base(folder / "base")
    return folder
