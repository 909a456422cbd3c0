"""Looking at preference data before training: `--check` scans it, `--show` prints rows as the model sees them.

    python -m formats.check DATA [--base B]       problems by file:row:id, lengths, duplicates, pictures
    python -m formats.show DATA --rows 3 --base B        prompt, responses, scored span; a PNG sheet of m_w beside m_l
    python -m bench.loading DATA --base B          pairs per second out of the worker processes

DATA is what train.py --data takes. A base gives its tokenizer and picture size; its weights are not needed.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import data
import pictures
from bases import checkpoint
from data import Pair
from formats import check, hub_data
from formats.check import load_small_processor, where
from formats.readers import read_pairs

# ---- --show --------------------------------------------------------------------------------------------------------


def as_picture(x: Tensor, spec: pictures.ImageSpec) -> Image.Image:
    """What the model sees, as a picture: (3, S, S) normalised -> RGB."""
    x = x * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]  # (3, S, S) in 0-1
    return Image.fromarray((x * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())  # (S, S, 3)


def prompt_text(ids: list[int], processor: data.Processor) -> str:
    """Prompt ids -> text, with the run of image placeholders as one word."""
    image_id, tokenizer = processor.config.image_id, processor.tokenizer
    first, n = ids.index(image_id), ids.count(image_id)
    before, after = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:first], ids[first + n :]))
    return f"{before} [{n} x {data.IMAGE_TOKEN}] {after!r}"


def show(args: argparse.Namespace, pairs: list[Pair], processor: data.Processor) -> None:
    """Prints the first rows and writes their pictures, m_w beside m_l, to one PNG."""
    strategy, size = args.rejected_image, processor.template.image.size
    examples = data.PairData(pairs, processor, strategy, args.seed)
    shown: list[data.Example] = []
    for index, pair in enumerate(pairs[: args.rows]):
        lengths = check.token_lengths(pair, processor)
        problem = check.text_problem(pair, lengths, processor.special_texts, args.max_length)
        problem = problem or check.image_problem(pair, strategy)
        picture = pair.image if isinstance(pair.image, Path) else "in the file"
        print(f"\nrow {pair.row}, id {pair.id}, picture {picture}")
        if problem:
            print(f"  cannot be used: {problem.reason} {problem.detail}")
            continue
        example = examples[0, index]
        shown.append(example)
        w, h = pictures.open_image(pair.image).size
        print(f"  m_w {w}x{h} -> {size}x{size}; m_l by {strategy!r}, seed {args.seed}, epoch 0")
        print(f"  prompt    {lengths[0]:5} tokens: {prompt_text(example.prompt.tolist(), processor)}")
        for name in ("chosen", "rejected"):
            ids = getattr(example, name).tolist()
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
            print(f"  {name:<9} {len(ids):5} scored: [[{text}]]")
    if shown:
        write_sheet(shown, processor.template.image, args.out)
        print(f"\n{args.out}: m_w and m_l of {len(shown)} rows, as the model sees them; [[ ]] marks the scored span")


def write_sheet(examples: list[data.Example], spec: pictures.ImageSpec, out: Path) -> None:
    gap, line = 8, 16
    sheet = Image.new("RGB", (2 * spec.size + 3 * gap, len(examples) * (spec.size + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, example in enumerate(examples):
        top = gap + row * (spec.size + line + gap)
        for column, name in enumerate(("image", "image_rejected")):
            left = gap + column * (spec.size + gap)
            label = f"{('m_w', 'm_l')[column]}  {example.pair.id}"
            draw.text((left, top), label.encode("ascii", "replace").decode(), fill="black")  # the font has no others
            sheet.paste(as_picture(getattr(example, name), spec), (left, top + line))
    sheet.save(out)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("data", help=f"preference file, folder, or hub data set ({', '.join(hub_data.NAMED)}, owner/name)")
    p.add_argument("--base", required=True, help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--rejected-image", default="crop", choices=pictures.STRATEGIES, help="how m_l is made from m_w")
    p.add_argument("--rows", type=int, default=3, metavar="N", help="the first N rows")
    p.add_argument("--max-length", type=int, default=data.MAX_LENGTH, help="prompt + response, image tokens counted")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("show.png"), help="the sheet of pictures")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base)
    pairs, problems = read_pairs(args.data, args.image_root)
    if problems:
        print(f"{len(problems)} rows cannot be read, the first: {where(args.data, sorted(problems), 1)}")
    show(args, pairs, processor)


if __name__ == "__main__":
    main()
