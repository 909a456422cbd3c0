"""CLIP score: the cosine of picture and caption (Table 4's second scorer), by open_clip.

Deviations: none from ImageReward's CLIPScore, which is the cosine of OpenAI's ViT-L/14, neither scaled nor clipped.
`ViT-L-14` without `quickgelu` is refused for OpenAI's weights: open_clip only warns, and then computes other numbers.
Any CLIP-shaped model in open_clip's own folder layout works too (open_clip_config.json and weights).
"""

from pathlib import Path

import torch
from PIL import Image

from external import hub
from pds import runner

DEFAULT = "ViT-L-14-quickgelu"
WEIGHTS = "open_clip_model.safetensors"


class Scorer:
    """score(captions, images) -> cosines."""

    def __init__(self, model: torch.nn.Module, prepare, tokenizer, device: str):
        self.model = model.to(device).eval()
        self.prepare = prepare
        self.tokenizer = tokenizer
        self.device = device

    def is_cut(self, caption: str) -> bool:
        """Whether tokens are left over behind the model's context; behind the end of a text there is only padding."""
        context = self.model.context_length
        [ids] = self.tokenizer([caption], context_length=2 * context).tolist()
        return len(set(ids[context:])) > 1

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Normalised embeddings (B, P)."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)

    @torch.no_grad()
    def score(self, captions: list[str], images: list[Image.Image]) -> list[float]:
        prepared = [self.prepare(image) for image in images]
        pixels = torch.stack(prepared).to(self.device)  # (B, 3, S, S)
        image = self.model.encode_image(pixels, normalize=True)  # (B, P)
        text = self.encode_texts(captions)  # (B, P)
        return (image * text).sum(-1).tolist()  # (B, P) -> (B,)


def find_weights(name: str, flag: str = "--clip") -> tuple[str, Path]:
    """An open_clip folder, or a model's name -> the name open_clip takes, and the file of the weights."""
    folder = Path(name)
    if folder.is_dir():
        found = [folder / file for file in (WEIGHTS, "open_clip_pytorch_model.bin") if (folder / file).is_file()]
        if not found or not (folder / "open_clip_config.json").is_file():
            raise SystemExit(f"{folder}: not an open_clip folder (open_clip_config.json and {WEIGHTS})")
        return f"local-dir:{folder.resolve()}", found[0]
    open_clip = runner.optional("open_clip")
    known = [model for model, tag in open_clip.list_pretrained() if tag == "openai" and model.endswith("quickgelu")]
    if name not in known:
        raise SystemExit(f"{flag} {name}: neither an open_clip folder nor one of OpenAI's models: {', '.join(known)}")
    repository = open_clip.get_pretrained_cfg(name, "openai")["hf_hub"].strip("/")
    return name, hub.download(repository, (WEIGHTS,), "model", repository, f"{flag} FOLDER") / WEIGHTS


def load(name: str, weights: Path, device: str = "cpu") -> Scorer:
    """What find_weights gave -> the scorer, in float32. SystemExit if the weights do not fit."""
    open_clip = runner.optional("open_clip")
    local = name.startswith("local-dir:")
    try:
        model, _, prepare = open_clip.create_model_and_transforms(
            name,
            pretrained=None if local else str(weights),
            precision="fp32",
            load_weights=True,
            weights_only=True,
        )
    except RuntimeError as error:  # a missing, surplus or misshapen tensor; a file that was cut off
        raise SystemExit(f"{weights}: these weights do not fit ({' '.join(str(error).split())[:400]})") from None
    return Scorer(model, prepare, open_clip.get_tokenizer(name), device)
