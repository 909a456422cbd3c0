"""Preference pairs -> what the model reads: prompt, tokens, pictures, batches.

    Pair {id, image, prompt, chosen, rejected}  (formats/readers.py)
      -> Processor: prompt ids with the image placeholders expanded, response ids + EOS, prepared pictures
      -> Example    one pair, m_l drawn from (seed, row, epoch)
      -> Batch      right-padded, with the mask of response tokens

Ids are concatenated, strings are never split to find a boundary: prompt ids, then the response's own ids, then EOS.
A row that cannot be used is a Problem with row and id (formats/problems.py); nothing is cut or dropped silently.
To look at data: `python -m formats.check DATA`, `python -m formats.show DATA --rows 3 --base B`.

Deviations from the papers and their releases
1. m_l is drawn here, once per example and epoch, so policy and reference score the same picture (pictures.py has more).
2. `<image>` anywhere in a question is moved to the front, as LLaVA's own training does.
3. An example that is too long is refused, or loses the end of its response (--cut-long); the mDPO release cuts the
   prompt (its picture, even) or both responses.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

import pictures
from model import Config
from pictures import ImageSpec

MAX_LENGTH = 4096  # expanded tokens; RoPE has no table, so no config's max_position_embeddings limits it
IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATED = (SYSTEM + " USER: ", " ASSISTANT:")  # the mDPO release stores its prompts inside this


@dataclass(frozen=True)
class Template:
    """How a base was taught to read. Vicuna's words for all of them:

    {SYSTEM} USER: <image>\\n{question} ASSISTANT:{response}{EOS}
    """

    bos: bool = True
    response_blank: bool = False  # " The" or "The" after "ASSISTANT:"; Llama's tokenizer adds its own blank
    image: ImageSpec = ImageSpec()


SIGLIP = ImageSpec(size=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VICUNA = Template()  # LLaVA-1.5
BUNNY = Template(bos=False, response_blank=True, image=SIGLIP)  # as the base was tuned
BUNNY_RELEASED = Template(bos=False, response_blank=False, image=SIGLIP)  # as the mDPO release trains it


# ---- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to (image, prompt), `chosen` (y_w) is better than `rejected` (y_l)."""

    id: str
    image: Path | bytes | None  # m_w
    prompt: str  # the bare question q, no template, no <image>
    chosen: str
    rejected: str
    row: int  # 1-based in the file; with the seed and epoch it decides m_l
    image_rejected: Path | bytes | None = None  # m_l, where the data gives one
    system: str = SYSTEM  # the data's own system text, or the one all bases were tuned with
    where: str = field(default="", compare=False)  # file:line, for messages


class Problem(NamedTuple):
    """Why a row cannot be used."""

    row: int
    id: str
    reason: str  # a fixed phrase, counted by
    detail: str = ""
    where: str = ""  # file:line


class BadRow(ValueError):
    """BadRow(reason) or BadRow(reason, detail): a row that cannot be used."""

    @property
    def problem(self) -> tuple[str, str]:
        """Its reason, a fixed phrase, and its detail."""
        return self.args[0], self.args[1] if len(self.args) > 1 else ""


def bare_question(text: str) -> str:
    """A question as stored, bare or in the mDPO release's template, `<image>` at most once anywhere -> it alone."""
    before, after = TEMPLATED
    if text.startswith(before) and text.endswith(after):
        text = text[len(before) : -len(after)]
    elif text.rstrip().endswith("ASSISTANT:"):
        raise BadRow("prompt is in another template", f"wanted: the question alone, or {before!r} + it + {after!r}")
    if text.count(IMAGE_TOKEN) > 1:
        raise BadRow("several <image>", "one picture per pair is supported")
    return text.replace(IMAGE_TOKEN, "").strip()


