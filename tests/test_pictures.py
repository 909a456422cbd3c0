"""Picture preparation against the reference library's, odd files, and the statistics of every m_l strategy."""

import argparse
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms

import pictures
from pictures import ImageSpec, levels, open_image, prepare

CLIP = ImageSpec(size=28)
SIGLIP = ImageSpec(size=42, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def picture(w: int, h: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format: str, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **settings)
    return out.getvalue()


# ---- preparation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(97, 61), (47, 90), (56, 56), (90, 89), (5, 3), (1, 1), (300, 20)])
@pytest.mark.parametrize("spec, colour", [(CLIP, (122, 116, 104)), (SIGLIP, (127, 127, 127))], ids=["clip", "siglip"])
def test_pad_is_bit_equal_to_the_library(size, spec, colour):
    transformers = pytest.importorskip("transformers")
    image = picture(*size)
    side = max(size)
    padded = np.full((side, side, 3), colour, np.uint8)  # int(255 * mean)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    padded[top : top + size[1], left : left + size[0]] = np.asarray(image)
    if spec is CLIP:
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
    else:
        processor = transformers.SiglipImageProcessorPil(size={"height": 42, "width": 42})
    expected = processor(Image.fromarray(padded), return_tensors="pt").pixel_values[0]
    assert torch.equal(prepare(image, spec), expected)


@pytest.mark.parametrize("size", [(97, 61), (47, 90), (56, 56), (301, 57)])
def test_crop_is_bit_equal_to_the_library(size):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(picture(*size), return_tensors="pt").pixel_values[0]
    assert torch.equal(prepare(picture(*size), ImageSpec(size=28, mode="crop")), expected)


def test_normalisation_by_hand():
    x = prepare(Image.new("RGB", (3, 3), (255, 0, 128)), ImageSpec(size=2))
    # (1 - .48145466) / .26862954 = 1.93033624; -.4578275 / .26130258 = -1.75209713;
    # (128 / 255 - .40821073) / .27577711 = .33994863
    expected = torch.tensor([1.93033624, -1.75209713, 0.33994863])[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_all_levels_are_bit_equal_to_the_processors_arithmetic(spec):
    x = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)  # (3, 1, 256): every level of every channel
    # as the image processors: x * (1 / 255) in float64, then float32
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    expected = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(spec.mean, spec.std, strict=True)]
    assert torch.equal(pictures.normalise(x, spec)[:, 0], torch.from_numpy(np.stack(expected)))


# ---- odd pictures --------------------------------------------------------------------------------------------------


def test_grey_of_16_bits_is_scaled():
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)  # >> 8 = 0, 1, 128, 255; PIL alone would clip to 255
    x = np.asarray(open_image(encoded(Image.fromarray(levels), "PNG")))
    assert x.shape == (1, 4, 3) and x[0, :, 0].tolist() == x[0, :, 2].tolist() == [0, 1, 128, 255]


