"""Captions beside their pictures, the invented objects marked: what a table of CHAIR scores looks like.

Not from the papers. Deviations: none.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# Twice the size it is shown at, for screens with fine pixels.
WIDTH, MARGIN, PICTURE, LINE, FONT, SMALL = 2000, 28, 260, 50, 30, 24
PAD = 8  # inside a box
NAMES_AT = MARGIN + PICTURE + 36
TEXT_AT = NAMES_AT + 260
INK, PALE, RULE = "#1f2328", "#6e7781", "#d0d7de"
INVENTED = "#b3261e"  # with a box around it: colour alone is not for everybody


class Shown(NamedTuple):
    image: Image.Image
    places: dict[str, tuple]  # the objects in it: x, y of their middle in pixels, and whatever else
    texts: dict[str, str]  # who says what


def draw_page(file: Path, title: str, rows: list[Shown], objects: Collection[str]) -> None:
    """A PNG: a picture a row, what is in it, then each text; a word of `objects` that is not in it gets a box."""
    font = ImageFont.load_default(FONT)
    small = ImageFont.load_default(SMALL)
    heights = [row_height(row, objects, font) for row in rows]
    page = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    end = write(draw, MARGIN, MARGIN, title + " What is not in the picture is ", PALE, font)
    mark(draw, end, MARGIN, "invented", font)
    y = MARGIN + LINE
    for row, height in zip(rows, heights, strict=True):
        draw.line((MARGIN, y, WIDTH - MARGIN, y), RULE, 2)
        page.paste(row.image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (MARGIN, y + MARGIN))
        for name, (left, top, *_) in row.places.items():
            x = MARGIN + left * PICTURE / row.image.width
            below = MARGIN + min(top * PICTURE / row.image.height + 36, PICTURE - 16)
            draw.text((x, y + below), name, INK, small, anchor="mm", stroke_width=3, stroke_fill="white")
        draw_texts(draw, row, objects, y + MARGIN, font)
        y += height
    page.save(file, optimize=True)


def row_height(row: Shown, objects: Collection[str], font: ImageFont.FreeTypeFont) -> int:
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return max(PICTURE, draw_texts(scratch, row, objects, 0, font)) + 2 * MARGIN


def draw_texts(draw: ImageDraw.ImageDraw, row: Shown, objects: Collection[str], y: int, font) -> int:
    """The lines beside one picture, from y on; returns the y below them."""
    lines = {"in the picture": ", ".join(sorted(row.places))} | row.texts
    for name, text in lines.items():
        write(draw, NAMES_AT, y, name, PALE, font)
        x = TEXT_AT
        for word in text.split():
            wide = draw.textlength(word + " ", font)
            if x + wide > WIDTH - MARGIN:
                x = TEXT_AT
                y += LINE
            bare = word.strip(".,")
            if bare in objects and bare not in row.places:
                x = mark(draw, x, y, bare, font)
                word = word.removeprefix(bare)
            x = write(draw, x, y, word + " ", INK, font)
        y += LINE
    return y


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, font) -> float:
    """Returns where the text ends."""
    draw.text((x, y), text, colour, font)
    return x + draw.textlength(text, font)


def mark(draw: ImageDraw.ImageDraw, x: float, y: float, word: str, font) -> float:
    """The word in a box. Returns where the box ends."""
    end = x + 2 * PAD + draw.textlength(word, font)
    draw.rounded_rectangle((x, y - 3, end, y + FONT + 8), 8, fill="#fdecea", outline=INVENTED, width=3)
    draw.text((x + PAD, y), word, INVENTED, font)
    return end
