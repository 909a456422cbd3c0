"""The pieces of lab/explain.py's page: text from data made harmless, formulas, pictures, coloured words, bars.

Texts of data and paths reach the page only through `shown`. Numbers and formulas are ours.
"""

import base64
import io
import re
import unicodedata
from html import escape

from PIL import Image
from torch import Tensor

import pictures
from formats.show import as_picture
from lab.explain_words import Word

FULL = 0.72  # opacity of the strongest colour: text on it stays readable
END = "END"  # how EOS is shown
GREEK = {"pi": "π", "sigma": "σ", "beta": "β", "delta": "δ", "theta": "θ", "sum": "Σ"}
TINY = 150  # pixels: smaller pictures are enlarged with sharp pixels
JOINERS = "\u200c\u200d"  # hold an emoji of several parts together, and letters of Persian apart


# ---- text ----------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Foreign text for the page: markup escaped, characters that steer a screen (ESC, U+202E) spelt out."""
    return escape("".join(c if harmless(c) else c.encode("unicode_escape").decode() for c in text))


def harmless(c: str) -> bool:
    return c.isprintable() or c in "\n\t" or c in JOINERS or unicodedata.category(c) == "Zs"


def maths(formula: str) -> str:
    """A formula as lab/one_pair.py prints it, "log pi_theta(y_w | m_w)", in letters and indices."""
    symbols = re.sub(r"[A-Za-z]+(_[A-Za-z]+)?|-", symbol, formula)
    return f'<span class="maths">{symbols}</span>'


def symbol(found: re.Match) -> str:
    """One name of a formula, or a minus; names of one letter are italic, "log" and Greek letters are not."""
    if found[0] == "-":
        return "−"
    name, _, index = found[0].partition("_")
    name = f"<i>{name}</i>" if len(name) == 1 else GREEK.get(name, name)
    return f"{name}<sub>{GREEK.get(index, index)}</sub>" if index else name


def prose(text: str) -> str:
    """Our own text, with the names in it (y_w, m_l, L_CoPO, pi_ref) as in formulas."""
    return re.sub(r"\b(m|y|L|pi)_[A-Za-z]+\b", lambda name: maths(name[0]), text)


def signed(x: float) -> str:
    """+0.1234 or −0.1234, four decimals."""
    text = f"{x:+.4f}".replace("-", "−")
    return "0.0000" if text in ("+0.0000", "−0.0000") else text


def plain(x: float) -> str:
    """Four decimals, no plus."""
    return signed(x).removeprefix("+")


# ---- pictures ------------------------------------------------------------------------------------------------------


def data_uri(image: Image.Image) -> str:
    """A picture inside the page, every pixel as it is."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(x: Tensor, name: str, caption: str, frame: str = "") -> str:
    """A picture as the model sees it, levels (3, S, S), with a frame drawn on it and a caption of ours under it."""
    tiny = ' class="tiny"' if x.shape[-1] < TINY else ""
    image = f'<img{tiny} src="{data_uri(as_picture(x))}" alt="{name}">'
    return f'<figure><span class="frame">{image}{frame}</span><figcaption>{prose(caption)}</figcaption></figure>'


def kept_frame(box: tuple[int, int, int, int], size: tuple[int, int], spec: pictures.ImageSpec) -> str:
    """The crop (left, top, width, height) of a picture of this size, drawn on its padded square."""
    assert spec.mode == "pad", spec.mode
    left, top, width, height = box
    side = max(size)
    left += (side - size[0]) // 2
    top += (side - size[1]) // 2
    place = {"left": left, "top": top, "width": width, "height": height}
    style = ";".join(f"{name}:{100 * value / side:.2f}%" for name, value in place.items())
    return f'<span class="kept" style="{style}"></span>'


# ---- colours -------------------------------------------------------------------------------------------------------


def coloured(words: list[Word], columns: dict[str, Tensor], largest: float) -> str:
    """A response, its words coloured by the first of `columns`; hovering shows all of them, each (R,) by name."""
    values, *_ = columns.values()
    spans = []
    for word in words:
        value = word.sum(values)
        share = abs(value) / largest if largest > 0 else 0.0
        side = "up" if value > 0 else "down"
        style = f"--a:{FULL * share:.3f};--line-a:{min(1.0, 2 * share):.3f}"
        text = word.text.lstrip()
        blanks = word.text.removesuffix(text)
        kind = "word" if text else "word eos"
        numbers = hover(word, columns)
        span = f'<span class="{kind} {side}" style="{style}" data-numbers="{numbers}">{shown(text) or END}</span>'
        spans.append(blanks + span)
    return f'<p class="answer" dir="auto">{"".join(spans)}</p>'


def hover(word: Word, columns: dict[str, Tensor]) -> str:
    """A word's numbers, a line each, for an attribute."""
    width = max(map(len, columns))
    lines = [f"{name:{width}} {signed(word.sum(values)):>9}" for name, values in columns.items()]
    n = word.end - word.first
    return "&#10;".join([*lines, "1 token" if n == 1 else f"{n} tokens"])


def largest_of(words: list[Word], values: Tensor) -> float:
    """The largest value of a word, up or down: where its colour is full."""
    return max(abs(word.sum(values)) for word in words)


def legend(largest: float, unit: str, down: str, up: str) -> str:
    """The colours, from the largest fall to the largest rise."""
    return (
        f'<div class="legend"><span>{down}</span><span>{signed(-largest)}</span><span class="ramp"></span>'
        f"<span>{signed(largest)}</span><span>{up}</span><span>({unit}; dotted: below 0)</span></div>"
    )


def bar(value: float, largest: float) -> str:
    """A reward as a bar to the right of zero, or to the left."""
    side = "up" if value > 0 else "down"
    width = 50 * abs(value) / largest if largest > 0 else 0.0
    return f'<span class="bar"><span class="{side}" style="width:{width:.1f}%"></span></span>'
