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
from data import IMAGE_TOKEN, Example, PairData, Processor
from external import files
from external.flags import file_ending, whole
from external.terminal import LONGEST, count, printable
from formats.check import where
from formats.command import data_parser, read_and_examine
from formats.problems import Examined, too_few


def show(args: argparse.Namespace, examined: Examined, processor: Processor) -> None:
    """Prints the first rows and writes their pictures to one PNG."""
    problems = {problem.row: problem for problem in examined.problems}
    good = [pair for pair in examined.pairs if pair.row not in problems]  # what `random` may take a picture of
    index_of = {pair.row: index for index, pair in enumerate(good)}
    data = PairData(
        good,
        processor,
        strategy=examined.strategy,
        seed=args.seed,
        with_image=examined.demands.with_image,
        max_length=args.max_length,
    )
    shown = []
    for pair in examined.pairs[: args.rows]:
        picture = pair.image if isinstance(pair.image, Path) else "in the file"
        print(f"\nrow {pair.row}, id {printable(pair.id, LONGEST)}, picture {printable(str(picture), LONGEST)}")
        problem = problems.get(pair.row)
        if problem:
            print(f"  cannot be used: {problem.reason} {problem.detail}")
            continue
        example = data[0, index_of[pair.row]]
        print_example(example, data, processor)
        shown.append(example)
    if shown and data.with_image:
        with files.whole(args.out) as part:
            sheet(shown, processor.template.image).save(part, format="PNG")
        drawn = "m_w and m_l" if data.strategy else "m_w"
        print(
            f"\n{args.out}: {drawn} of {count(len(shown), 'row')}, as the model sees them; [[ ]] marks the scored span"
        )


def print_example(example: Example, data: PairData, processor: Processor) -> None:
    """Sizes, the prompt and both responses."""
    if data.with_image:
        w, h = pictures.open_image(example.pair.image).size
        size = processor.template.image.size
        drawn = f"m_l by {data.strategy!r}, seed {data.seed}, epoch 0" if data.strategy else "no m_l"
        print(f"  m_w {w}x{h} -> {size}x{size}; {drawn}")
    print(f"  prompt    {len(example.prompt):5} tokens: {prompt_text(example.prompt.tolist(), processor)}")
    for name, ids in (("chosen", example.chosen), ("rejected", example.rejected)):
        text = processor.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        print(f"  {name:<9} {len(ids):5} scored: [[{printable(text)}]]")


def prompt_text(ids: list[int], processor: Processor) -> str:
    """Prompt ids -> text, with the run of image placeholders as one word."""
    n = ids.count(processor.config.image_id)
    if n == 0:
        return repr(processor.tokenizer.decode(ids, skip_special_tokens=False))
    first = ids.index(processor.config.image_id)
    before = processor.tokenizer.decode(ids[:first], skip_special_tokens=False)
    after = processor.tokenizer.decode(ids[first + n :], skip_special_tokens=False)
    return f"{printable(before)} [{n} x {IMAGE_TOKEN}] {after!r}"


def as_picture(x: Tensor) -> Image.Image:
    """Levels 0-255 (3, S, S), whole or from a bilinear crop -> RGB."""
    x = x.float().round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).numpy())  # (S, S, 3)


def sheet(examples: list[Example], spec: pictures.ImageSpec) -> Image.Image:
    """One row an example: m_w on the left, m_l on the right where there is one, each under its label."""
    gap, label_height = 8, 16
    row_height = label_height + spec.size + gap
    drawn = Image.new("RGB", (2 * spec.size + 3 * gap, len(examples) * row_height + gap), "white")
    draw = ImageDraw.Draw(drawn)
    for row, example in enumerate(examples):
        top = gap + row * row_height
        for column, (name, x) in enumerate((("m_w", example.image), ("m_l", example.image_rejected))):
            if x is None:
                continue
            left = gap + column * (spec.size + gap)
            label = f"{name}  {example.pair.id}".encode("ascii", "replace").decode()  # the font has no others
            draw.text((left, top), label, fill="black")
            drawn.paste(as_picture(x), (left, top + label_height))
    return drawn


def main(argv=None) -> None:
    p = data_parser(__doc__.split("\n")[0], base_required=True)
    p.add_argument("--rows", type=whole(1), default=3, metavar="N", help="the first N rows (default: %(default)s)")
    p.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="decides m_l, with row and epoch (default: %(default)s)"
    )
    p.add_argument(
        "--out", type=file_ending(".png"), default=Path("show.png"), help="the sheet of pictures (default: %(default)s)"
    )
    args = p.parse_args(argv)
    files.check_writable(args.out, [args.data])
    examined, processor = read_and_examine(args)
    read = {pair.row for pair in examined.pairs}
    unread = [problem for problem in examined.problems if problem.row not in read]
    if unread:
        print(f"cannot be read: {count(len(unread), 'row')}, the first: {where(args.data, unread, 1)}")
    files.check_writable(args.out, [pair.image for pair in examined.pairs if isinstance(pair.image, Path)])
    reason = too_few(examined)
    if reason and examined.strategy == "random":  # there is no other picture to show
        raise SystemExit(reason)
    show(args, examined, processor)
    if reason:
        raise SystemExit(reason)


if __name__ == "__main__":
    main()
