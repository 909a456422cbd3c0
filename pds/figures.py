"""The pictures of an analysis: Figure 4, Figure 6, score histograms, and the sheet of candidates.

Not from a paper but for what the figures show. Run: `python -m pds.analyse ... --figures FOLDER --sheet sheet.png`.
"""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pictures
from external import files
from pds import rank_images, runner
from pds.runner import Row

CELL = 224  # pixels of the sheet: a picture,
FRAME = 6  # the winner's frame,
TEXT = 20  # a line,
GAP = 8  # and what lies between


# ---- charts --------------------------------------------------------------------------------------------------------


def new_chart(title: str, x: str, y: str):
    """An empty chart of matplotlib, drawn into a file and never on a screen."""
    runner.optional("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, file: Path) -> None:
    with files.whole(file) as part:
        figure.savefig(part, format="png", dpi=150)
    print(file)


def guidance_chart(shares: dict, scorer: str, file: Path) -> None:
    """Figure 4: a group of bars per topic, a bar per guidance scale."""
    figure, axes = new_chart("guidance scale of the best picture", "topic", f"% of prompts, best by {scorer}")
    scales = [scale for scale in next(iter(shares.values())) if scale != "n"]
    width = 0.8 / len(scales)
    for i, scale in enumerate(scales):
        offset = (i - (len(scales) - 1) / 2) * width
        places = [topic + offset for topic in range(len(shares))]
        heights = [own[scale] for own in shares.values()]
        axes.bar(places, heights, 0.9 * width, label=scale)
    axes.set_xticks(range(len(shares)), [f"{topic or '-'}\nn = {own['n']}" for topic, own in shares.items()])
    axes.legend(title="guidance", frameon=False)
    save(figure, file)


def similarity_chart(similarity: dict, embedder: str, file: Path) -> None:
    """Figure 6: shares of pairs by their cosine, of prompts and of answers."""
    figure, axes = new_chart(f"similarity of texts, {embedder}", "cosine of two texts", "% of pairs in a bin of 0.05")
    lowest = 0.0
    for name, own in similarity.items():
        if own:
            heights = [100 * count / own["pairs"] for count in own["histogram"]]
            edges = [-1 + 0.05 * i for i in range(len(heights) + 1)]
            axes.stairs(heights, edges, label=f"{name}, mean {own['mean']:.3f}", fill=True, alpha=0.4)
            lowest = min(lowest, *(edge for edge, height in zip(edges, heights, strict=False) if height))
    axes.set_xlim(lowest, 1)
    axes.legend(frameon=False)
    save(figure, file)


def responder_chart(responders: dict, file: Path) -> None:
    """How often each responder was chosen, and rejected."""
    figure, axes = new_chart("who wins", "responder", "questions")
    for i, side in enumerate(("chosen", "rejected")):
        places = [place + 0.4 * i - 0.2 for place in range(len(responders))]
        heights = [counts[side] for counts in responders.values()]
        axes.bar(places, heights, 0.36, label=side)
    axes.set_xticks(range(len(responders)), list(responders))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    save(figure, file)


def score_chart(values: dict[str, list[float]], file: Path) -> None:
    """A histogram of the scores of each judge."""
    figure, axes = new_chart("scores", "score", "rows")
    for name, own in values.items():
        axes.hist(own, bins=30, alpha=0.5, label=name)
    axes.legend(frameon=False)
    save(figure, file)


def draw(found: dict, values: dict[str, dict[str, list[float]]], folder: Path) -> None:
    """Every chart of an analysis. `values`: the scores themselves, {"images" or "answers": {judge: scores}}."""
    if "images" in found:
        images = found["images"]
        guidance_chart(images["guidance_share"], images["scorers"][0], folder / "figure4-guidance.png")
    if "answers" in found:
        answers = found["answers"]
        similarity_chart(answers["similarity"], answers["embedder"], folder / "figure6-similarity.png")
        responder_chart(answers["responders"], folder / "responders.png")
    for kind, own in values.items():
        for name, scores in own.items():
            score_chart({name: scores}, folder / f"scores-{kind}-{name}.png")


# ---- the sheet -----------------------------------------------------------------------------------------------------


def notice(text: str) -> Image.Image:
    """A grey square with a text."""
    cell = Image.new("RGB", (CELL, CELL), "lightgrey")
    lines = "\n".join(textwrap.wrap(text, 32)[:8])
    ImageDraw.Draw(cell).multiline_text((8, 8), lines, "black", ImageFont.load_default(13))
    return cell


def thumbnail(path: Path) -> Image.Image:
    """A picture, as large as its place allows. ValueError if it cannot be used."""
    image = ImageOps.contain(pictures.open_image(path), (CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), "lightgrey")
    left = (CELL - image.width) // 2
    top = (CELL - image.height) // 2
    cell.paste(image, (left, top))
    return cell


def shortened(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    """The text, or as much of its beginning as `width` pixels hold."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def picture_of(row: Row, image_root: Path) -> Image.Image:
    """The thumbnail of a candidate; what failed has a grey square with the reason."""
    if "error" in row:
        return notice(row["error"])
    try:
        return thumbnail(files.inside(image_root, row["image"]))
    except ValueError as error:
        return notice(str(error))


def draw_candidate(page: Image.Image, row: Row, scorers: list[str], image_root: Path, corner: tuple[int, int]) -> None:
    """A picture, and below it its guidance scale and scores, from `corner` on."""
    x, y = corner
    draw = ImageDraw.Draw(page)
    page.paste(picture_of(row, image_root), (x + FRAME, y + FRAME))
    below = y + CELL + 2 * FRAME
    font = ImageFont.load_default(14)
    if "guidance" in row:
        draw.text((x, below), f"guidance {row['guidance']:g}", "grey", font)
    scores = row.get("scores") or {}
    for i, name in enumerate(scorers):
        value = scores.get(name)
        shown = f"{value:.3f}" if runner.is_number(value) else "-"
        draw.text((x + 100, below + i * TEXT), f"{name} {shown}", "black", font)


def sheet(rows: list[Row], scorers: list[str], image_root: Path, file: Path, limit: int) -> None:
    """Prompts x candidates, scores below each picture; the best by the first scorer is framed."""
    prompts = list(rank_images.by_prompt(rows).items())[:limit]
    columns = max(len(own) for _, own in prompts)
    outer = CELL + 2 * FRAME  # a picture with its frame
    width = outer + GAP
    height = outer + TEXT * (2 + len(scorers)) + GAP
    page = Image.new("RGB", (columns * width + GAP, len(prompts) * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    bold = ImageFont.load_default(15)
    for line, (prompt, own) in enumerate(prompts):
        top = GAP + line * height
        caption = f"{prompt}: {own[0].get('caption', '')}"
        draw.text((GAP, top), shortened(draw, caption, bold, page.width - 2 * GAP), "black", bold)
        best = [row["id"] for row in rank_images.ranked(own, scorers[0])[:1]]
        for column, row in enumerate(own):
            x = GAP + column * width
            y = top + TEXT
            if row["id"] in best:
                draw.rectangle((x, y, x + outer - 1, y + outer - 1), "forestgreen")
            draw_candidate(page, row, scorers, image_root, (x, y))
    with files.whole(file) as part:
        page.save(part, format="PNG")
    print(file)
