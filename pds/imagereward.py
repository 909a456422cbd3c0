"""ImageReward: what people would say of a picture of this caption (PDS-DPO 3.2, R_I; Xu et al. 2023). And BLIP's ITC.

    picture (B, 3, S, S) -> VisionTransformer (B, 1+N, Cv) -------------------+ keys and values of every layer
    caption (B, T) ids   -> Bert (B, T, C), its first token (B, C) <----------+ -> five linears -> (B,) -> reward

The picture is read while the text is: there is no embedding of a caption alone. ITC, in contrast, is the cosine of the
two first tokens, each read alone and projected. Module names are those of the published checkpoint, so that it loads
without a table of names.

Deviations from the ImageReward package, which no longer imports beside current libraries
1. Batches, where it scores one picture at a time. Padding is masked, so the numbers are the same.
2. A caption of more than 35 tokens is cut as there, but counted and said.
3. Weights with a missing or misshapen tensor are refused; there they stay random (`strict=False`).
"""

import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from external import files, hub
from pds import runner

MAX_LENGTH = 35  # tokens of a caption, [CLS] and [SEP] included: BLIP's setting for videos
REWARD_MEAN = 0.16717362830052426  # of the raw numbers on its training set
REWARD_STD = 1.0333394966054072
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MLP_WIDTHS = (1024, 128, 64, 16, 1)
REPOSITORY = "THUDM/ImageReward"
VOCABULARY = "bert-base-uncased"
UNUSED = re.compile(r"position_ids$|^(image|text)_queue$|^(queue_ptr|temp)$|_m\.|^itm_head\.|^text_decoder\.")


# ---- the picture ---------------------------------------------------------------------------------------------------


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)  # (B, N, 3C) -> (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # (B, H, N, D) -> (B, N, C)


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        fc1 = nn.Linear(width, 4 * width)
        fc2 = nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        inner = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](inner)


class VisionTransformer(nn.Module):
    """ViT, pre-LN: (B, 3, S, S) -> (B, 1+N, Cv), the class token first."""

    def __init__(self, width: int, layers: int, heads: int, image_size: int, patch: int):
        super().__init__()
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        proj = nn.Conv2d(3, width, patch, stride=patch)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)  # (B, Cv, h, w) -> (B, N, Cv)
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, Cv)
        x = torch.cat([cls, x], dim=1) + self.pos_embed  # (B, 1+N, Cv)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---- the caption, reading the picture ------------------------------------------------------------------------------


class AddNorm(nn.Module):
    """A linear, the sum with what went in, the norm: BERT's post-LN."""

    def __init__(self, width_in: int, width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class BertAttention(nn.Module):
    """Attention of x (B, T, C) to `source` (B, S, Cs): the text itself, or the picture."""

    def __init__(self, c: dict, source_width: int):
        super().__init__()
        width = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        linears = {
            "query": nn.Linear(width, width),
            "key": nn.Linear(source_width, width),
            "value": nn.Linear(source_width, width),
        }
        self.self = nn.ModuleDict(linears)  # the checkpoint's own name
        self.output = AddNorm(width, width, c["layer_norm_eps"])

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q = self.split(self.self["query"](x))
        k = self.split(self.self["key"](source))
        v = self.split(self.self["value"](source))
        out = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, T, D)
        return self.output(out.transpose(1, 2).flatten(2), x)  # (B, H, T, D) -> (B, T, C)