class Processor:
    """Text and pictures of one base -> ids and tensors. `tokenizer` is the base's tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer, config: Config, template: Template = VICUNA):
        self.tokenizer = tokenizer
        self.config = config
        self.template = replace(template, image=replace(template.image, size=config.vision.image_size))
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_texts = sorted({token.content for token in added if token.special} | {IMAGE_TOKEN})

    def encode(self, text: str) -> list[int]:
        """Ids of a text; "</s>" in it is text, never the end-of-sequence id."""
        self.tokenizer.encode_special_tokens = True  # each time: a tokenizer sent to a worker process has forgotten it
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, question: str, with_image: bool = True, system: str = SYSTEM) -> list[int]:
        """BOS, system text, the picture's placeholders, question, "ASSISTANT:". Each chunk around <image> is encoded
        on its own, as LLaVA does, so each gets its own dummy blank."""
        bos = [self.config.bos_id] if self.template.bos else []
        if not with_image:
            return bos + self.encode(f"{system} USER: {question} ASSISTANT:")
        before = self.encode(f"{system} USER: ")
        placeholders = [self.config.image_id] * self.config.vision.patches
        after = self.encode(f"\n{question} ASSISTANT:")
        return bos + before + placeholders + after

    def response_ids(self, response: str, room: int | None = None) -> list[int]:
        """The stripped response and EOS, which is scored too; its first `room` ids if it is longer (--cut-long)."""
        blank = " " if self.template.response_blank else ""
        ids = self.encode(blank + response.strip()) + [self.config.eos_id]
        return ids[:room]

    def decode(self, ids: list[int]) -> str:
        """Generated ids up to EOS -> text."""
        if self.config.eos_id in ids:
            ids = ids[: ids.index(self.config.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def prepare(self, image: Image.Image) -> Tensor:
        return pictures.prepare(image, self.template.image)  # (3, S, S)


# ---- examples ------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One pair as tensors."""

    pair: Pair
    prompt: Tensor  # (P,) int64, N of them image placeholders
    chosen: Tensor  # (Tw,) response ids and EOS
    rejected: Tensor  # (Tl,)
    image: Tensor | None  # m_w as levels 0-255 (3, S, S); None for dpo-no-image
    image_rejected: Tensor | None  # m_l (3, S, S); None where the objective does not look at it
    draw: int = 0  # the epoch whose m_l this is
    spec: ImageSpec = ImageSpec()  # how the levels are normalised, once they are on the device

    def tokens(self) -> int:
        """Tokens of a packed row: each prompt once, each response once."""
        after_m_w = len(self.prompt) + len(self.chosen) + len(self.rejected)
        return after_m_w if self.image_rejected is None else after_m_w + len(self.prompt) + len(self.chosen)


class LostPicture(ValueError):
    """A picture that could be opened when the data was checked, and no longer can."""


def open_of(pair: Pair, source: Path | bytes) -> Image.Image:
    """A picture of a pair, RGB. LostPicture with the row's place and the reason."""
    try:
        return pictures.open_image(source)
    except ValueError as e:
        place = pair.where or f"row {pair.row}"
        file = source if isinstance(source, Path) else "the picture in the row"
        raise LostPicture(f"{place}: id {pair.id!r}: {file}: {e}; it was there when the run began") from None


class PairData(Dataset):
    """Examples by (epoch, index): the epoch is part of what is asked for, since m_l is drawn anew in each.

    strategy: how m_l is made, None for no m_l. max_length: longer responses are cut to fit (--cut-long). left_out: how
    many rows of the data are none of these pairs, by reason.
    """

    def __init__(
        self,
        pairs: list[Pair],
        processor: Processor,
        strategy: str | None = None,
        seed: int = 0,
        fresh_every_epoch: bool = True,
        with_image: bool = True,
        max_length: int | None = None,
        left_out: dict[str, int] | None = None,
    ):
        self.pairs = pairs
        self.processor = processor
        self.strategy = strategy
        self.seed = seed
        self.fresh_every_epoch = fresh_every_epoch
        self.with_image = with_image
        self.max_length = max_length
        self.left_out = dict(left_out or {})

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        _, index = key
        example = self.without_pixels(key)
        if not self.with_image:
            return example
        image = open_of(example.pair, example.pair.image)
        m_w = pictures.levels(image, example.spec)
        m_l = self.image_rejected(index, image, example.draw) if self.strategy else None
        return example._replace(image=m_w, image_rejected=m_l)

    def digest(self) -> str:
        """sha256 of all texts and of the pictures' names or bytes, in order."""
        h = hashlib.sha256()
        for pair in self.pairs:
            h.update(json.dumps([pair.row, pair.id, pair.system, pair.prompt, pair.chosen, pair.rejected]).encode())
            for image in (pair.image, pair.image_rejected):
                h.update(image.name.encode() if isinstance(image, Path) else image or b"-")
        return h.hexdigest()

    def without_pixels(self, key: tuple[int, int]) -> Example:
        """The example with empty tensors for its pictures: all that its length depends on."""
        epoch, index = key
        pair = self.pairs[index]
        prompt = self.processor.prompt_ids(pair.prompt, self.with_image, pair.system)
        room = None
        if self.max_length is not None:
            room = self.max_length - len(prompt)
            assert room > 0, f"row {pair.row}: a prompt of {len(prompt)} tokens leaves no room"
        return Example(
            pair,
            prompt=torch.tensor(prompt),
            chosen=torch.tensor(self.processor.response_ids(pair.chosen, room)),
            rejected=torch.tensor(self.processor.response_ids(pair.rejected, room)),
            image=torch.empty(0) if self.with_image else None,
            image_rejected=torch.empty(0) if self.strategy else None,
            draw=epoch if self.fresh_every_epoch else 0,
            spec=self.processor.template.image,
        )

    def image_rejected(self, index: int, image: Image.Image, draw: int) -> Tensor:
        """m_l (3, S, S) of the pair whose original picture is `image`: a function of (seed, row, draw) alone."""
        pair = self.pairs[index]
        rng = np.random.default_rng((self.seed, pair.row, draw))
        other = None
        if self.strategy == "given":
            other = open_of(pair, pair.image_rejected)
        elif self.strategy == "random":
            neighbour = (index + rng.integers(1, len(self.pairs))) % len(self.pairs)  # never itself
            other = open_of(self.pairs[neighbour], self.pairs[neighbour].image)
        return pictures.rejected_image(self.strategy, image, rng, self.processor.template.image, other)


