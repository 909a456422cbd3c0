"""What a model says of pictures, and how likely it holds what others say of them. For small worlds such as toy.py's.

Not from the papers. Deviations: none.
"""

import torch
from PIL import Image
from torch import Tensor

import losses
from data import Pair, PairData, Processor, collate
from external.progress import progress
from generate import generate
from lora import lora_disabled
from model import LLaVA

AT_ONCE = 512  # pictures in one batch
MAX_TOKENS = 48


def caption_pictures(
    model: LLaVA,
    processor: Processor,
    question: str,
    images: list[Image.Image],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One answer per picture, greedy, or drawn at this temperature."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor(processor.prompt_ids(question))
    texts = []
    for start in progress(range(0, len(images), AT_ONCE), "captions"):
        batch = torch.stack([processor.prepare(image) for image in images[start : start + AT_ONCE]])  # (B, 3, S, S)
        rows = generate(model, [prompt] * len(batch), batch, MAX_TOKENS, temperature, generator)
        texts += [processor.decode(row) for row in rows]
    return texts


@torch.no_grad()
def chosen_change(model: LLaVA, processor: Processor, pairs: list[Pair]) -> float:
    """Mean of log pi_theta(y_w | m_w, q) - log pi_ref(y_w | m_w, q) over the pairs, in nats."""
    data = PairData(pairs, processor)
    examples = [data[0, i] for i in range(len(data))]
    batch = collate(examples, model.config).to(model.lm_head.weight.device)
    policy = losses.plain_logps(model, batch).chosen  # (B,)
    with lora_disabled(model):
        reference = losses.plain_logps(model, batch).chosen  # (B,)
    return float((policy - reference).mean())


@torch.no_grad()
def next_logits(model: LLaVA, processor: Processor, question: str, image: Image.Image, start: str) -> Tensor:
    """(T, V): the logits of the token after each of the T tokens of prompt + `start`, an answer's first words."""
    device = model.lm_head.weight.device
    ids = processor.prompt_ids(question) + processor.response_ids(start)[:-1]  # without EOS
    images = processor.prepare(image)[None]  # (1, 3, S, S)
    return model(torch.tensor(ids)[None].to(device), images.to(device))[0].float()


def write_table(table: dict[str, dict[str, float]]) -> str:
    """Rows x scores, for the terminal."""
    width = max(len(name) for name in table)
    columns = list(next(iter(table.values())))
    lines = ["".ljust(width) + "".join(f" | {column:>11}" for column in columns)]
    for name, scores in table.items():
        cells = [f" | {scores[column]:11.2f}" for column in columns]
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)
