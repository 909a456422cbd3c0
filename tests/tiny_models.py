"""Random tiny models of the reference libraries, and their tensors in every layout that is found in the wild.

Every bias, norm and embedding is non-trivial, 9 patches of 14 px, 3 vision layers of which 2 run: mistakes show.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model import LLaVA

IMAGE_ID, PAD_ID, EOS_ID, PATCHES = 90, 91, 2, 9


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 1.5 / p[0].numel() ** 0.5 if p.dim() > 1 and "embed" not in name else 0.3
        p.data = torch.randn(p.shape, generator=g) * scale + (p.dim() == 1 and "norm" in name and "weight" in name)
    return model.eval()


def llava(kv_heads: int = 4, seed: int = 0) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        projection_dim=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        pad_token_id=PAD_ID,
        image_seq_length=PATCHES,
    )
    return randomise(LlavaForConditionalGeneration(config), seed)


def batch(seed: int = 0, image_id: int = IMAGE_ID) -> tuple[Tensor, Tensor, Tensor]:
    """ids (2, 30) with 9 placeholders and no padding, pictures (2, 3, 42, 42), a response mask (2, 30)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 30), generator=g)
    ids[0, 4 : 4 + PATCHES] = ids[1, 7 : 7 + PATCHES] = image_id
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 20:], mask[1, 25:29] = True, True
    return ids, torch.randn(2, 3, 42, 42, generator=g), mask


def rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The first prefix that fits is exchanged."""
    out = {}
    for name, tensor in state.items():
        old = next((p for p in table if name.startswith(p)), "")
        out[table.get(old, "") + name.removeprefix(old)] = tensor.contiguous().clone()
    return out


def sparse_config(model: LlavaForConditionalGeneration) -> dict:
    """Like the hub's: only what differs from Llama's and CLIP's defaults."""
    t, v = model.config.text_config, model.config.vision_config
    text = {
        k: getattr(t, k)
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        )
    }
    vision = {
        k: getattr(v, k)
        for k in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
    }
    return {
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": IMAGE_ID,
        "pad_token_id": PAD_ID,
        "vision_feature_layer": -2,
    }


HUB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.vision_model.",
}


def write_hub(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Three safetensors shards and an index, sparse config."""
    folder.mkdir(parents=True)
    state = rename(model.state_dict(), HUB)
    names, table = sorted(state), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({n: state[n] for n in names[i::3]}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text(json.dumps(sparse_config(model)))
    return folder


def write_library(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """As transformers 5 writes a freshly built model."""
    model.save_pretrained(folder)
    return folder


def write_in_memory(model: LlavaForConditionalGeneration, folder: Path, infix: str = "") -> Path:
    """The names of the modules themselves, one file; with infix "vision_model." those of transformers 4.52."""
    folder.mkdir(parents=True)
    state = rename(model.state_dict(), {"model.vision_tower.": f"model.vision_tower.{infix}"})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    return folder


def write_original(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """haotian-liu's: flat config, two .bin shards with inv_freq, the tower in a full CLIP folder beside it."""
    clip = folder.parent / "some-clip"
    folder.mkdir(parents=True)
    clip.mkdir()
    state = rename(
        model.state_dict(),
        {
            "model.language_model.": "model.",
            "model.vision_tower.": "vision_model.",
            "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        },
    )
    vision = {n: state.pop(n) for n in list(state) if n.startswith("vision_model.")}
    vision |= {"vision_model.embeddings.position_ids": torch.arange(10)[None], "logit_scale": torch.ones(())}
    vision |= {"text_model.final_layer_norm.weight": torch.ones(4), "visual_projection.weight": torch.ones(8, 16)}
    torch.save(vision, clip / "pytorch_model.bin")
    v = sparse_config(model)["vision_config"] | {"model_type": "clip_vision_model"}
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": v, "text_config": {}}))
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    table = {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({n: state[n] for n in names}, folder / file)
        table |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = sparse_config(model)["text_config"] | {
        "model_type": "llava",
        "mm_vision_tower": "openai/some-clip",
        "mm_hidden_size": 16,
        "pad_token_id": 0,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_scaling": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYOUTS = {
    "hub": write_hub,
    "transformers 5, fresh": write_library,
    "transformers 5, in memory": write_in_memory,
    "transformers 4.52, in memory": lambda model, folder: write_in_memory(model, folder, "vision_model."),
    "original": write_original,
}


def fill(parameters, seed: int = 0) -> None:
    """An adapter's A and B both non-zero, as after training."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = torch.randn(p.shape, generator=g) / 4


def logits(model) -> Tensor:
    """Of the batch above, from our model or the library's."""
    ids, images, _ = batch()
    images = images.to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, LLaVA):
            return model(ids, images)
        return model(input_ids=ids, pixel_values=images).logits


# ---- Bunny ---------------------------------------------------------------------------------------------------------


def phi_and_siglip(
    seed: int = 0,
    kv_heads: int = 4,
    rope_theta: float = 10000.0,
    rotary_factor: float = 0.4,
) -> tuple[PhiForCausalLM, SiglipVisionModel]:
    """Head size 20, of which 8 dims turn; 44 px in patches of 14 leave two over; no head bias, as in Bunny."""
    rope = {"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": rotary_factor}
    config = PhiConfig(
        vocab_size=96,
        hidden_size=80,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        resid_pdrop=0.1,
        rope_parameters=rope,
    )
    phi = PhiForCausalLM(config)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=44,
            patch_size=14,
        )
    )
    phi, siglip = randomise(phi, seed), randomise(siglip, seed + 1)
    phi.lm_head.bias.data.zero_()
    return phi, siglip


def write_bunny(phi: PhiForCausalLM, siglip: SiglipVisionModel, folder: Path, own_tower: bool = True) -> Path:
    """BAAI's layout: no head bias, three of the four SigLIP layers, no pooling head; SigLIP's own folder beside."""
    tower = folder.parent / "some-siglip"
    folder.mkdir(parents=True)
    tower.mkdir(exist_ok=True)
    vision = {"vision_model." + n.removeprefix("vision_model."): t.clone() for n, t in siglip.state_dict().items()}
    save_file(vision | {"logit_bias": torch.ones(1)}, tower / "model.safetensors", metadata={"format": "pt"})
    sizes = {
        k: getattr(siglip.config, k)
        for k in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
    }
    sizes["layer_norm_eps"] = 1e-6
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": sizes}))
    state = {n: t.clone() for n, t in phi.state_dict().items() if n != "lm_head.bias"}
    g = torch.Generator().manual_seed(5)
    for name, shape in (("0.weight", (80, 48)), ("0.bias", (80,)), ("2.weight", (80, 80)), ("2.bias", (80,))):
        state[f"model.mm_projector.{name}"] = torch.randn(shape, generator=g) / 5
    if own_tower:
        kept = {n: t for n, t in vision.items() if ".head." not in n and "layers.3." not in n}
        state |= {f"model.vision_tower.vision_tower.{n}": t.clone() for n, t in kept.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    c = phi.config
    config = {
        "model_type": "bunny-phi",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "hidden_act": c.hidden_act,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "partial_rotary_factor": c.rope_parameters["partial_rotary_factor"],
        "rope_theta": c.rope_parameters["rope_theta"],
        "layer_norm_eps": c.layer_norm_eps,
        "bos_token_id": 95,
        "eos_token_id": 95,
        "pad_token_id": 95,
        "mm_vision_tower": "google/some-siglip",
        "vision_config": sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
