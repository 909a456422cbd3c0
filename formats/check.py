"""Scans preference data before training: what cannot be used, what is worth a look, sizes and lengths.

    python -m formats.check DATA                          lengths in words
    python -m formats.check DATA --base llava-1.5-7b      lengths in tokens, and what is longer than --max-length

DATA and the flags are those of train.py, and so is the decision which rows can be used (problems.py). Every row is
read and every picture decoded. Rows are named file:line:id (.jsonl) or file:row:id; the exit status is 1 if one of
them cannot be used, or if there is none.
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

import pictures
from data import Pair, Problem
from external.terminal import LONGEST, count, printable
from formats.command import data_parser, read_and_examine
from formats.problems import TOO_LONG, Examined, rows_in, too_few

EXTREME_ASPECT = 5.0  # longer side over shorter; padding to a square then fills four fifths of what the model sees
FOREIGN_TEMPLATE = re.compile(
    r"\[/?INST\]|<\|(im_start|im_end|user|assistant|system|start_header_id|eot_id|end)\|>|<(start|end)_of_turn>"
    r"|<(video|audio|ImageHere)>|<\|(image_pad|vision_start|vision_end)\|>"
    r"|^\s*(USER|ASSISTANT|Human|Assistant|Question):|^#+ ?(Human|Instruction|Response|Assistant)\b|<image_\d+>",
    re.MULTILINE,
)
MARKER = re.compile(r"\b(USER|ASSISTANT):|<\|(im_start|im_end|start_header_id|eot_id)\|>|\[/?INST\]")  # of a next turn


def check(examined: Examined, in_tokens: bool) -> None:
    """Prints all there is to know; exit status 1 if a row cannot be used, or none can."""
    name, pairs, problems = examined.name, examined.pairs, examined.problems
    for reason, n in Counter(p.reason for p in problems).most_common():
        print(f"cannot be used: {n} {reason}: {where(name, [p for p in problems if p.reason == reason])}")
    if examined.too_long:
        print(f"note: {len(examined.too_long)} cut by --cut-long: {where(name, examined.too_long)}")
    for kind, some in notes(pairs).items():
        if some:
            print(f"note: {len(some)} {kind}: {where(name, some)}")
    broken = {p.row for p in problems if p.reason != TOO_LONG}
    opened = [p for p in pairs if p.row not in broken]
    if opened and examined.demands.with_image:
        print_pictures(name, opened)
    if pairs:
        print_lengths(examined, in_tokens)
    bad = {p.row for p in problems}
    if examined.strategy:
        print(f"m_l by {examined.strategy!r}")
    print(f"{name}: {len(bad)} of {count(rows_in(examined), 'row')} cannot be used")
    reason = too_few(examined)
    if reason:
        print(reason)
    if bad or reason:
        raise SystemExit(1)


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
        "with m_w itself as rejected image": [p for p in pairs if p.image and p.image_rejected == p.image],
        "with another template inside the prompt": [p for p in pairs if FOREIGN_TEMPLATE.search(p.prompt)],
        "with a turn's marker inside a response": [p for p in pairs if MARKER.search(f"{p.chosen}\n{p.rejected}")],
    }


def where(name: str, items: list[Pair] | list[Problem], limit: int = 3) -> str:
    """file:line:id of the first few pairs or problems."""
    places = []
    for item in items[:limit]:
        detail = f" ({item.detail})" if isinstance(item, Problem) and item.detail else ""
        place = item.where or f"{name}:{item.row}"
        places.append(f"{place}:{printable(item.id, LONGEST)}{detail}")
    if len(items) > limit:
        places.append(f"... {len(items) - limit} more")
    return "; ".join(places)


def print_pictures(name: str, pairs: list[Pair]) -> None:
    """Sizes, and the pictures of an extreme shape; reads headers only."""
    sizes = []
    extreme = []
    for pair in pairs:
        with Image.open(pictures.readable(pair.image), formats=pictures.FORMATS) as image:
            sizes.append(image.size)
        if max(image.size) > EXTREME_ASPECT * min(image.size):
            extreme.append(pair)
    sizes.sort(key=math.prod)
    smallest, median, largest = (f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    print(f"pictures: {len(sizes)} open, {smallest} smallest, {median} median, {largest} largest")
    if extreme:
        print(f"note: {len(extreme)} with an aspect over {EXTREME_ASPECT:g}: {where(name, extreme)}")


def print_lengths(examined: Examined, in_tokens: bool) -> None:
    """Percentiles of the lengths, and the three longest rows."""
    prompt, chosen, rejected = np.array(examined.lengths).T  # each (rows,)
    total = prompt + np.maximum(chosen, rejected)
    start = "image + prompt" if in_tokens else "prompt"
    columns = {start: prompt, "chosen": chosen, "rejected": rejected, f"{start} + longer response": total}
    title = "length in tokens" if in_tokens else "length in words (--base B: tokens)"
    print(f"{title:<36}   min   5 %  50 %  95 %  99 %   max")
    for column, values in columns.items():
        percentiles = np.percentile(values, [0, 5, 50, 95, 99, 100])
        print(f"  {column:<34}" + "".join(f"{v:6.0f}" for v in percentiles))
    for i in np.argsort(-total, kind="stable")[:3]:
        print(f"  longest: {where(examined.name, [examined.pairs[i]])}, {total[i]}")


def main(argv=None) -> None:
    args = data_parser(__doc__.split("\n")[0], base_required=False).parse_args(argv)
    examined, processor = read_and_examine(args)
    check(examined, in_tokens=processor is not None)


if __name__ == "__main__":
    main()