def test_colour_models():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_image(encoded(palette, "PNG"))).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert open_image(encoded(Image.new("L", (1, 1), 7), "PNG")).getpixel((0, 0)) == (7, 7, 7)
    # transparency is dropped: the colour under it counts
    assert open_image(encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG")).getpixel((0, 0)) == (9, 8, 7)
    # (255 - c)(255 - k) / 255: (255 - 51) * (255 - 0) / 255 = 204
    cmyk = open_image(encoded(Image.new("CMYK", (8, 8), (51, 0, 255, 0)), "TIFF"))
    assert cmyk.mode == "RGB" and cmyk.getpixel((0, 0)) == (204, 255, 0)
    assert open_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(gif).getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(encoded(picture(30, 20), "JPEG", exif=exif)).size == (30, 20)


def test_refused_pictures(tmp_path, monkeypatch):
    jpeg, png = encoded(picture(64, 64), "JPEG"), encoded(picture(64, 64), "PNG")
    for broken in (jpeg[: len(jpeg) // 2], png[: len(png) // 2], png[:40], b"", b"<html>", b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match="broken image"):
            open_image(broken)
    with pytest.raises(ValueError, match="missing image"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="broken image"):
        open_image(tmp_path)  # a folder
    with pytest.raises(ValueError, match="32-bit greys"):
        open_image(encoded(Image.fromarray(np.full((4, 4), 1e6, np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="20000x10001 pixels, more than 178,956,970"):
        open_image(encoded(Image.new("1", (20000, 10001)), "PNG"))  # 25 kB on disk, 600 MB as RGB


def test_postscript_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    EpsImagePlugin.gs_binary = None  # asked for anew, as in a fresh process
    (tmp_path / "evil.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ValueError, match="broken image"):
        open_image(tmp_path / "evil.jpg")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("file_format", ["AVIF", "DDS", "BLP", "PPM", "ICO", "TGA"])
def test_formats_that_are_not_listed_are_refused(file_format):
    with pytest.raises(ValueError, match="broken image"):
        open_image(encoded(picture(16, 16).convert("P" if file_format == "BLP" else "RGB"), file_format))


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="broken image"):
            open_image(path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match="broken image"):
        open_image(tmp_path / "loop.png")
    with pytest.raises(ValueError, match="broken image"):
        open_image(Path("a" * 300))


def small_files(rng: np.random.Generator) -> list[bytes]:
    """Pictures of every listed format in the modes and compressions that people have, each a few kilobytes."""
    noise, flat = picture(24, 17), Image.new("RGB", (24, 17), (200, 30, 90))
    grey16 = Image.fromarray(rng.integers(0, 65536, (17, 24), dtype=np.uint16))
    made = []
    for image in (noise, flat):
        made += [encoded(image, "JPEG"), encoded(image, "JPEG", progressive=True), encoded(image.convert("L"), "JPEG")]
        made += [encoded(image.convert("CMYK"), "JPEG"), encoded(image, "PNG"), encoded(image.convert("P"), "PNG")]
        made += [encoded(image.convert("RGBA"), "PNG"), encoded(image.convert("1"), "PNG")]
        made += [encoded(image, "WEBP"), encoded(image, "WEBP", lossless=True), encoded(image.convert("RGBA"), "WEBP")]
        made += [encoded(image, "GIF"), encoded(image, "GIF", save_all=True, append_images=[flat], loop=0)]
        made += [encoded(image, "BMP"), encoded(image.convert("P"), "BMP"), encoded(image.convert("1"), "BMP")]
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
            made.append(encoded(image, "TIFF", compression=compression))
    exif = Image.Exif()
    exif[0x010E] = "a camera's words"
    extras = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
        made.append(encoded(noise, file_format, **extras))
    pages = {"save_all": True, "append_images": [flat, noise]}
    for file_format in ("PNG", "WEBP", "TIFF"):
        made.append(encoded(noise, file_format, **pages))
    made += [encoded(noise.convert("P"), "GIF", transparency=3, **pages), encoded(noise, "JPEG", restart_marker_rows=1)]
    made += [encoded(noise.convert("P"), "PNG", transparency=3), encoded(noise.convert("LA"), "PNG")]
    made += [encoded(noise.convert("RGBA"), "BMP"), encoded(noise.convert("CMYK"), "TIFF")]
    made += [encoded(noise.convert("LAB"), "TIFF"), encoded(noise.convert("YCbCr"), "TIFF")]
    made += [encoded(noise.convert("1"), "TIFF", compression=c) for c in ("group3", "group4")]
    return [*made, encoded(grey16, "PNG"), encoded(grey16, "TIFF")]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes exchanged, cut off, doubled or set to numbers that sizes overflow at; headers more often than the rest."""
    x = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        reach = len(x) if rng.random() < 0.5 else min(len(x), 64)
        at = int(rng.integers(max(1, reach)))
        kind = rng.integers(5)
        if kind == 0:
            x[at : at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del x[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            x[at:at] = x[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            x[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"][rng.integers(4)]
        else:
            del x[at:]
    return bytes(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_files_open_or_are_refused(n):
    """A RuntimeError out of a decoder, say, would end the scan of a whole data set."""
    rng = np.random.default_rng(n)
    files = small_files(rng)
    for image in files:
        assert open_image(image).size == (24, 17)
    refused = 0
    for i in range(n):
        data = mutated(files[i % len(files)], rng)
        try:
            open_image(data)
        except ValueError as e:
            assert type(e) is ValueError and len(str(e)) < 500, repr(e)
            refused += 1
    assert 0.2 < refused / n < 0.95  # most are broken, and some pictures can still be looked at


@pytest.mark.parametrize("size", [(10000, 10), (10, 30000)], ids=["wide", "tall"])
def test_very_long_pictures_are_prepared(size, monkeypatch):
    seen, square = [], pictures.square
    monkeypatch.setattr(pictures, "square", lambda image, spec: seen.append(image.size) or square(image, spec))
    x = prepare(Image.new("RGB", size, "white"), CLIP)
    assert max(seen[0]) == 8192  # padded to 30,000 x 30,000 it would take 2.7 GB
    grey = (122 / 255 - 0.48145466) / 0.26862954
    assert x.shape == (3, 28, 28) and x[0, 0, 0].item() == pytest.approx(grey, abs=1e-5)  # padding in the corner
    assert x[0, 14, 14].item() > grey  # the picture in the middle, thinner than a pixel


# ---- m_l -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, low, high, mean", [("crop", 0.01, 0.2, 0.105), ("crop20-50", 0.2, 0.5, 0.35)])
def test_crop_statistics(name, low, high, mean):
    assert pictures.CROPS[name] == (low, high)
    rng, w, h = np.random.default_rng(0), 640, 480
    boxes = np.array([pictures.crop_box(w, h, rng, low, high) for _ in range(4000)])
    left, top, cw, ch = boxes.T
    area, aspect = cw * ch / (w * h), np.log(cw / ch)
    assert low * 0.97 <= area.min() and area.max() <= high * 1.01  # rounding to pixels
    # uniform area: mean (low + high) / 2, std (high - low) / sqrt(12); log-uniform aspect in +-log(4/3) = +-.2877
    assert area.mean() == pytest.approx(mean, abs=0.005)
    assert area.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    assert abs(aspect).max() <= 0.2877 + 0.06 and aspect.mean() == pytest.approx(0, abs=0.012)
    assert aspect.std() == pytest.approx(0.2877 / math.sqrt(3), rel=0.05)
    assert (left >= 0).all() and (top >= 0).all() and (left + cw <= w).all() and (top + ch <= h).all()
    # every position that fits is as likely: on average the box sits in the middle
    assert ((left + cw / 2) / w).mean() == pytest.approx(0.5, abs=0.02)
    assert ((top + ch / 2) / h).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("w, h", [(1, 1), (2, 3), (30000, 10), (10, 3000)])
def test_crop_box_of_odd_shapes_stays_inside(w, h):
    rng = np.random.default_rng(0)
    for low, high in ((0.01, 0.2), (0.2, 0.5), (0.2, 1.0)):
        for _ in range(100):
            left, top, cw, ch = pictures.crop_box(w, h, rng, low, high)
            assert cw >= 1 and ch >= 1 and left >= 0 and top >= 0 and left + cw <= w and top + ch <= h
            # keeps the area, bends the aspect; whole pixels, so small pictures cannot
            assert w * h < 1000 or 0.9 * low * w * h <= cw * ch <= 1.1 * high * w * h


def test_crop_is_cut_from_the_picture_itself():
    image = picture(40, 30)
    left, top, w, h = pictures.crop_box(40, 30, np.random.default_rng(3), 0.01, 0.2)
    cropped = pictures.crop(image, np.random.default_rng(3), 0.01, 0.2)
    assert np.array_equal(np.asarray(cropped), np.asarray(image)[top : top + h, left : left + w])


@pytest.mark.parametrize("name", pictures.STRATEGIES)
def test_every_strategy_makes_a_prepared_picture(name):
    image, other = picture(60, 40), picture(30, 50, seed=1)
    before = image.copy()

    def draw(seed):
        return pictures.rejected_image(name, image, np.random.default_rng(seed), CLIP, other)

    drawn = draw(0)
    assert drawn.shape == (3, 28, 28) and torch.equal(drawn, draw(0))
    assert np.array_equal(np.asarray(image), np.asarray(before))  # m_w is left as it was
    fixed = {"random": other, "given": other, "same": image}
    if name in fixed:
        assert torch.equal(drawn, levels(fixed[name], CLIP))
    else:
        assert any(not torch.equal(drawn, draw(seed)) for seed in (1, 2))


@pytest.mark.parametrize(
    "text, kept", [("crop:0.2-0.5", (0.2, 0.5)), ("crop:.4-1", (0.4, 1.0)), ("crop:0.3-0.3", (0.3, 0.3))]
)
def test_crop_ranges_can_be_named(text, kept):
    assert pictures.strategy(text) == text and pictures.crop_range(text) == kept
    image = picture(200, 100)
    sizes = [pictures.crop(image, np.random.default_rng(seed), *kept).size for seed in range(50)]
    areas = np.array([w * h / 20_000 for w, h in sizes])
    assert kept[0] * 0.97 <= areas.min() and areas.max() <= kept[1] * 1.03
    drawn = pictures.rejected_image(text, image, np.random.default_rng(4), CLIP)
    expected = pictures.crop(image, np.random.default_rng(4), *kept)
    assert torch.equal(drawn, levels(expected, CLIP))


@pytest.mark.parametrize(
    "text", ["crop:0.5-0.2", "crop:0-0.5", "crop:0.2-1.1", "crop:0.2", "crop:-", "crop:a-b", "black"]
)
def test_other_strategies_are_refused_with_a_sentence(text):
    with pytest.raises(argparse.ArgumentTypeError, match="crop:LOW-HIGH, shares of the area in 0-1"):
        pictures.strategy(text)


def test_region_noise_covers_a_fifth():
    image = picture(60, 40)
    drawn = pictures.region_noise(image, np.random.default_rng(0))
    changed = (np.asarray(drawn) != np.asarray(image)).any(2).mean()
    assert changed == pytest.approx(0.2, abs=0.02)


def test_moco_uses_all_its_parts():
    image = Image.new("RGB", (60, 40), (200, 120, 40))
    drawn = [pictures.moco(image, np.random.default_rng(s)) for s in range(400)]
    areas = np.array([d.width * d.height / 2400 for d in drawn])
    assert 0.19 < areas.min() < 0.25 and areas.mean() == pytest.approx(0.6, abs=0.04)  # U(.2, 1)
    grey = np.mean([len(set(d.getpixel((0, 0)))) == 1 for d in drawn])
    assert grey == pytest.approx(0.2, abs=0.06)
    same = np.mean([d.getpixel((0, 0)) == (200, 120, 40) for d in drawn])
    assert same == pytest.approx(0.2 * 0.8, abs=0.05)  # neither jittered (.8) nor grey (.2)
    half = Image.new("RGB", (400, 400))
    half.paste((255, 255, 255), (0, 0, 200, 400))  # white on the left: mirrored, it is on the right
    sides = [np.asarray(pictures.moco(half, np.random.default_rng(s)).convert("L"), float) for s in range(200)]
    right = np.mean([s[:, -1].mean() > s[:, 0].mean() for s in sides if abs(s[:, -1].mean() - s[:, 0].mean()) > 30])
    assert right == pytest.approx(0.5, abs=0.12)


def test_turning_the_hue():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert pictures.turn_hue(red, 85).getpixel((0, 0)) == (0, 255, 0)  # 85 / 255 = a third of the circle
    assert pictures.turn_hue(red, 0).getpixel((0, 0)) == (255, 0, 0)


def test_colour_jitter_has_mocos_strengths():
    grey = Image.new("RGB", (4, 4), (120, 120, 120))  # only brightness changes it: 120 x U(.6, 1.4) = 72 to 168
    levels = [pictures.colour_jitter(grey, np.random.default_rng(s)).getpixel((0, 0))[0] for s in range(300)]
    assert 70 <= min(levels) < 77 and 163 < max(levels) <= 169 and np.mean(levels) == pytest.approx(120, abs=4)
    dull = Image.new("RGB", (4, 4), (140, 100, 100))  # hue 0; a tenth of the circle is 25.5 of 255
    drawn = [pictures.colour_jitter(dull, np.random.default_rng(s)).convert("HSV").getpixel((0, 0)) for s in range(300)]
    hues = np.array([(hue + 128) % 256 - 128 for hue, _, _ in drawn])
    assert -30 <= hues.min() < -20 and 20 < hues.max() <= 30 and abs(hues.mean()) < 3
    # (140 - 100) / 140 x 255 = 73, times U(.6, 1.4); contrast does not change what is flat
    saturations = np.array([saturation for _, saturation, _ in drawn])
    assert saturations.min() < 73 * 0.7 and saturations.max() > 73 * 1.3


def test_blur_follows_the_size_of_the_picture(monkeypatch):
    """MoCo's radius, U(.1, 2), is meant for 224 px."""
    radii = []
    blur = pictures.ImageFilter.GaussianBlur
    monkeypatch.setattr(pictures.ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or blur(radius))
    for size, largest in ((22, 2 * 22 / 224), (672, 2 * 672 / 224)):
        radii.clear()
        for seed in range(60):
            pictures.moco(Image.new("RGB", (size, size)), np.random.default_rng(seed))
        assert 0.6 * largest < max(radii) <= largest
        assert 20 <= len(radii) <= 40  # half of them


def test_released_crop_is_the_libraries_resized_crop():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    x = levels(picture(150, 140), ImageSpec(size=112))
    for seed in range(5):
        left, top, w, h = pictures.crop_box(112, 112, np.random.default_rng(seed), 0.01, 0.2)
        # the release crops what is normalised already; here the crop is normalised
        expected = functional.resized_crop(pictures.normalise(x, CLIP), top, left, h, w, [112, 112], antialias=False)
        cropped = pictures.crop_released(x, np.random.default_rng(seed))
        torch.testing.assert_close(pictures.normalise(cropped, CLIP), expected, atol=1e-5, rtol=0)


def test_a_format_that_is_not_read_is_told_by_those_that_are():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    with pytest.raises(ValueError, match=r"broken image \(none of JPEG, PNG, WEBP, GIF, BMP, TIFF\)"):
        pictures.open_image(heic)