# ---- batches -------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    input_ids: Tensor  # (B, T) int64, right-padded
    response_mask: Tensor  # (B, T) bool, True on response tokens, EOS included

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(
            self.input_ids.to(device, non_blocking=True),
            self.response_mask.to(device, non_blocking=True),
        )


class Batch(NamedTuple):
    chosen: Tokens
    rejected: Tokens
    images: Tensor | None  # m_w (B, 3, S, S)
    image_rejected: Tensor | None  # m_l (B, 3, S, S)
    spec: ImageSpec | None = None  # of pictures that are still levels 0-255

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, its pictures normalised there."""
        return Batch(
            chosen=self.chosen.to(device),
            rejected=self.rejected.to(device),
            images=normalised(self.images, self.spec, device),
            image_rejected=normalised(self.image_rejected, self.spec, device),
        )


def normalised(images: Tensor | None, spec: ImageSpec | None, device: torch.device) -> Tensor | None:
    """Levels 0-255 (B, 3, S, S) -> what the vision tower reads, on the device; without a spec they are that already."""
    if images is None:
        return None
    images = images.to(device, non_blocking=True)
    return images if spec is None else pictures.normalise(images, spec)  # (B, 3, S, S)


def pad_rows(prompts: list[Tensor], responses: list[Tensor], pad_id: int) -> Tokens:
    """[prompt | response | padding] rows. Right padding: under a causal mask no real token sees it."""
    lengths = [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    B = len(lengths)
    T = max(p + r for p, r in lengths)
    input_ids = torch.full((B, T), pad_id)  # (B, T)
    response_mask = torch.zeros(B, T, dtype=torch.bool)  # (B, T)
    for i, (p, r) in enumerate(lengths):
        input_ids[i, :p] = prompts[i]
        input_ids[i, p : p + r] = responses[i]
        response_mask[i, p : p + r] = True
    return Tokens(input_ids, response_mask)


def stack(images: list[Tensor | None]) -> Tensor | None:
    """B pictures (3, S, S) -> (B, 3, S, S), or None where the examples have none."""
    return None if images[0] is None else torch.stack(images)  # (B, 3, S, S)


def collate(examples: list[Example], config: Config) -> Batch:
    """Examples -> one Batch, with its placeholders and its scored tokens counted."""
    prompts = [e.prompt for e in examples]
    batch = Batch(
        chosen=pad_rows(prompts, [e.chosen for e in examples], config.pad_id),
        rejected=pad_rows(prompts, [e.rejected for e in examples], config.pad_id),
        images=stack([e.image for e in examples]),
        image_rejected=stack([e.image_rejected for e in examples]),
        spec=examples[0].spec,
    )
    expected = 0 if batch.images is None else config.vision.patches
    for side in (batch.chosen, batch.rejected):
        slots = (side.input_ids == config.image_id).sum(1).tolist()  # (B, T) -> B counts
        assert slots == [expected] * len(examples), f"{slots} placeholders in rows that have {expected} image features"
        assert side.response_mask.any(1).all(), f"rows without a scored token: {[e.pair.id for e in examples]}"
    return batch
