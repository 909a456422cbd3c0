"""What the measurements run on: models of real shapes with random weights, and the rows that are kept.

Arithmetic per token does not depend on the weights' values, so none are downloaded.
"""

from pathlib import Path

import torch

from data import Pair
from formats.readers import read_pairs
from lora import lora_modules
from model import Config, LLaVA, VisionConfig

SHAPES = {
    "tiny": Config(
        vision=VisionConfig(width=32, layers=3, heads=2, ffn=64, image_size=56),
        vocab=512,
        width=128,
        layers=4,
        heads=2,
        kv_heads=2,
        ffn=256,
        image_id=510,
        pad_id=511,
    ),
    "mini": Config(
        vision=VisionConfig(width=256, layers=4, heads=4, ffn=1024),
        width=512,
        layers=8,
        heads=8,
        kv_heads=8,
        ffn=1376,
    ),
    "1b": Config(width=2048, layers=22, heads=16, kv_heads=16, ffn=5504),
    "7b": Config(),
}
LORA_R, LORA_ALPHA, BETA = 64, 128, 0.1  # mDPO 4.1


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> LLaVA:
    """Random weights made in place, in their dtype."""
    with torch.device("meta"):
        model = LLaVA(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
            else:
                p.fill_(1.0)
    return model.eval()


@torch.no_grad()
def randomise_adapter(model: LLaVA, std: float = 0.02) -> None:
    """B starts at zero, where policy and reference are one; here it is not."""
    for module in lora_modules(model).values():
        generator = torch.Generator(module.lora_B.device).manual_seed(module.base.out_features)
        module.lora_B.normal_(0, std, generator=generator)


def kept_rows(data: Path, longest: bool) -> tuple[list[Pair], int]:
    """The rows whose answers are both longer than three words, or of those the one with the longest answers alone;
    and how many were left out. (The sanity set of PDS-DPO has empty answers.)"""
    pairs, problems = read_pairs(data)
    kept = [p for p in pairs if min(len(p.chosen.split()), len(p.rejected.split())) > 3]
    if longest:
        kept = [max(kept, key=lambda p: len(p.chosen) + len(p.rejected))]
    return kept, len(pairs) + len(problems) - len(kept)
