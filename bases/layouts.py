"""How the tensors of a checkpoint are called in each layout, and here: one table a layout, read in both directions.

  hub           llava-hf/llava-1.5-*-hf, and what transformers 5 writes for a freshly built model
  transformers  the in-memory names of transformers >= 4.52, which it writes when it loaded them
  bunny         BAAI/Bunny-v1_0-3B
  original      liuhaotian/llava-v1.5-*
  vision        a CLIP or SigLIP folder of its own, which `original` needs

A table lists prefixes, theirs and ours; the first that fits is exchanged. Where they spell a part in two ways, both
stand in the table, and the first is the one that is written.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Layout(NamedTuple):
    telltale: str  # a prefix that no layout before it has
    prefixes: list[tuple[str, str]]  # (theirs, ours)


def vision(prefix: str) -> list[tuple[str, str]]:
    """The rows of a vision tower whose names begin with `prefix`."""
    return [
        (f"{prefix}embeddings.class_embedding", "vision_tower.class_embedding"),
        (f"{prefix}embeddings.patch_embedding.", "vision_tower.patch_embedding."),
        (f"{prefix}embeddings.position_embedding.", "vision_tower.position_embedding."),
        (f"{prefix}encoder.layers.", "vision_tower.layers."),
        (prefix, "vision_tower."),  # the norms before and after; SigLIP's pooling head
    ]


LAYOUTS = {
    "hub": Layout(
        telltale="language_model.model.",
        prefixes=[
            ("language_model.model.", "language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("multi_modal_projector.linear_1.", "mm_projector.0."),
            ("multi_modal_projector.linear_2.", "mm_projector.2."),
            *vision("vision_tower.vision_model."),
            *vision("vision_tower."),
        ],
    ),
    "transformers": Layout(
        telltale="model.language_model.",
        prefixes=[
            ("model.language_model.", "language_model."),
            ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
            *vision("model.vision_tower.vision_model."),
            *vision("model.vision_tower."),
        ],
    ),
    "bunny": Layout(
        telltale="model.final_layernorm.",
        prefixes=[
            ("model.final_layernorm.", "language_model.norm."),
            ("model.mm_projector.", "mm_projector."),
            *vision("model.vision_tower.vision_tower.vision_model."),
            *vision("model.vision_tower.vision_tower."),
            ("model.", "language_model."),
        ],
    ),
    "original": Layout(
        telltale="model.layers.",
        prefixes=[
            ("model.mm_projector.", "mm_projector."),
            *vision("model.vision_tower.vision_tower.vision_model."),
            *vision("model.vision_tower.vision_tower."),
            ("model.", "language_model."),
        ],
    ),
    "vision": Layout(
        telltale="vision_model.",
        prefixes=vision("vision_model."),
    ),
}
IGNORED = re.compile(  # tensors, by our names, that never influence the output
    r"rotary_emb\.inv_freq$|position_ids$|^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$"
    r"|^vision_tower\.(post_layernorm|head)\."
)


def layout_of(names: Iterable[str]) -> str | None:
    """The layout that these tensor names are of."""
    names = list(names)
    for layout, (telltale, _) in LAYOUTS.items():
        if any(name.startswith(telltale) for name in names):
            return layout
    return None


def our_name(name: str, layout: str) -> str:
    """vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias -> vision_tower.layers.0.mlp.fc1.bias"""
    for theirs, ours in LAYOUTS[layout].prefixes:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def their_name(name: str, layout: str) -> str:
    """The inverse of our_name."""
    for theirs, ours in LAYOUTS[layout].prefixes:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def refuse_misfits(
    where: str,
    missing: list[str],
    unexpected: list[str],
    wrong_shape: list[str],
    wrong_type: list[str],
) -> None:
    """SystemExit with up to ten names of each kind, and their number, if there are any."""
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of wrong shape": wrong_shape,
        "of a type that no weights have": wrong_type,
    }
    lines = [f"  {len(names)} {kind}: {', '.join(names[:10])}" for kind, names in kinds.items() if names]
    if lines:
        raise SystemExit("\n".join([where, *lines]))
