"""Looking at preference data before training: `--check` scans it, `--show` prints rows as the model sees them.

    python data.py DATA --check [--base B]       problems by file:row:id, lengths, duplicates, pictures
    python data.py DATA --show 3 --base B        prompt, responses, scored span; a PNG sheet of m_w beside m_l
    python data.py DATA --time --base B          pairs per second out of the worker processes

DATA is what train.py --data takes. A base gives its tokenizer and picture size; its weights are not needed.
"""

import argparse
import math
import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import data
import hub
import images
import weights
from readers import Pair, Problem, read_pairs

EXTREME_ASPECT = 5.0  # longer side over shorter; padding to a square then fills four fifths of what the model sees


def load_processor(base: str) -> data.Processor:
    """Of a base on the hub only the small files are fetched."""
    folder = weights.resolve(base, patterns=weights.SMALL_FILES)
    return weights.load_processor(folder, weights.read_config(folder))


# ---- --check -------------------------------------------------------------------------------------------------------


def word_lengths(pair: Pair) -> tuple[int, int, int]:
    return len(pair.prompt.split()), len(pair.chosen.split()), len(pair.rejected.split())


def notes(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """What is legal but worth a look: kind -> pairs."""
    same = defaultdict(list)
    for pair in pairs:
        same[pair.image, pair.prompt, pair.chosen, pair.rejected].append(pair)
    return {
        "identical chosen and rejected": [p for p in pairs if p.chosen == p.rejected],
        "one-word response": [p for p in pairs if 1 in word_lengths(p)[1:]],
        "duplicate of an earlier row": [p for group in same.values() for p in group[1:]],
    }


def where(file: str, items: list, limit: int = 3) -> str:
    """file:row:id of the first few pairs or problems."""
    more = [f"... {len(items) - limit} more"] if len(items) > limit else []
    details = (f" ({i.detail})" if isinstance(i, Problem) and i.detail else "" for i in items)
    return "; ".join([f"{file}:{i.row}:{i.id}{d}" for i, d in zip(items[:limit], details, strict=False)] + more)


def check(args, pairs: list[Pair], problems: list[Problem], processor: data.Processor | None) -> None:
    """Prints all there is to know; exit status 1 if a row cannot be used. Without a base lengths are in words."""
    special, longest = (processor.special_texts, args.max_length) if processor else ([data.IMAGE_TOKEN], float("inf"))
    length = (lambda p: data.token_lengths(p, processor)) if processor else word_lengths
    lengths = [length(p) for p in tqdm(pairs, "texts", disable=None)]
    problems = sorted(problems + data.check_pairs(pairs, lengths, special, longest, args.rejected_image))
    for reason, count in Counter(p.reason for p in problems).most_common():
        print(f"cannot be used: {count} {reason}: {where(args.data, [p for p in problems if p.reason == reason])}")
    for kind, some in notes(pairs).items():
        if some:
            print(f"note: {len(some)} {kind}: {where(args.data, some)}")
    broken = {p.row for p in problems if p.reason != data.TOO_LONG}
    if opened := [p for p in pairs if p.row not in broken]:
        print_pictures(args.data, opened)
    if pairs:
        print_lengths(args.data, pairs, lengths, bool(processor))
    bad = {p.row for p in problems}
    print(f"{args.data}: {len(bad)} of {len(bad | {p.row for p in pairs})} rows cannot be used")
    if bad:
        raise SystemExit(1)


def print_pictures(file: str, pairs: list[Pair]) -> None:
    sizes, extreme = [], []
    for pair in pairs:
        with Image.open(images.readable(pair.image)) as image:  # reads the header only
            sizes.append(image.size)
        if max(image.size) > EXTREME_ASPECT * min(image.size):
            extreme.append(pair)
    sizes.sort(key=math.prod)
    smallest, middle, largest = (f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    print(f"pictures: {len(sizes)} open, {smallest} smallest, {middle} median, {largest} largest")
    if extreme:
        print(f"note: {len(extreme)} with an aspect over {EXTREME_ASPECT:g}: {where(file, extreme)}")


def print_lengths(file: str, pairs: list[Pair], lengths: list[tuple[int, int, int]], in_tokens: bool) -> None:
    n = np.array(lengths)  # (rows, 3)
    total = n[:, 0] + n[:, 1:].max(1)
    prompt = "image + prompt" if in_tokens else "prompt"
    columns = {prompt: n[:, 0], "chosen": n[:, 1], "rejected": n[:, 2], f"{prompt} + longer response": total}
    title = "length in tokens" if in_tokens else "length in words (--base B: tokens)"
    print(f"{title:<36}   min   5 %  50 %  95 %  99 %   max")
    for name, column in columns.items():
        values = np.percentile(column, [0, 5, 50, 95, 99, 100])
        print(f"  {name:<34}" + "".join(f"{v:6.0f}" for v in values))
    for i in np.argsort(-total, kind="stable")[:3]:
        print(f"  longest: {file}:{pairs[i].row}:{pairs[i].id}, {total[i]}")


# ---- --show --------------------------------------------------------------------------------------------------------


def as_picture(x: Tensor, spec: images.ImageSpec) -> Image.Image:
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
    for index, pair in enumerate(pairs[: args.show]):
        lengths = data.token_lengths(pair, processor)
        problem = data.text_problem(pair, lengths, processor.special_texts, args.max_length)
        problem = problem or data.image_problem(pair, strategy)
        picture = pair.image if isinstance(pair.image, Path) else "in the file"
        print(f"\nrow {pair.row}, id {pair.id}, picture {picture}")
        if problem:
            print(f"  cannot be used: {problem.reason} {problem.detail}")
            continue
        example = examples[0, index]
        shown.append(example)
        w, h = images.open_image(pair.image).size
        print(f"  m_w {w}x{h} -> {size}x{size}; m_l by {strategy!r}, seed {args.seed}, epoch 0")
        print(f"  prompt    {lengths[0]:5} tokens: {prompt_text(example.prompt.tolist(), processor)}")
        for name in ("chosen", "rejected"):
            ids = getattr(example, name).tolist()
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
            print(f"  {name:<9} {len(ids):5} scored: [[{text}]]")
    if shown:
        write_sheet(shown, processor.template.image, args.out)
        print(f"\n{args.out}: m_w and m_l of {len(shown)} rows, as the model sees them; [[ ]] marks the scored span")


def write_sheet(examples: list[data.Example], spec: images.ImageSpec, out: Path) -> None:
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


# ---- --time --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, pairs: list[Pair], processor: data.Processor) -> None:
    """Pairs per second, two prepared pictures each, out of the loader that training uses."""
    good = [p for p in pairs if not data.image_problem(p, args.rejected_image)]
    if not good:
        raise SystemExit(f"{args.data}: no row has a picture that opens")
    examples = data.PairData(good, processor, args.rejected_image, args.seed)
    n, first = args.pairs, 4 * max(1, args.workers)  # the first wait for the workers to start
    sampler = data.EpochSampler(len(examples), -(-(n + first) // len(examples)), args.seed)
    loader = data.example_loader(examples, sampler, args.workers)
    for done, _ in enumerate(tqdm(loader, "pairs", n + first, disable=None), 1):
        if done == first:
            start = time.perf_counter()
        if done == first + n:
            break
    seconds = time.perf_counter() - start
    print(f"{n / seconds:.1f} pairs/s: {n} pairs in {seconds:.1f} s, {args.workers} workers, {os.cpu_count()} cores, "
          f"m_l by {args.rejected_image!r}, pictures of {processor.template.image.size} px")  # fmt: skip


def main(argv=None) -> None:
    p = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("data", help=f"preference file, folder, or hub data set ({', '.join(hub.NAMED)}, owner/name)")
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument("--check", action="store_true", help="scan everything; exit status 1 if a row cannot be used")
    g.add_argument("--show", type=int, metavar="N", help="print the first N rows as the model sees them")
    g.add_argument("--time", action="store_true", help="measure the data loading")
    p.add_argument("--base", help=f"{', '.join(weights.SOURCES)}, or a checkpoint folder")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--rejected-image", default="crop", choices=images.STRATEGIES, help="how m_l is made from m_w")
    p.add_argument("--max-length", type=int, default=data.MAX_LENGTH, help="prompt + response, image tokens counted")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="processes that prepare pictures (--time)")
    p.add_argument("--pairs", type=int, default=300, help="how many are timed (--time)")
    p.add_argument("--out", type=Path, default=Path("show.png"), help="the sheet of pictures (--show)")
    args = p.parse_args(argv)
    if not args.base and not args.check:
        p.error("--show and --time need --base: its tokenizer and picture size")
    processor = load_processor(args.base) if args.base else None
    pairs, problems = read_pairs(args.data, args.image_root)
    if args.check:
        return check(args, pairs, problems, processor)
    if problems:
        print(f"{len(problems)} rows cannot be read, the first: {where(args.data, sorted(problems), 1)}")
    measure(args, pairs, processor) if args.time else show(args, pairs, processor)
