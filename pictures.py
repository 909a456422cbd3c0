"""Pictures: opening them, preparing them for a vision tower, and m_l, the rejected image (mDPO 3.1, Table 3).

    open_image       a file or bytes -> an RGB picture, or ValueError with the reason
    prepare          a picture -> what the vision tower reads: `levels` 0-255, then `normalise`
    rejected_image   a picture and a strategy -> the levels of m_l; the crop's range stands in CROPS

The random generator is an argument, seeded by the data set from (seed, row, epoch): policy and reference see the same
m_l, and neither worker count nor batch size changes it.

Deviations from the mDPO paper and release
1. The release crops the already padded, resized and normalised tensor, inside the model, once for the policy and again,
   elsewhere, for the reference. Here the original picture is cropped (a crop is never only padding) and drawn once.
   `crop-released` is the release's geometry, still drawn once.
2. "less than 20 %" (paper) is an area drawn uniformly from 1-20 %, aspect log-uniform in 3/4-4/3 (release).
3. `moco` is MoCo v2's augmentation; its blur radius is given for 224 px and scaled to the size of the picture.
4. region-noise, same and given are not in the paper; see docs/log.md for where they come from.
"""

import argparse
import io
import math
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: Pillow hands PostScript to Ghostscript, for one
MAX_PIXELS = 178_956_970  # above this a file is refused as a decompression bomb, as Pillow does by itself
MAX_SIDE = 8192  # above this a picture is shrunk before it is padded to a square
Image.MAX_IMAGE_PIXELS = None  # the limit stands in open_image, as an error like all others
DAMAGED = (OSError, SyntaxError, EOFError, struct.error, zlib.error)  # of most broken files
DAMAGED += (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)  # a decoder may trip over its header
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
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
            raise ValueError("broken image (a folder, pipe or device)")  # a pipe would be waited for
        with Image.open(readable(source), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode in ("I", "F"):
                raise ValueError(f"32-bit greys (mode {image.mode}), whose white level is not known")
            if image.mode.startswith("I;16"):
                greys = np.asarray(image) >> 8  # 0-65535 -> 0-255
                image = Image.fromarray(greys.astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError("missing image") from None
    except DAMAGED as e:
        reason = f"none of {', '.join(FORMATS)}" if isinstance(e, UnidentifiedImageError) else e
        raise ValueError(f"broken image ({reason})") from None


def picture_problem(path: Path) -> str | None:
    """Why the picture at `path` cannot be used, or None."""
    try:
        open_image(path)
    except ValueError as e:
        return f"{path}: {e}"
    return None


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
    if spec.mode == "crop":
        return middle(image, spec.size)
    w, h = image.size
    side = max(w, h)
    canvas = Image.new("RGB", (side, side), spec.pad_colour)
    canvas.paste(image, ((side - w) // 2, (side - h) // 2))
    return canvas.resize((spec.size, spec.size), Image.Resampling.BICUBIC)


def middle(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size`, then the middle square is cut out."""
    w, h = image.size
    if w <= h:
        w, h = size, int(size * h / w)
    else:
        w, h = int(size * w / h), size
    left = (w - size) // 2
    top = (h - size) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def normalise(x: Tensor, spec: ImageSpec) -> Tensor:
    """Levels 0-255 (..., 3, S, S) -> (x / 255 - mean) / std, float32.

    All 256 levels come out bit-equal to the image processors' own arithmetic, which takes x * (1 / 255) in float64.
    """
    white = torch.full((), 255.0, device=x.device)  # by a bare number CUDA would multiply with its rounded reciprocal
    mean = torch.tensor(spec.mean).to(x.device, non_blocking=True)[:, None, None]  # (3, 1, 1)
    std = torch.tensor(spec.std).to(x.device, non_blocking=True)[:, None, None]  # (3, 1, 1)
    return (x / white - mean) / std  # (..., 3, S, S)


def levels(image: Image.Image, spec: ImageSpec) -> Tensor:
    """RGB picture -> (3, S, S) uint8: what worker processes hand over, a quarter of `prepare`'s float32."""
    if max(image.size) > MAX_SIDE:  # 30,000x10: its square canvas would take 2.7 GB
        image = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(square(image, spec)))  # (S, S, 3)
    return x.permute(2, 0, 1).contiguous()  # (3, S, S)


def prepare(image: Image.Image, spec: ImageSpec) -> Tensor:
    """RGB picture -> (3, S, S) float32, normalised; bit-equal to LLaVA's and Bunny's own preparation."""
    return normalise(levels(image, spec), spec)


# ---- m_l: the rejected image ---------------------------------------------------------------------------------------

CROPS = {  # strategy: share of the picture's area that a crop keeps, drawn uniformly
    "crop": (0.01, 0.2),  # mDPO 3.1, "less than 20 %"; from 1 % as the release
    "crop20-50": (0.2, 0.5),  # Table 3
}
STRATEGIES = (
    *CROPS,
    "random",  # Table 3: the picture of another example
    "moco",  # Table 3
    "crop-released",  # the release's geometry: the prepared tensor is cropped
    "region-noise",
    "same",  # m_l = m_w, the null of CoPO
    "given",  # the data's own m_l
)
STRATEGY_HELP = (
    f"how m_l is made from m_w: {', '.join(STRATEGIES)}, or crop:LOW-HIGH, shares of the area such as crop:0.2-0.5 "
    "(default: given where all rows bring one, else crop)"
)
FROM_ELSEWHERE = ("random", "given")  # m_l is not made from m_w: the data set brings it as `other`


def strategy(text: str) -> str:
    """A type for argparse: one of STRATEGIES, or crop:LOW-HIGH with 0 < LOW <= HIGH <= 1."""
    if text not in STRATEGIES and crop_range(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: choose from {', '.join(STRATEGIES)}, or crop:LOW-HIGH, shares of the area in 0-1"
        )
    return text


def crop_range(strategy: str) -> tuple[float, float] | None:
    """The shares of the area that a crop keeps, least and most; None if the strategy is no crop of the picture."""
    if strategy in CROPS:
        return CROPS[strategy]
    written = re.fullmatch(r"crop:(\d*\.?\d+)-(\d*\.?\d+)", strategy)
    if written is None:
        return None
    low, high = float(written[1]), float(written[2])
    return (low, high) if 0 < low <= high <= 1 else None


def rejected_image(
    strategy: str, image: Image.Image, rng: Rng, spec: ImageSpec, other: Image.Image | None = None
) -> Tensor:
    """m_l as levels (3, S, S) of the original RGB picture `image` (m_w), by a strategy (mDPO 3.1, Table 3)."""
    kept = crop_range(strategy)
    assert kept or strategy in STRATEGIES, f"{strategy!r} is none of {STRATEGIES}"
    if strategy == "crop-released":
        return crop_released(levels(image, spec), rng)
    if kept:
        low, high = kept
        image = crop(image, rng, low, high)
    elif strategy == "moco":
        image = moco(image, rng)
    elif strategy == "region-noise":
        image = region_noise(image, rng)
    elif strategy in FROM_ELSEWHERE:
        image = other
    return levels(image, spec)


def crop_box(w: int, h: int, rng: Rng, low: float, high: float) -> tuple[int, int, int, int]:
    """(left, top, width, height) inside w x h: area U(low, high) of it, aspect log-uniform in 3/4-4/3."""
    area = w * h * rng.uniform(low, high)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    aspect = min(max(aspect, area / h**2), w**2 / area)  # a long thin picture: keep the area, bend the aspect
    crop_w = min(w, max(1, round(math.sqrt(area * aspect))))
    crop_h = min(h, max(1, round(math.sqrt(area / aspect))))
    left = int(rng.integers(w - crop_w + 1))
    top = int(rng.integers(h - crop_h + 1))
    return left, top, crop_w, crop_h


def crop(image: Image.Image, rng: Rng, low: float, high: float) -> Image.Image:
    """A crop that keeps a share U(low, high) of the picture's area."""
    left, top, w, h = crop_box(image.width, image.height, rng, low, high)
    return image.crop((left, top, left + w, top + h))


def moco(image: Image.Image, rng: Rng) -> Image.Image:
    """Table 3, "MoCo v2": crop 20-100 %, colour jitter 0.4/0.4/0.4/0.1 (p .8), grey (.2), blur (.5), flip (.5)."""
    image = crop(image, rng, 0.2, 1.0)
    if rng.random() < 0.8:
        image = colour_jitter(image, rng)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        radius = rng.uniform(0.1, 2.0) * min(image.size) / 224
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return image


def colour_jitter(image: Image.Image, rng: Rng) -> Image.Image:
    """Brightness, contrast and saturation by 0.6-1.4 and hue by up to a tenth of the colour circle, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(4):
        if i < 3:
            image = enhancers[i](image).enhance(rng.uniform(0.6, 1.4))
        else:
            image = turn_hue(image, round(255 * rng.uniform(-0.1, 0.1)))
    return image


def turn_hue(image: Image.Image, shift: int) -> Image.Image:
    """`shift` of 256 around the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def region_noise(image: Image.Image, rng: Rng) -> Image.Image:
    """Uniform noise over one rectangle of 20 % of the area."""
    left, top, w, h = crop_box(image.width, image.height, rng, 0.2, 0.2)
    noise = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    image = image.copy()
    image.paste(Image.fromarray(noise), (left, top))
    return image


def crop_released(x: Tensor, rng: Rng) -> Tensor:
    """The release: RandomResizedCrop(scale (.01, .2), ratio (3/4, 4/3), bilinear) of the square (3, S, S) tensor.

    Of the levels, in float32: the weights of a bilinear mean sum to 1, so normalising before or after is the same.
    """
    size = x.shape[-1]
    left, top, w, h = crop_box(size, size, rng, low=0.01, high=0.2)
    return resized_crop(x.float(), top, left, h, w)  # (3, S, S) float32


def resized_crop(x: Tensor, top: int, left: int, h: int, w: int) -> Tensor:
    """The crop at (left, top) of a (3, S, S) tensor, resized to (3, S, S)."""
    cropped = x[None, :, top : top + h, left : left + w]  # (1, 3, h, w)
    return F.interpolate(cropped, size=x.shape[1:], mode="bilinear", align_corners=False)[0]  # (3, S, S)
