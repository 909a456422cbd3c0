"""A small LLaVA from nothing, in LLaVA's own order: vision tower, then captions stage by stage, then the hub's files.

For worlds like toy.py's, which bring the pictures, what is in them, and the captions of each stage. Afterwards the
folder is a base like any other: `bases.checkpoint.load_base` reads it, and so does transformers.

Deviations from LLaVA-1.5: the tower learns from object labels, not from pairs of pictures and texts; a stage trains
projector and decoder together; one batch in ten has no picture, so that the model can also be asked without one.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

import losses
from bases.hub_files import write_llava_files
from bases.layouts import their_name
from data import SYSTEM, Processor, pad_rows
from external.progress import progress
from model import Config, LLaVA, causal

WORDS = re.compile(r"\w+:?|[^\w\s]")
TEXT_ALONE = 10  # one batch in so many is without pictures


def words(text: str) -> list[str]:
    """Words and marks; a word keeps its colon, as in USER:."""
    return WORDS.findall(text)


def word_tokenizer(texts: list[str], c: Config) -> Tokenizer:
    """One token per word of the texts; the system text is one token too, which keeps prompts short."""
    known = ["<unk>", "<s>", "</s>", SYSTEM, "USER:", "ASSISTANT:"]
    known += sorted({word for text in texts for word in words(text)})
    assert known.index("<s>") == c.bos_id
    assert known.index("</s>") == c.eos_id
    assert len(known) <= c.image_id, len(known)
    vocab = {word: i for i, word in enumerate(known)}
    vocab |= {"<image>": c.image_id, "<pad>": c.pad_id}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(rf"{re.escape(SYSTEM)}|{WORDS.pattern}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece()  # joins with blanks, none before , and .
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    return tokenizer


def new_model(config: Config, objects: int, seed: int, device: torch.device) -> tuple[LLaVA, nn.Linear]:
    """Random weights, and the head that the tower is trained with, one output per object."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LLaVA(config)
        head = nn.Linear(config.vision.width, objects)
    return model.to(device), head.to(device)


def train_tower(model: LLaVA, head: nn.Linear, images: Tensor, present: Tensor, seed: int, **stage) -> None:
    """Which objects are in the picture? images (n, 3, S, S), present (n, objects) 0 or 1, on the model's device."""

    def loss_of(rows: Tensor, step: int) -> Tensor:
        found = head(model.vision_tower(images[rows]))  # (B, N, objects)
        return F.binary_cross_entropy_with_logits(found.amax(1), present[rows])  # the best patch of each object

    parameters = [*model.vision_tower.parameters(), *head.parameters()]
    fit("vision tower", parameters, loss_of, len(images), seed, **stage)
    model.vision_tower.requires_grad_(False)


@torch.no_grad()
def tower_features(model: LLaVA, images: Tensor) -> Tensor:
    """What the frozen tower sees, once for all stages: images (n, 3, S, S) -> (n, N, Cv)."""
    return torch.cat([model.vision_tower(part) for part in images.split(512)])


def train_captions(
    model: LLaVA,
    processor: Processor,
    features: Tensor,
    question: str,
    texts: list[str],
    name: str,
    seed: int,
    **stage,
) -> None:
    """Projector and decoder on one text per picture, given the tower's features (n, N, Cv)."""
    device = features.device
    prompt = torch.tensor(processor.prompt_ids(question))
    prompt_alone = torch.tensor(processor.prompt_ids(question, with_image=False))
    answers = [torch.tensor(processor.response_ids(text)) for text in texts]

    def loss_of(rows: Tensor, step: int) -> Tensor:
        """Mean over the tokens of -log pi(text | picture, question)."""
        with_image = step % TEXT_ALONE > 0
        prompts = [prompt if with_image else prompt_alone] * len(rows)
        tokens = pad_rows(prompts, [answers[i] for i in rows], model.config.pad_id)
        ids = tokens.input_ids.to(device)  # (B, T)
        mask = tokens.response_mask.to(device)  # (B, T)
        seen = model.mm_projector(features[rows]) if with_image else None  # (B, N, C)
        positions = torch.arange(ids.shape[1], device=device)[None]  # (1, T)
        hidden = model.language_model(model.embed(ids, seen), positions, causal)  # (B, T, C)
        return -losses.sequence_logps(model.lm_head(hidden), ids, mask).sum() / mask.sum()

    parameters = [*model.mm_projector.parameters()]
    parameters += [*model.language_model.parameters(), *model.lm_head.parameters()]
    fit(name, parameters, loss_of, len(texts), seed, **stage)


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor, int], Tensor],
    n: int,
    seed: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    beta2: float,
) -> None:
    """AdamW on random batches of n rows, linear warm-up over a tenth of the steps, cosine to 0, gradient norm 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, beta2), fused=True)
    for step in progress(range(steps), name):
        rows = torch.randint(n, (batch,), generator=generator)
        loss = loss_of(rows, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rising = 10 * (step + 1) / steps
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(rising, falling)
        optimizer.step()
    print(f"{name}: {steps} steps, last loss {loss.item():.3f}")


def save(model: LLaVA, processor: Processor, folder: Path) -> None:
    """config.json, tokenizer and processor files, model.safetensors: the layout of llava-hf's checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.tokenizer.save(str(folder / "tokenizer.json"))
    write_llava_files(folder, folder, model.config, torch.float32)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[their_name(name, "hub")] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
