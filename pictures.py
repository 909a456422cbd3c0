"""Pictures: opening them whatever they are, preparing them for a tower, the rejected image m_l (mDPO 3.1, Table 3).

A strategy is one function: `crop(image, rng) -> image` on the original RGB picture, before padding and resizing, or,
for those in ON_TENSOR, the same on the prepared (3, S, S) tensor. `random` gets another example's picture as well.
The random generator is an argument, seeded by the data set from (seed, row, epoch): policy and reference see the same
m_l, and neither worker count nor batch size changes it.

Deviations from the mDPO paper and release
1. The release crops the already padded, resized and normalised tensor, inside the model, once for the policy and again,
   elsewhere, for the reference. Here the original picture is cropped (a crop is never only padding) and drawn once.
   `crop-released` is the release's geometry, still drawn once.
2. "less than 20 %" (paper) is an area drawn uniformly from 1-20 %, aspect log-uniform in 3/4-4/3 (release).
3. `moco` is MoCo v2's augmentation; its blur radius is given for 224 px and scaled to the size of the picture.
4. black, diffusion, region-noise and given are not in the paper; see docs/log.md for where they come from.
"""

import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 200_000_000  # above this a file is refused as a decompression bomb
MAX_SIDE = 8192  # above this a picture is shrunk before it is padded to a square
Image.MAX_IMAGE_PIXELS = None  # our own limit stands in open_image, as an error with the file's name
Rng = np.random.Generator