class BertLayer(nn.Module):
    def __init__(self, c: dict, vision_width: int):
        super().__init__()
        width = c["hidden_size"]
        self.attention = BertAttention(c, width)
        self.crossattention = BertAttention(c, vision_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, c["intermediate_size"])})
        self.output = AddNorm(c["intermediate_size"], width, c["layer_norm_eps"])

    def forward(self, x: Tensor, mask: Tensor, picture: Tensor | None) -> Tensor:
        x = self.attention(x, x, mask)
        if picture is not None:
            x = self.crossattention(x, picture, None)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """BERT that looks at a picture in every layer, or, with picture None, at nothing but the text."""

    def __init__(self, c: dict, vision_width: int):
        super().__init__()
        width = c["hidden_size"]
        tables = {
            "word_embeddings": nn.Embedding(c["vocab_size"], width),
            "position_embeddings": nn.Embedding(c["max_position_embeddings"], width),
            "LayerNorm": nn.LayerNorm(width, c["layer_norm_eps"]),
        }
        self.embeddings = nn.ModuleDict(tables)
        layers = nn.ModuleList(BertLayer(c, vision_width) for _ in range(c["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, real: Tensor, picture: Tensor | None) -> Tensor:
        """ids (B, T), real (B, T) bool, False on padding, picture (B, 1+N, Cv) or None -> (B, T, C)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        words = self.embeddings["word_embeddings"](ids)  # (B, T, C)
        places = self.embeddings["position_embeddings"](positions)  # (T, C)
        x = self.embeddings["LayerNorm"](words + places)
        mask = real[:, None, None, :]  # (B, 1, 1, T): every token sees every real one
        for layer in self.encoder["layer"]:
            x = layer(x, mask, picture)
        return x


# ---- the two scores ------------------------------------------------------------------------------------------------


class Blip(nn.Module):
    """Both towers, with what turns them into a score."""

    def __init__(self, vision: VisionTransformer, text: Bert):
        super().__init__()
        self.visual_encoder = vision
        self.text_encoder = text


class ImageReward(nn.Module):
    """(ids, real, pixels) -> (B,) reward: about -2 to 2, 0 for an average picture."""

    def __init__(self, vision: VisionTransformer, text: Bert, width: int):
        super().__init__()
        self.blip = Blip(vision, text)
        widths = (width, *MLP_WIDTHS)
        layers = nn.ModuleDict()
        for i, name in enumerate(("0", "2", "4", "6", "7")):  # 1, 3 and 5 are dropouts; there is no activation
            layers[name] = nn.Linear(widths[i], widths[i + 1])
        self.mlp = nn.ModuleDict({"layers": layers})

    def forward(self, ids: Tensor, real: Tensor, pixels: Tensor) -> Tensor:
        picture = self.blip.visual_encoder(pixels)  # (B, 1+N, Cv)
        x = self.blip.text_encoder(ids, real, picture)[:, 0]  # (B, T, C) -> (B, C)
        for linear in self.mlp["layers"].values():
            x = linear(x)
        return (x[:, 0] - REWARD_MEAN) / REWARD_STD  # (B, 1) -> (B,)


class BlipITC(Blip):
    """(ids, real, pixels) -> (B,) cosine of image and text, each read alone: BLIP's image-text contrast."""

    def __init__(self, vision: VisionTransformer, text: Bert, vision_width: int, width: int, projected: int):
        super().__init__(vision, text)
        self.vision_proj = nn.Linear(vision_width, projected)
        self.text_proj = nn.Linear(width, projected)

    def forward(self, ids: Tensor, real: Tensor, pixels: Tensor) -> Tensor:
        image = self.vision_proj(self.visual_encoder(pixels)[:, 0])  # (B, P)
        text = self.text_proj(self.text_encoder(ids, real, None)[:, 0])  # (B, P)
        return F.cosine_similarity(image, text)


# ---- text and pixels -----------------------------------------------------------------------------------------------


def load_wordpiece(vocabulary: Path) -> Tokenizer:
    """BERT's uncased WordPiece, with BLIP's [DEC] and [ENC] behind it. The first token stays [CLS], as there."""
    words = files.read_text(vocabulary).split("\n")
    ids = {word.rstrip("\r"): number for number, word in enumerate(words) if word.strip()}
    if missing := [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in ids]:
        raise SystemExit(f"{vocabulary}: no {', '.join(missing)}; it must be the vocab.txt of {VOCABULARY}")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    return tokenizer


def prepare(image: Image.Image, size: int) -> Tensor:
    """The shorter side to `size`, the middle cut out, CLIP's normalisation: (3, size, size).

    A picture is resized in the mode it was saved in, with its transparency, and only then made RGB, as there.
    """
    longer = int(size * max(image.size) / min(image.size))
    width = size if image.width <= image.height else longer
    height = longer if image.width <= image.height else size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = round((width - size) / 2)  # halves go to the even number
    top = round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (S, S, 3) -> (3, S, S)
    mean = torch.tensor(PIXEL_MEAN)[:, None, None]  # (3, 1, 1)
    std = torch.tensor(PIXEL_STD)[:, None, None]
    return (pixels - mean) / std


class Scorer:
    """score(captions, images) -> floats, by ImageReward or by BLIP's ITC."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, image_size: int, device: str):
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.device = device

    def words(self, caption: str) -> list[int]:
        return self.tokenizer.encode(caption, add_special_tokens=False).ids

    def caption_ids(self, caption: str) -> list[int]:
        start = self.tokenizer.token_to_id("[CLS]")
        end = self.tokenizer.token_to_id("[SEP]")
        return [start, *self.words(caption)[: MAX_LENGTH - 2], end]

    def is_cut(self, caption: str) -> bool:
        return len(self.words(caption)) > MAX_LENGTH - 2

    @torch.no_grad()
    def score(self, captions: list[str], images: list[Image.Image]) -> list[float]:
        ids = [torch.tensor(self.caption_ids(caption)) for caption in captions]
        padding = self.tokenizer.token_to_id("[PAD]")
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding).to(self.device)  # (B, T)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        real = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]  # (B, T)
        pixels = torch.stack([prepare(image, self.image_size) for image in images]).to(self.device)  # (B, 3, S, S)
        return self.model(padded, real, pixels).tolist()


# ---- files ---------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """What is read: the weights, BERT's config, its vocabulary."""

    weights: Path
    config: Path
    vocabulary: Path


def find_files(folder: Path | None) -> Files:
    """The three files of a folder, or of the hub."""
    if folder is None:
        from_hub = hub.download(
            REPOSITORY, ("ImageReward.pt", "med_config.json"), "model", f"{REPOSITORY} (1.8 GB)", "--imagereward FOLDER"
        )
        words = hub.download(VOCABULARY, ("vocab.txt",), "model", "the vocabulary of BERT", "--imagereward FOLDER")
        return Files(from_hub / "ImageReward.pt", from_hub / "med_config.json", words / "vocab.txt")
    weights = folder / "model_large.pth"  # BLIP's own
    if not weights.is_file():
        weights = folder / "ImageReward.pt"
    found = Files(weights, folder / "med_config.json", folder / "vocab.txt")
    for file in found:
        if not file.is_file():
            raise SystemExit(
                f"{file}: not there. The folder holds ImageReward.pt (or BLIP's model_large.pth), med_config.json and "
                f"the vocab.txt of {VOCABULARY}."
            )
    return found


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file by name; none of the code that a pickle can hold is run."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{file}: damaged, or holds more than tensors; not opened ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise SystemExit(f"{file}: truncated or damaged ({error}); download it again") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # BLIP's own files
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise SystemExit(f"{file}: not a table of tensors by name")
    return state


def load_strictly(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Every tensor from the file, or SystemExit. Tensors of the other score are left out without a word."""
    wanted = model.state_dict()
    others = ("blip.vision_proj.", "blip.text_proj.", "mlp.")
    found = {}
    for name, tensor in state.items():
        if name in wanted or not (name.startswith(others) or UNUSED.search(name)):
            found[name] = tuple(tensor.shape)
    runner.refuse_misfits(file, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, found)
    model.load_state_dict({name: state[name] for name in wanted})


def build_towers(state: dict[str, Tensor], found: Files, heads: int | None) -> tuple[VisionTransformer, Bert]:
    """Both towers, empty, in the sizes of `state` (names without "blip.") and of med_config.json."""
    needed = ("visual_encoder.patch_embed.proj.weight", "visual_encoder.pos_embed")
    if missing := [name for name in needed if name not in state]:
        raise SystemExit(f"{found.weights}: 1 or more missing: {', '.join(missing)}; not a BLIP or ImageReward file")
    width, _, patch, _ = state[needed[0]].shape
    patches = state[needed[1]].shape[1] - 1
    layers = {name.split(".")[2] for name in state if name.startswith("visual_encoder.blocks.")}
    if width % (heads or 64):
        raise SystemExit(f"{found.weights}: how many heads has a tower of width {width}? Give --vision-heads.")
    heads = heads or width // 64
    vision = VisionTransformer(width, len(layers), heads, math.isqrt(patches) * patch, patch)
    config = files.read_json(found.config)
    names = "hidden_size num_attention_heads num_hidden_layers intermediate_size vocab_size".split()
    names += ["max_position_embeddings", "layer_norm_eps"]
    if absent := [name for name in names if name not in config]:
        raise SystemExit(f"{found.config}: no {', '.join(absent)}")
    return vision, Bert(config, width)


def load_imagereward(found: Files, device: str = "cpu", heads: int | None = None) -> Scorer:
    """ImageReward.pt -> its scorer. `heads` of the vision tower, where a head is not 64 wide."""
    state = read_state(found.weights)
    bare = {name.removeprefix("blip."): tensor for name, tensor in state.items()}
    vision, text = build_towers(bare, found, heads)
    width = text.embeddings["word_embeddings"].embedding_dim
    model = ImageReward(vision, text, width)
    load_strictly(model, state, found.weights)
    return Scorer(model, load_wordpiece(found.vocabulary), vision.image_size, device)


def load_itc(found: Files, device: str = "cpu", heads: int | None = None) -> Scorer:
    """BLIP's own weights, or the towers and projections inside ImageReward.pt -> the ITC scorer."""
    state = {name.removeprefix("blip."): tensor for name, tensor in read_state(found.weights).items()}
    vision, text = build_towers(state, found, heads)
    projected = len(state.get("vision_proj.weight", ()))
    width = text.embeddings["word_embeddings"].embedding_dim
    model = BlipITC(vision, text, vision.pos_embed.shape[2], width, projected)
    load_strictly(model, state, found.weights)
    return Scorer(model, load_wordpiece(found.vocabulary), vision.image_size, device)
