"""Scans preference data before training: what cannot be used, what is worth a look, sizes and lengths.

    python -m formats.check DATA                          lengths in words
    python -m formats.check DATA --base llava-1.5-7b      lengths in tokens, and what is longer than --max-length

DATA is what train.py --data takes. Every row is read and every picture decoded. Rows are named file:row:id; the exit
status is 1 if one of them cannot be used.
"""

import math
from collections import Counter, defaultdict

import numpy as np
from PIL import Image
from tqdm import tqdm

import pictures
from data import IMAGE_TOKEN, MAX_LENGTH, Pair, Problem, Processor
from formats.command import data_parser, load_small_processor
from formats.problems import TOO_LONG, check_pairs, token_lengths
from formats.readers import read_pairs

EXTREME_ASPECT = 5.0  # longer side over shorter; padding to a square then fills four fifths of what the model sees


def check(args, pairs: list[Pair], problems: list[Problem], processor: Processor | None) -> None:
    """Prints all there is to know; exit status 1 if a row cannot be used. Without a base lengths are in words."""
    if processor:
        special_texts, max_length = processor.special_texts, args.max_length
    else:
        special_texts, max_length = [IMAGE_TOKEN], math.inf
    lengths = []
    for pair in tqdm(pairs, "texts", disable=None):
        lengths.append(token_lengths(pair, processor) if processor else word_lengths(pair))
    problems = sorted(problems + check_pairs(pairs, lengths, special_texts, max_length, args.rejected_image))
    for reason, count in Counter(p.reason for p in problems).most_common():
        print(f"cannot be used: {count} {reason}: {where(args.data, [p for p in problems if p.reason == reason])}")
    for kind, some in notes(pairs).items():
        if some:
            print(f"note: {len(some)} {kind}: {where(args.data, some)}")
    broken = {p.row for p in problems if p.reason != TOO_LONG}
    opened = [p for p in pairs if p.row not in broken]
    if opened:
        print_pictures(args.data, opened)
    if pairs:
        print_lengths(args.data, pairs, lengths, in_tokens=processor is not None)
    bad = {p.row for p in problems}
    print(f"{args.data}: {len(bad)} of {len(bad | {p.row for p in pairs})} rows cannot be used")
    if bad:
        raise SystemExit(1)


def word_lengths(pair: Pair) -> tuple[int, int, int]:
    """Words of the prompt and of both responses."""
    return len(pair.prompt.split()), len(pair.chosen.split()), len(pair.rejected.split())


def notes(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """What is legal but worth a look: kind -> pairs."""
    same = defaultdict(list)
    for pair in pairs:
        same[pair.image, pair.prompt, pair.chosen, pair.rejected].append(pair)
    duplicates = []
    for group in same.values():
        duplicates += group[1:]
    return {
        "identical chosen and rejected": [p for p in pairs if p.chosen == p.rejected],
        "one-word response": [p for p in pairs if 1 in (len(p.chosen.split()), len(p.rejected.split()))],
        "duplicate of an earlier row": duplicates,
    }


def where(file: str, items: list[Pair] | list[Problem], limit: int = 3) -> str:
    """file:row:id of the first few pairs or problems."""
    places = []
    for item in items[:limit]:
        detail = f" ({item.detail})" if isinstance(item, Problem) and item.detail else ""
        places.append(f"{file}:{item.row}:{item.id}{detail}")
    if len(items) > limit:
        places.append(f"... {len(items) - limit} more")
    return "; ".join(places)


def print_pictures(file: str, pairs: list[Pair]) -> None:
    """Sizes, and the pictures of an extreme shape; reads headers only."""
    sizes = []
    extreme = []
    for pair in pairs:
        with Image.open(pictures.readable(pair.image)) as image:
            sizes.append(image.size)
        if max(image.size) > EXTREME_ASPECT * min(image.size):
            extreme.append(pair)
    sizes.sort(key=math.prod)
    smallest, median, largest = (f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    print(f"pictures: {len(sizes)} open, {smallest} smallest, {median} median, {largest} largest")
    if extreme:
        print(f"note: {len(extreme)} with an aspect over {EXTREME_ASPECT:g}: {where(file, extreme)}")


def print_lengths(file: str, pairs: list[Pair], lengths: list[tuple[int, int, int]], in_tokens: bool) -> None:
    """Percentiles of the lengths, and the three longest rows."""
    prompt, chosen, rejected = np.array(lengths).T  # each (rows,)
    total = prompt + np.maximum(chosen, rejected)
    name = "image + prompt" if in_tokens else "prompt"
    columns = {name: prompt, "chosen": chosen, "rejected": rejected, f"{name} + longer response": total}
    title = "length in tokens" if in_tokens else "length in words (--base B: tokens)"
    print(f"{title:<36}   min   5 %  50 %  95 %  99 %   max")
    for name, column in columns.items():
        values = np.percentile(column, [0, 5, 50, 95, 99, 100])
        print(f"  {name:<34}" + "".join(f"{v:6.0f}" for v in values))
    for i in np.argsort(-total, kind="stable")[:3]:
        print(f"  longest: {file}:{pairs[i].row}:{pairs[i].id}, {total[i]}")


def main(argv=None) -> None:
    p = data_parser(__doc__.split("\n")[0], base_required=False)
    p.add_argument("--max-length", type=int, default=MAX_LENGTH, help="prompt + response, image tokens counted")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base) if args.base else None
    pairs, problems = read_pairs(args.data, args.image_root)
    check(args, pairs, problems, processor)


if __name__ == "__main__":
    main()
