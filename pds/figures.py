"""The pictures of an analysis: Figure 4, Figure 6, score histograms, and the sheet of candidates.

Not from a paper but for what the figures show. Run: `python -m pds.analyse ... --figures FOLDER --sheet sheet.png`.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pictures
from external import files
from pds import rank_images, runner
from pds.runner import Row

CELL, FRAME, TEXT = 224, 6, 20  # pixels of the sheet: a picture, the winner's frame, a line


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
        places = [topic + (i - (len(scales) - 1) / 2) * width for topic in range(len(shares))]
        axes.bar(places, [own[scale] for own in shares.values()], 0.9 * width, label=scale)
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
        axes.bar([place + 0.4 * i - 0.2 for place in range(len(responders))], [r[side] for r in responders.values()],
                 0.36, label=side)  # fmt: skip
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


def thumbnail(path: Path) -> Image.Image:
    """A picture, or a grey square that says why there is none."""
    cell = Image.new("RGB", (CELL, CELL), "lightgrey")
    try:
        image = pictures.open_image(path)
    except ValueError as error:
        ImageDraw.Draw(cell).text((8, CELL // 2), str(error)[:32], "black", ImageFont.load_default(13))
        return cell
    image = ImageOps.contain(image, (CELL, CELL), Image.Resampling.LANCZOS)
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def shortened(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    """The text, or as much of its beginning as `width` pixels hold."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def sheet(rows: list[Row], scorers: list[str], image_root: Path, file: Path, limit: int) -> None:
    """Prompts x candidates, scores below each picture; the best by the first scorer is framed."""
    prompts = list(rank_images.by_prompt(rows).items())[:limit]
    columns = max(len(own) for _, own in prompts)
    width, height = CELL + 2 * FRAME + 8, CELL + 2 * FRAME + TEXT * (2 + len(scorers))
    page = Image.new("RGB", (columns * width + 8, len(prompts) * (height + 8) + 8), "white")
    draw, font, bold = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(15)
    for line, (prompt, own) in enumerate(prompts):
        top = 8 + line * (height + 8)
        caption = f"{prompt}: {own[0].get('caption', '')}"
        draw.text((8, top), shortened(draw, caption, bold, page.width - 16), "black", bold)
        best = [row["id"] for row in rank_images.ranked(own, scorers[0])[:1]]
        for column, row in enumerate(own):
            x, y = 8 + column * width, top + TEXT
            if row["id"] in best:
                draw.rectangle((x, y, x + CELL + 2 * FRAME - 1, y + CELL + 2 * FRAME - 1), "forestgreen")
            try:
                path = files.inside(image_root, row.get("image", ""))
            except ValueError:
                path = image_root / "outside"
            page.paste(thumbnail(path), (x + FRAME, y + FRAME))
            y += CELL + 2 * FRAME
            draw.text((x, y), f"guidance {row.get('guidance', '-'):g}", "grey", font)
            for i, name in enumerate(scorers):
                value = (row.get("scores") or {}).get(name)
                shown = f"{value:.3f}" if rank_images.is_score(value) else "-"
                draw.text((x + 100, y + i * TEXT), f"{name} {shown}", "black", font)
    with files.whole(file) as part:
        page.save(part, format="PNG")
    print(file)
