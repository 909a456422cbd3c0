"""What is wrong with a pair, found before training: the one decision that check, show and train share.

    Demands   what a run asks of a row: its --rejected-image, --max-length, --cut-long, and what its recipe looks at
    examine   pairs and Demands -> Examined: how m_l is made, the lengths, every problem
    usable    the pairs without problems; stops, or leaves the others out and counts them

`python -m formats.check DATA` prints all of it; train.py stops at the first problem, or goes by --skip-bad.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pictures
from data import IMAGE_TOKEN, MAX_LENGTH, SYSTEM, Pair, Problem, Processor
from external.progress import progress
from external.terminal import LONGEST, count, printable

TOO_LONG = "too long"  # the one reason that --cut-long fixes


@dataclass(frozen=True)
class Demands:
    """What a run asks of every row."""

    rejected_image: str | None = None  # how m_l is made; None: `given` where all rows bring one, else `crop`
    needs_m_l: bool = True  # losses.needs_image_rejected(terms, anchors)
    with_image: bool = True  # False for dpo-no-image
    max_length: int = MAX_LENGTH
    cut_long: bool = False


class Examined(NamedTuple):
    """What `examine` found."""

    name: str  # of the data, as the user gave it
    demands: Demands
    pairs: list[Pair]
    strategy: str | None  # how m_l is made; None where the objective does not look at it
    lengths: list[tuple[int, int, int]]  # of prompt, chosen and rejected: tokens, or words without a base
    problems: list[Problem]  # of all rows, also of those that could not be read; sorted by row
    too_long: list[Problem]  # with cut_long, rows whose response will be cut: no problems


def examine(
    name: str, pairs: list[Pair], problems: list[Problem], processor: Processor | None, demands: Demands
) -> Examined:
    """Every problem of pairs as read_pairs gives them. Without a processor lengths are words and none is too long."""
    strategy = strategy_of(demands, pairs)
    special_texts = processor.special_texts if processor else [IMAGE_TOKEN]
    max_length = demands.max_length if processor else math.inf
    lengths = []
    found = list(problems)
    to_open = []
    for pair in progress(pairs, "texts"):
        length = token_lengths(pair, processor, demands.with_image) if processor else word_lengths(pair)
        lengths.append(length)
        problem = text_problem(pair, length, special_texts, max_length)
        if problem is not None:
            found.append(problem)
        if problem is None or problem.reason == TOO_LONG:
            to_open.append(pair)
    if demands.with_image:
        found += problems_of_pictures(to_open, lambda pair: image_problem(pair, strategy))
    found.sort()
    too_long = []
    if demands.cut_long:
        too_long = [p for p in found if p.reason == TOO_LONG]
        found = [p for p in found if p.reason != TOO_LONG]
    return Examined(str(name), demands, pairs, strategy, lengths, found, too_long)


def strategy_of(demands: Demands, pairs: list[Pair]) -> str | None:
    """How m_l is made: as asked for, else from the data where all rows bring one, else a crop; None if unused."""
    if not demands.needs_m_l and demands.rejected_image:
        raise SystemExit("--rejected-image: this objective does not look at m_l; leave it out, or add copo to --terms")
    if not demands.needs_m_l:
        return None
    if not demands.with_image:
        raise SystemExit("dpo-no-image has no pictures: leave copo out of --terms and m_l out of --anchors")
    if demands.rejected_image:
        return demands.rejected_image
    brought = sum(pair.image_rejected is not None for pair in pairs)
    if 0 < brought < len(pairs):
        print(f"a rejected image stands in only {brought} of {len(pairs)} rows; all get a crop instead")
    return "given" if brought and brought == len(pairs) else "crop"


def usable(examined: Examined, skip_bad: bool) -> list[Pair]:
    """The pairs without problems. SystemExit naming the first bad row and the count by reason, unless skip_bad.

    Responses that are too long under --cut-long are cut by PairData(max_length=...); their count is printed here.
    """
    name, pairs, problems = examined.name, examined.pairs, examined.problems
    if examined.too_long:
        first = examined.too_long[0]
        print(
            f"{name}: a response too long for --max-length in {len(examined.too_long)} of {count(len(pairs), 'row')}; "
            f"it is cut, without EOS (--cut-long); the first: {place(name, first)}: {first.detail}"
        )
    bad = {p.row for p in problems}
    if problems:
        summary = f"{len(bad)} of {count(rows_in(examined), 'row')} cannot be used ({count_reasons(problems)})"
        first = problems[0]
        detail = f": {first.detail}" if first.detail else ""
        where = f"{place(name, first)}: {first.reason}{detail}"
        if not skip_bad:
            raise SystemExit(f"{where}\n{summary}. Fix the data, or leave these rows out with --skip-bad.")
        print(f"{name}: {summary}, left out (--skip-bad); the first: {where}")
    reason = too_few(examined)
    if reason:
        raise SystemExit(reason)
    return [p for p in pairs if p.row not in bad]


def too_few(examined: Examined) -> str | None:
    """Why what is left without the bad rows is not enough to train on, or None."""
    left = len({p.row for p in examined.pairs} - {p.row for p in examined.problems})
    if left == 0:
        return f"{examined.name}: no usable rows"
    if left == 1 and examined.strategy == "random":
        return "--rejected-image random takes another example's picture: at least 2 pairs are needed"
    return None


def rows_in(examined: Examined) -> int:
    """Rows that are a pair or a problem."""
    return len({p.row for p in examined.pairs} | {p.row for p in examined.problems})


def reasons(problems: list[Problem]) -> Counter[str]:
    """reason -> rows."""
    return Counter(p.reason for p in problems)


def count_reasons(problems: list[Problem]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons(problems).most_common())


def place(name: str, item: Pair | Problem) -> str:
    """file:line: id of a pair or a problem."""
    return f"{item.where or f'{name}:{item.row}'}: id {printable(item.id, LONGEST)}"


# ---- one pair ------------------------------------------------------------------------------------------------------


def token_lengths(pair: Pair, processor: Processor, with_image: bool = True) -> tuple[int, int, int]:
    """Tokens of the prompt, picture included, of the chosen and of the rejected response, EOS included."""
    prompt = processor.prompt_ids(pair.prompt, with_image, pair.system)
    chosen = processor.response_ids(pair.chosen)
    rejected = processor.response_ids(pair.rejected)
    return len(prompt), len(chosen), len(rejected)


def word_lengths(pair: Pair) -> tuple[int, int, int]:
    """Words of the prompt and of both responses."""
    return len(pair.prompt.split()), len(pair.chosen.split()), len(pair.rejected.split())


def problem_of(pair: Pair, reason: str, detail: str = "") -> Problem:
    return Problem(pair.row, pair.id, reason, printable(detail, LONGEST), pair.where)


def text_problem(
    pair: Pair, lengths: tuple[int, int, int], special_texts: list[str], max_length: float
) -> Problem | None:
    """The first thing wrong with a pair's texts, or None. `lengths` are its token_lengths."""
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if pair.system != SYSTEM:
        texts["system"] = pair.system
    for name, text in texts.items():
        if not text.strip():
            return problem_of(pair, f"empty {name}")
        found = [special for special in special_texts if special in text]
        if found:
            return problem_of(pair, "special-token text inside data", f"{found[0]} in {name}")
    prompt, chosen, rejected = lengths
    if prompt >= max_length:
        return problem_of(pair, "prompt too long", f"{prompt} tokens, --max-length is {max_length}")
    total = prompt + max(chosen, rejected)
    if total > max_length:
        return problem_of(pair, TOO_LONG, f"{total} tokens, --max-length is {max_length}")
    return None


def image_problem(pair: Pair, strategy: str | None) -> Problem | None:
    """Decodes m_w, and m_l where the data gives it, as training will: broken files are found before it."""
    wanted = {"image": pair.image}
    if strategy == "given":
        wanted["image_rejected"] = pair.image_rejected
    for name, source in wanted.items():
        if source is None:
            return problem_of(pair, f"no {name}")
        try:
            pictures.open_image(source)
        except ValueError as e:
            reason = "missing image" if str(e) == "missing image" else "broken image"
            file = source if isinstance(source, Path) else "bytes"
            return problem_of(pair, reason, f"{file}: {e}")
    return None


def problems_of_pictures(pairs: list[Pair], problem: Callable[[Pair], Problem | None]) -> list[Problem]:
    """Pictures are decoded in parallel: Pillow does it outside the interpreter lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # no more: each may hold a picture of half a gigabyte
        found = progress(pool.map(problem, pairs), "pictures", len(pairs))
        return [p for p in found if p is not None]
