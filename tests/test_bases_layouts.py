"""bases/layouts.py: the tables read and write the same names; a name of each layout, typed out."""

import pytest
import torch
from safetensors import safe_open
from tiny_models import llava, phi_and_siglip, write_bunny, write_hub, write_in_memory

from bases import bunny
from bases.layouts import IGNORED, LAYOUTS, layout_of, our_name, their_name
from model import BASES, LLaVA


def parameters(layout: str) -> list[str]:
    with torch.device("meta"):
        model = bunny.Bunny(bunny.Config()) if layout == "bunny" else LLaVA(BASES["toy"])
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if layout != "vision" or name.startswith("vision_tower.")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout):
    ours = parameters(layout)
    theirs = [their_name(name, layout) for name in ours]
    assert len(set(theirs)) == len(ours) and layout_of(theirs) == layout
    assert [our_name(name, layout) for name in theirs] == ours


@pytest.mark.parametrize(
    "layout, theirs, ours",
    [
        ("hub", "language_model.lm_head.weight", "lm_head.weight"),
        ("hub", "multi_modal_projector.linear_2.bias", "mm_projector.2.bias"),
        ("hub", "vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias", "vision_tower.layers.7.mlp.fc1.bias"),
        ("hub", "vision_tower.vision_model.embeddings.class_embedding", "vision_tower.class_embedding"),
        ("hub", "vision_tower.vision_model.pre_layrnorm.weight", "vision_tower.pre_layrnorm.weight"),
        (
            "transformers",
            "model.language_model.layers.3.mlp.up_proj.weight",
            "language_model.layers.3.mlp.up_proj.weight",
        ),
        ("transformers", "lm_head.weight", "lm_head.weight"),
        ("bunny", "model.final_layernorm.bias", "language_model.norm.bias"),
        (
            "bunny",
            "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias",
            "vision_tower.patch_embedding.bias",
        ),
        ("original", "model.norm.weight", "language_model.norm.weight"),
        ("original", "model.mm_projector.0.weight", "mm_projector.0.weight"),
        (
            "vision",
            "vision_model.encoder.layers.0.self_attn.out_proj.weight",
            "vision_tower.layers.0.self_attn.out_proj.weight",
        ),
    ],
)
def test_names(layout, theirs, ours):
    assert our_name(theirs, layout) == ours and their_name(ours, layout) == theirs


@pytest.mark.parametrize(
    "layout, write",
    [
        ("hub", lambda folder: write_hub(llava(), folder)),
        ("transformers", lambda folder: write_in_memory(llava(), folder, "vision_model.")),
        ("bunny", lambda folder: write_bunny(*phi_and_siglip(), folder)),
    ],
)
def test_files_of_the_libraries(layout, write, tmp_path):
    """Every name in a file of the library comes back as it was, but for what is never read."""
    names = []
    for file in write(tmp_path / "w").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            names += f.keys()
    assert layout_of(names) == layout
    kept = [name for name in names if not IGNORED.search(our_name(name, layout))]
    assert len(kept) > 60 and [their_name(our_name(name, layout), layout) for name in kept] == kept
