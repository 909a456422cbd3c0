"""Prints the first rows of preference data as the model sees them, and draws m_w beside m_l.

    python -m formats.show DATA --base llava-1.5-7b --rows 3

Prompt and responses are decoded from their ids, the scored span in [[ ]]; the pictures go to show.png (--out). DATA is
what train.py --data takes; of the base config and tokenizer are enough.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import pictures
from data import IMAGE_TOKEN, MAX_LENGTH, Example, Pair, PairData, Processor
from formats.check import where
from formats.command import data_parser, load_small_processor
from formats.problems import image_problem, text_problem, token_lengths
from formats.readers import read_pairs


def show(args: argparse.Namespace, pairs: list[Pair], processor: Processor) -> None:
    """Prints the first rows and writes their pictures to one PNG."""
    data = PairData(pairs, processor, args.rejected_image, args.seed)
    shown = []
    for index, pair in enumerate(pairs[: args.rows]):
        picture = pair.image if isinstance(pair.image, Path) else "in the file"
        print(f"\nrow {pair.row}, id {pair.id}, picture {picture}")
        lengths = token_lengths(pair, processor)
        problem = text_problem(pair, lengths, processor.special_texts, args.max_length)
        problem = problem or image_problem(pair, args.rejected_image)
        if problem:
            print(f"  cannot be used: {problem.reason} {problem.detail}")
            continue
        example = data[0, index]
        shown.append(example)
        print_example(example, args, processor)
    if shown:
        write_sheet(shown, processor.template.image, args.out)
        print(f"\n{args.out}: m_w and m_l of {len(shown)} rows, as the model sees them; [[ ]] marks the scored span")


def print_example(example: Example, args: argparse.Namespace, processor: Processor) -> None:
    """Sizes, the prompt and both responses."""
    w, h = pictures.open_image(example.pair.image).size
    size = processor.template.image.size
    print(f"  m_w {w}x{h} -> {size}x{size}; m_l by {args.rejected_image!r}, seed {args.seed}, epoch 0")
    print(f"  prompt    {len(example.prompt):5} tokens: {prompt_text(example.prompt.tolist(), processor)}")
    for name, ids in (("chosen", example.chosen), ("rejected", example.rejected)):
        text = processor.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        print(f"  {name:<9} {len(ids):5} scored: [[{text}]]")


def prompt_text(ids: list[int], processor: Processor) -> str:
    """Prompt ids -> text, with the run of image placeholders as one word."""
    first = ids.index(processor.config.image_id)
    n = ids.count(processor.config.image_id)
    before = processor.tokenizer.decode(ids[:first], skip_special_tokens=False)
    after = processor.tokenizer.decode(ids[first + n :], skip_special_tokens=False)
    return f"{before} [{n} x {IMAGE_TOKEN}] {after!r}"


def as_picture(x: Tensor, spec: pictures.ImageSpec) -> Image.Image:
    """What the model sees, as a picture: (3, S, S) normalised -> RGB."""
    std = torch.tensor(spec.std)[:, None, None]  # (3, 1, 1)
    mean = torch.tensor(spec.mean)[:, None, None]  # (3, 1, 1)
    levels = ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)  # (3, S, S)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())  # (S, S, 3)


def write_sheet(examples: list[Example], spec: pictures.ImageSpec, out: Path) -> None:
    """One row an example: m_w on the left, m_l on the right, each under its label."""
    gap, label_height = 8, 16
    row_height = label_height + spec.size + gap
    sheet = Image.new("RGB", (2 * spec.size + 3 * gap, len(examples) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, example in enumerate(examples):
        top = gap + row * row_height
        for column, (name, x) in enumerate((("m_w", example.image), ("m_l", example.image_rejected))):
            left = gap + column * (spec.size + gap)
            label = f"{name}  {example.pair.id}".encode("ascii", "replace").decode()  # the font has no others
            draw.text((left, top), label, fill="black")
            sheet.paste(as_picture(x, spec), (left, top + label_height))
    sheet.save(out)


def main(argv=None) -> None:
    p = data_parser(__doc__.split("\n")[0], base_required=True)
    p.add_argument("--rows", type=int, default=3, metavar="N", help="the first N rows")
    p.add_argument("--max-length", type=int, default=MAX_LENGTH, help="prompt + response, image tokens counted")
    p.add_argument("--seed", type=int, default=0, help="m_l is drawn from it, the row and the epoch")
    p.add_argument("--out", type=Path, default=Path("show.png"), help="the sheet of pictures")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base)
    pairs, problems = read_pairs(args.data, args.image_root)
    if problems:
        print(f"{len(problems)} rows cannot be read, the first: {where(args.data, sorted(problems), 1)}")
    show(args, pairs, processor)


if __name__ == "__main__":
    main()