def readable(source: Path | bytes) -> Path | io.BytesIO:
    """What PIL opens."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def open_image(source: Path | bytes) -> Image.Image:
    """A picture file or its bytes -> RGB. Raises ValueError with the reason if it cannot be used.

    As the released code: first frame of an animation, no EXIF rotation, transparency dropped, CMYK by PIL's formula.
    16-bit greys are scaled to 8 bits and 32-bit greys refused: plain PIL conversion would clip both to white.
    """
    try:
        with Image.open(readable(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode in ("I", "F"):
                raise ValueError(f"32-bit greys (mode {image.mode}), whose white level is not known")
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError("missing image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, struct.error, zlib.error) as e:
        raise ValueError(f"broken image ({e})") from None


def picture_problem(path: Path) -> str | None:
    try:
        open_image(path)
    except ValueError as e:
        return f"{path}: {e}"


# ---- preparation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSpec:
    """What a vision tower was trained on. mode "pad" (LLaVA, Bunny) or "crop" (the hub's CLIPImageProcessor)."""

    size: int = 336
    mode: str = "pad"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        return tuple(int(m * 255) for m in self.mean)  # (122, 116, 104) for CLIP, 127s for SigLIP


def square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Pad to a square with the mean colour, or cut the middle out, at the tower's size; RGB uint8."""
    w, h = image.size
    s = spec.size
    if spec.mode == "crop":
        w, h = (s, int(s * h / w)) if w <= h else (int(s * w / h), s)  # the shorter side becomes s
        left, top = (w - s) // 2, (h - s) // 2
        return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + s, top + s))
    side = max(w, h)
    canvas = Image.new("RGB", (side, side), spec.pad_colour)
    canvas.paste(image, ((side - w) // 2, (side - h) // 2))
    return canvas.resize((s, s), Image.Resampling.BICUBIC)


def prepare(image: Image.Image, spec: ImageSpec) -> Tensor:
    """RGB picture -> (3, S, S) float32, normalised; bit-equal to LLaVA's and Bunny's own preparation."""
    if max(image.size) > MAX_SIDE:  # 30,000x10: its square canvas would take 2.7 GB
        image = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    x = np.asarray(square(image, spec))  # (S, S, 3) uint8
    levels = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)  # in float64 first, as the image processors do
    levels = (levels - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)  # (256, 3)
    return torch.from_numpy(np.stack([levels[x[..., c], c] for c in range(3)]))  # looked up: (S, S, 3) -> (3, S, S)


# ---- m_l: the rejected image ---------------------------------------------------------------------------------------


def crop_box(w: int, h: int, rng: Rng, low: float, high: float) -> tuple[int, int, int, int]:
    """(left, top, width, height) inside w x h: area U(low, high) of it, aspect log-uniform in 3/4-4/3."""
    area = w * h * rng.uniform(low, high)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    aspect = min(max(aspect, area / h**2), w**2 / area)  # a long thin picture: keep the area, bend the aspect
    cw = min(w, max(1, round(math.sqrt(area * aspect))))
    ch = min(h, max(1, round(math.sqrt(area / aspect))))
    return int(rng.integers(w - cw + 1)), int(rng.integers(h - ch + 1)), cw, ch


def cut(image: Image.Image, rng: Rng, low: float, high: float) -> Image.Image:
    left, top, cw, ch = crop_box(*image.size, rng, low, high)
    return image.crop((left, top, left + cw, top + ch))


def crop(image: Image.Image, rng: Rng) -> Image.Image:
    """The paper's default: a crop of less than 20 % of the picture."""
    return cut(image, rng, 0.01, 0.2)


def crop20_50(image: Image.Image, rng: Rng) -> Image.Image:
    """Table 3, "Crop 20%-50%"."""
    return cut(image, rng, 0.2, 0.5)


def random(image: Image.Image, rng: Rng, other: Image.Image) -> Image.Image:
    """Table 3, "Random image": the picture of another example."""
    return other


def moco(image: Image.Image, rng: Rng) -> Image.Image:
    """Table 3, "MoCo v2": crop 20-100 %, colour jitter 0.4/0.4/0.4/0.1 (p .8), grey (.2), blur (.5), flip (.5)."""
    image = cut(image, rng, 0.2, 1.0)
    if rng.random() < 0.8:
        for i in rng.permutation(4):
            if i == 3:  # hue, in turns of the colour circle
                hue, s, v = image.convert("HSV").split()
                shift = round(255 * rng.uniform(-0.1, 0.1))
                hue = hue.point([(level + shift) % 256 for level in range(256)])
                image = Image.merge("HSV", (hue, s, v)).convert("RGB")
            else:
                enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
                image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def black(image: Image.Image, rng: Rng) -> Image.Image:
    return Image.new("RGB", image.size)


def region_noise(image: Image.Image, rng: Rng) -> Image.Image:
    """Uniform noise over one rectangle of 20 % of the area."""
    left, top, w, h = crop_box(*image.size, rng, 0.2, 0.2)
    noise = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    image = image.copy()
    image.paste(noise, (left, top))
    return image


def crop_released(x: Tensor, rng: Rng) -> Tensor:
    """The release: RandomResizedCrop(scale (.01, .2), ratio (3/4, 4/3), bilinear) of the prepared (3, S, S) tensor."""
    left, top, w, h = crop_box(x.shape[2], x.shape[1], rng, 0.01, 0.2)
    return resized_crop(x, top, left, h, w)


def resized_crop(x: Tensor, top: int, left: int, h: int, w: int) -> Tensor:
    cropped = x[None, :, top : top + h, left : left + w]  # (1, 3, h, w)
    return F.interpolate(cropped, size=x.shape[1:], mode="bilinear", align_corners=False)[0]  # (3, S, S)


def diffusion(x: Tensor, rng: Rng) -> Tensor:
    """Forward diffusion of the prepared tensor to step 500 of 1000, sigmoid noise schedule (VCD's contrast image)."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[500]
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return kept.sqrt() * x + (1 - kept).sqrt() * noise


ON_PICTURE = {
    "crop": crop, "crop20-50": crop20_50, "random": random, "moco": moco, "black": black, "region-noise": region_noise,
}  # fmt: skip
ON_TENSOR = {"crop-released": crop_released, "diffusion": diffusion}
STRATEGIES = (*ON_PICTURE, *ON_TENSOR, "same", "given")  # same: m_l = m_w, the null of CoPO; given: a path in the data
