"""Captions beside their pictures, the invented objects marked: what a table of CHAIR scores looks like.

Not from the papers. Deviations: none.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# Twice the size it is shown at, for screens with fine pixels.
WIDTH, MARGIN, PICTURE, LINE, FONT = 2000, 32, 280, 50, 30
NAMES_AT = MARGIN + PICTURE + 36
TEXT_AT = NAMES_AT + 260
INK, PALE, RULE = "#1f2328", "#6e7781", "#d0d7de"
INVENTED = "#b3261e"  # with a box around it: colour alone is not for everybody


class Shown(NamedTuple):
    image: Image.Image
    truth: Collection[str]  # the objects in it
    texts: dict[str, str]  # who says what


def draw_page(file: Path, title: str, rows: list[Shown], objects: Collection[str]) -> None:
    """A PNG: a picture a row, what is in it, then each text; a word of `objects` that is not in it gets a box."""
    font = ImageFont.load_default(FONT)
    heights = [row_height(row, objects, font) for row in rows]
    page = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    end = write(draw, MARGIN, MARGIN, title + " A red box: ", PALE, font)
    mark(draw, end, MARGIN, "invented", font)
    y = MARGIN + LINE
    for row, height in zip(rows, heights, strict=True):
        draw.line((MARGIN, y, WIDTH - MARGIN, y), RULE, 2)
        page.paste(row.image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (MARGIN, y + MARGIN))
        draw_texts(draw, row, objects, y + MARGIN, font)
        y += height
    page.save(file, optimize=True)


def row_height(row: Shown, objects: Collection[str], font: ImageFont.FreeTypeFont) -> int:
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return max(PICTURE, draw_texts(scratch, row, objects, 0, font)) + 2 * MARGIN


def draw_texts(draw: ImageDraw.ImageDraw, row: Shown, objects: Collection[str], y: int, font) -> int:
    """The lines beside one picture, from y on; returns the y below them."""
    lines = {"in the picture": ", ".join(sorted(row.truth))} | row.texts
    for name, text in lines.items():
        write(draw, NAMES_AT, y, name, PALE, font)
        x = TEXT_AT
        for word in text.split():
            wide = draw.textlength(word + " ", font)
            if x + wide > WIDTH - MARGIN:
                x = TEXT_AT
                y += LINE
            bare = word.strip(".,")
            if bare in objects and bare not in row.truth:
                mark(draw, x, y, bare, font)
                write(draw, x + draw.textlength(bare, font), y, word.removeprefix(bare), INK, font)
            else:
                write(draw, x, y, word, INK, font)
            x += wide
        y += LINE
    return y


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, font) -> float:
    """Returns where the text ends."""
    draw.text((x, y), text, colour, font)
    return x + draw.textlength(text, font)


def mark(draw: ImageDraw.ImageDraw, x: float, y: float, word: str, font) -> None:
    box = (x - 4, y - 3, x + draw.textlength(word, font) + 4, y + FONT + 8)
    draw.rounded_rectangle(box, 8, fill="#fdecea", outline=INVENTED, width=3)
    draw.text((x, y), word, INVENTED, font)
