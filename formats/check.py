"""What is wrong with preference data, before training: `python -m formats.check DATA [--base B]`."""

import argparse
import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import pictures
from bases import checkpoint
from bases.tokenizer import load_processor
from data import MAX_LENGTH, Pair, Problem, Processor
from formats import hub_data
from formats.readers import read_pairs

# ---- checking ------------------------------------------------------------------------------------------------------


def token_lengths(pair: Pair, processor: Processor, with_image: bool = True) -> tuple[int, int, int]:
    """Tokens of the prompt, picture included, of the chosen and of the rejected response, EOS included."""
    responses = (len(processor.response_ids(r)) for r in (pair.chosen, pair.rejected))
    return len(processor.prompt_ids(pair.prompt, with_image)), *responses


TOO_LONG = "too long"  # the one reason that --cut-long mends


def text_problem(pair: Pair, lengths: tuple[int, int, int], special_texts: list[str],
                 max_length: float) -> Problem | None:  # fmt: skip
    """The first thing wrong with a pair's texts, or None. `lengths` are its token_lengths."""
    for name in ("prompt", "chosen", "rejected"):
        text = getattr(pair, name)
        if not text.strip():
            return Problem(pair.row, pair.id, f"empty {name}")
        if found := [s for s in special_texts if s in text]:
            return Problem(pair.row, pair.id, "special-token text inside data", f"{found[0]} in {name}")
    prompt, *responses = lengths
    if prompt >= max_length:
        return Problem(pair.row, pair.id, "prompt too long", f"{prompt} tokens, --max-length is {max_length}")
    if prompt + max(responses) > max_length:
        return Problem(pair.row, pair.id, TOO_LONG, f"{prompt + max(responses)} tokens, --max-length is {max_length}")


def image_problem(pair: Pair, strategy: str | None) -> Problem | None:
    """Decodes the picture(s) once, small, so that broken files are found before training."""
    wanted = [("image", pair.image)] + ([("image_rejected", pair.image_rejected)] if strategy == "given" else [])
    for name, source in wanted:
        if source is None:
            return Problem(pair.row, pair.id, f"no {name}")
        try:
            pictures.open_image(source)
        except ValueError as e:
            reason = "missing image" if str(e) == "missing image" else "broken image"
            return Problem(pair.row, pair.id, reason, f"{source if isinstance(source, Path) else 'bytes'}: {e}")


def find_problems(pairs: list[Pair], processor: Processor, with_image: bool = True, strategy: str | None = None,
                  max_length: int = MAX_LENGTH) -> list[Problem]:  # fmt: skip
    """Problems of every pair: the first of its texts, then of its pictures."""
    lengths = [token_lengths(p, processor, with_image) for p in tqdm(pairs, "texts", disable=None)]
    return check_pairs(pairs, lengths, processor.special_texts, max_length, strategy, with_image)


def check_pairs(pairs: list[Pair], lengths: list[tuple[int, int, int]], special_texts: list[str], max_length: float,
                strategy: str | None, with_image: bool = True) -> list[Problem]:  # fmt: skip
    """find_problems, where the lengths are known; pictures are decoded in parallel."""
    problems = [text_problem(p, n, special_texts, max_length) for p, n in zip(pairs, lengths, strict=True)]
    left = [p for p, problem in zip(pairs, problems, strict=True) if problem is None or problem.reason == TOO_LONG]
    if with_image:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            found = pool.map(lambda p: image_problem(p, strategy), left)
            problems += tqdm(found, "pictures", len(left), disable=None)
    return [p for p in problems if p is not None]


def usable(pairs: list[Pair], problems: list[Problem], file: Path, skip_bad: bool, cut_long=False) -> list[Pair]:
    """The pairs without problems. SystemExit naming the first bad row and the count by reason, unless skip_bad.

    With cut_long a too long response is no problem: PairData with a max_length cuts it, and the count is printed here.
    """
    if cut_long and (long := [p for p in problems if p.reason == TOO_LONG]):
        print(f"{file}: {len(long)} of {len(pairs)} rows have a response too long for --max-length; it is cut, without "
              f"EOS (--cut-long); the first: row {long[0].row}, id {long[0].id}: {long[0].detail}")  # fmt: skip
        problems = [p for p in problems if p.reason != TOO_LONG]
    bad = {p.row for p in problems}
    if problems:
        counts = ", ".join(f"{n} {reason}" for reason, n in Counter(p.reason for p in problems).most_common())
        total = len(pairs) + len(bad - {p.row for p in pairs})
        first = min(problems)
        summary = f"{len(bad)} of {total} rows cannot be used ({counts})"
        where = f"{file}:{first.row}: id {first.id}: {first.reason}{': ' + first.detail if first.detail else ''}"
        if not skip_bad:
            raise SystemExit(f"{where}\n{summary}. Mend the data, or leave these rows out with --skip-bad.")
        print(f"{file}: {summary}, left out (--skip-bad); the first: {where}")
    pairs = [p for p in pairs if p.row not in bad]
    if not pairs:
        raise SystemExit(f"{file}: no usable rows")
    return pairs


EXTREME_ASPECT = 5.0  # longer side over shorter; padding to a square then fills four fifths of what the model sees


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
    length = (lambda p: token_lengths(p, processor)) if processor else word_lengths
    lengths = [length(p) for p in tqdm(pairs, "texts", disable=None)]
    problems = sorted(problems + check_pairs(pairs, lengths, special, longest, args.rejected_image))
    for reason, count in Counter(p.reason for p in problems).most_common():
        print(f"cannot be used: {count} {reason}: {where(args.data, [p for p in problems if p.reason == reason])}")
    for kind, some in notes(pairs).items():
        if some:
            print(f"note: {len(some)} {kind}: {where(args.data, some)}")
    broken = {p.row for p in problems if p.reason != TOO_LONG}
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
        with Image.open(pictures.readable(pair.image)) as image:  # reads the header only
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


def load_small_processor(base: str) -> Processor:
    """Of a base on the hub only the small files are fetched."""
    folder = checkpoint.resolve(base, patterns=checkpoint.SMALL_FILES)
    return load_processor(folder, checkpoint.read_config(folder))


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("data", help=f"preference file, folder, or hub data set ({', '.join(hub_data.NAMED)}, owner/name)")
    p.add_argument("--base", help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--rejected-image", default="crop", choices=pictures.STRATEGIES, help="how m_l is made from m_w")
    p.add_argument("--max-length", type=int, default=MAX_LENGTH, help="prompt + response, image tokens counted")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base) if args.base else None
    check(args, *read_pairs(args.data, args.image_root), processor)


if __name__ == "__main__":
    main()
