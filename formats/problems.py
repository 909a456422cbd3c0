"""What is wrong with a pair, found before training, and what is left of the data without those pairs.

    find_problems   the first thing wrong with each pair: its texts, its length, its pictures
    usable          the pairs without problems; stops, or leaves the others out and counts them

`python -m formats.check DATA` prints all of it; train.py stops at the first, or goes by --skip-bad and --cut-long.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import pictures
from data import MAX_LENGTH, Pair, Problem, Processor

TOO_LONG = "too long"  # the one reason that --cut-long fixes


def token_lengths(pair: Pair, processor: Processor, with_image: bool = True) -> tuple[int, int, int]:
    """Tokens of the prompt, picture included, of the chosen and of the rejected response, EOS included."""
    prompt = processor.prompt_ids(pair.prompt, with_image)
    chosen = processor.response_ids(pair.chosen)
    rejected = processor.response_ids(pair.rejected)
    return len(prompt), len(chosen), len(rejected)


def text_problem(
    pair: Pair, lengths: tuple[int, int, int], special_texts: list[str], max_length: float
) -> Problem | None:
    """The first thing wrong with a pair's texts, or None. `lengths` are its token_lengths."""
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    for name, text in texts.items():
        if not text.strip():
            return Problem(pair.row, pair.id, f"empty {name}")
        found = [special for special in special_texts if special in text]
        if found:
            return Problem(pair.row, pair.id, "special-token text inside data", f"{found[0]} in {name}")
    prompt, chosen, rejected = lengths
    if prompt >= max_length:
        return Problem(pair.row, pair.id, "prompt too long", f"{prompt} tokens, --max-length is {max_length}")
    total = prompt + max(chosen, rejected)
    if total > max_length:
        return Problem(pair.row, pair.id, TOO_LONG, f"{total} tokens, --max-length is {max_length}")
    return None


def image_problem(pair: Pair, strategy: str | None) -> Problem | None:
    """Decodes m_w, and m_l where the data gives it, as training will: broken files are found before it."""
    wanted = {"image": pair.image}
    if strategy == "given":
        wanted["image_rejected"] = pair.image_rejected
    for name, source in wanted.items():
        if source is None:
            return Problem(pair.row, pair.id, f"no {name}")
        try:
            pictures.open_image(source)
        except ValueError as e:
            reason = "missing image" if str(e) == "missing image" else "broken image"
            place = source if isinstance(source, Path) else "bytes"
            return Problem(pair.row, pair.id, reason, f"{place}: {e}")
    return None


def find_problems(
    pairs: list[Pair],
    processor: Processor,
    with_image: bool = True,
    strategy: str | None = None,
    max_length: int = MAX_LENGTH,
) -> list[Problem]:
    """Problems of every pair: the first of its texts, then of its pictures."""
    lengths = [token_lengths(pair, processor, with_image) for pair in tqdm(pairs, "texts", disable=None)]
    return check_pairs(pairs, lengths, processor.special_texts, max_length, strategy, with_image)


def check_pairs(
    pairs: list[Pair],
    lengths: list[tuple[int, int, int]],
    special_texts: list[str],
    max_length: float,
    strategy: str | None,
    with_image: bool = True,
) -> list[Problem]:
    """find_problems, where the lengths are known; pictures are decoded in parallel."""
    problems = []
    to_open = []
    for pair, length in zip(pairs, lengths, strict=True):
        problem = text_problem(pair, length, special_texts, max_length)
        if problem is not None:
            problems.append(problem)
        if problem is None or problem.reason == TOO_LONG:
            to_open.append(pair)
    if with_image:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            found = pool.map(lambda pair: image_problem(pair, strategy), to_open)
            problems += [problem for problem in tqdm(found, "pictures", len(to_open), disable=None) if problem]
    return problems


def usable(
    pairs: list[Pair], problems: list[Problem], file: Path | str, skip_bad: bool, cut_long: bool = False
) -> list[Pair]:
    """The pairs without problems. SystemExit naming the first bad row and the count by reason, unless skip_bad.

    With cut_long a too long response is no problem: PairData with a max_length cuts it, and the count is printed here.
    """
    long = [p for p in problems if p.reason == TOO_LONG]
    if cut_long and long:
        print(
            f"{file}: {len(long)} of {len(pairs)} rows have a response too long for --max-length; it is cut, without "
            f"EOS (--cut-long); the first: row {long[0].row}, id {long[0].id}: {long[0].detail}"
        )
        problems = [p for p in problems if p.reason != TOO_LONG]
    bad = {p.row for p in problems}
    if problems:
        counts = ", ".join(f"{n} {reason}" for reason, n in Counter(p.reason for p in problems).most_common())
        total = len(pairs) + len(bad - {p.row for p in pairs})
        first = min(problems)
        summary = f"{len(bad)} of {total} rows cannot be used ({counts})"
        detail = f": {first.detail}" if first.detail else ""
        where = f"{file}:{first.row}: id {first.id}: {first.reason}{detail}"
        if not skip_bad:
            raise SystemExit(f"{where}\n{summary}. Fix the data, or leave these rows out with --skip-bad.")
        print(f"{file}: {summary}, left out (--skip-bad); the first: {where}")
    good = [p for p in pairs if p.row not in bad]
    if not good:
        raise SystemExit(f"{file}: no usable rows")
    return good
