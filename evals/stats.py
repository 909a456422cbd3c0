"""What all scorers share: answer files in, a value and its interval, results out.

Used by eval_chair.py and by amber, pope and mmhal in this room. Not from a paper, so nothing to deviate from.

Nothing here may shrink a denominator in silence: a row that cannot be read or matched ends the run with the file, the
row and what to do. A scorer hands over numbers per row (`Part`), so that a value, its interval and the paired
difference of two runs come from one formula of their sums.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from external import files
from external.terminal import set_up_terminal

SEED, RESAMPLES = 0, 1000  # of every bootstrap
UNKNOWN_VERSION = "UNKNOWN VERSION"  # in the `source` of questions whose file is not a published one
CUT_SHARE = 0.5  # from this share of answers that were cut off on, a result says so
# ours; POPE, Object HalBench and LLaVA; AMBER; COCO caption files; a filled MMHal template. The first in a row counts.
ANSWER_KEYS = ("answer", "text", "response", "caption", "model_answer")


# ---- answers -------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path) -> list[dict]:
    """Rows of an answer file, ours or an official layout, with the text under `answer`. Empty answers stay in."""
    rows = files.read_rows(path)
    for row in rows:
        key = next((key for key in ANSWER_KEYS if key in row), "")
        if not isinstance(row.get(key), str):
            found = f"`{key}` is {row[key]!r}, not a text" if key else "no answer"
            raise SystemExit(f"{row['_where']}: {found}; a row needs a text in one of {', '.join(ANSWER_KEYS)}.")
        row["answer"] = row[key]
    return rows


def question_of(row: dict) -> str:
    """The question that an answer row says it answers, or nothing."""
    return str(row.get("question") or row.get("prompt") or "")


def is_texts(value) -> bool:
    """Whether a value of a JSON file is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def check_unique(ids: list, rows: list[dict], name: str) -> dict:
    """id -> row. SystemExit naming both places if an id is there twice."""
    found = {}
    for key, row in zip(ids, rows, strict=True):
        if key in found:
            first = found[key]["_where"]
            raise SystemExit(f"{row['_where']}: {name} {key} was answered at {first} already; keep one of them.")
        found[key] = row
    return found


def word_forms(table: str) -> dict[str, str]:
    """Word -> singular or lemma, a table of assets/."""
    return files.read_json(Path(__file__).parent.parent / "assets" / table)["forms"]


# ---- values and intervals ------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Rows that are resampled together: ids, the numbers of each by name, the formula from their sums to metrics."""

    ids: list
    rows: list[dict]
    metrics: Callable[[dict], dict]


def ratio(a, b):
    """a / b for numbers or arrays, not-a-number where b is 0 (None in a result)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(b, 0), np.nan, np.divide(a, b))[()]


def sums(rows: list[dict]) -> dict:
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def values(part: Part) -> dict[str, float | None]:
    metrics = part.metrics(sums(part.rows))
    return {name: None if np.isnan(value) else float(value) for name, value in metrics.items()}


def bootstrap(part: Part, seed: int = SEED) -> dict[str, np.ndarray]:
    """Metrics of RESAMPLES draws of n rows with replacement. Equal n and seed draw equal rows: that is the pairing."""
    table = np.array([list(row.values()) for row in part.rows], dtype=np.float64)  # (n, sums)
    n = len(table)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        times = np.bincount(generator.integers(n, size=n), minlength=n)  # (n,) how often each row was drawn
        draws.append(times @ table)  # (sums,)
    resampled = dict(zip(part.rows[0], np.array(draws).T, strict=True))  # name -> (RESAMPLES,)
    return part.metrics(resampled)


def interval(samples: np.ndarray) -> list[float] | None:
    """Middle 95 % of the resampled values; None when no resample has a value."""
    samples = samples[~np.isnan(samples)]
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])] if len(samples) else None


def summary(part: Part) -> dict:
    intervals = {name: interval(samples) for name, samples in bootstrap(part).items()}
    return {"metrics": values(part), "intervals": intervals}


def compare(a: Part, b: Part) -> dict:
    """B minus A on the same questions, with paired intervals."""
    if set(a.ids) != set(b.ids):
        odd = sorted(set(a.ids) ^ set(b.ids), key=str)
        raise SystemExit(f"--compare needs the same questions in A and B; {len(odd)} are in one only: {odd[:3]}.")
    row_of = dict(zip(b.ids, b.rows, strict=True))
    b = b._replace(rows=[row_of[key] for key in a.ids])
    value_a, value_b = values(a), values(b)
    samples_a, samples_b = bootstrap(a), bootstrap(b)
    result = {}
    for name in value_a:
        both = None not in (value_a[name], value_b[name])
        result[name] = {
            "a": value_a[name],
            "b": value_b[name],
            "difference": value_b[name] - value_a[name] if both else None,
            "interval": interval(samples_b[name] - samples_a[name]),
        }
    return result


# ---- results -------------------------------------------------------------------------------------------------------


def header(scorer: str, protocol: str, paths: list[str], rows: list[dict], n_expected: int | None = None) -> dict:
    """What all results share, None where the files do not say.

    `generation` is what evals.answers wrote beside the answers; `not_comparable` are the warnings because of which the
    numbers must not be put beside published ones.
    """
    n = len(rows)
    tokens = [row.get("n_tokens") for row in rows]
    ends = [row.get("finish") for row in rows]
    beside = [Path(path).with_suffix(".settings.json") for path in paths]
    settings = [files.read_json(path, dict) if path.is_file() else None for path in beside]
    result = {
        "scorer": scorer,
        "protocol": protocol,
        "answers": [{"path": str(path), "sha256": files.sha256(Path(path).read_bytes())} for path in paths],
        "n": n,
        "n_expected": n_expected,
        "n_empty": sum(not row["answer"].strip() for row in rows),
        "mean_words": sum(len(row["answer"].split()) for row in rows) / n if n else None,
        "mean_tokens": None if None in tokens or not n else sum(tokens) / n,
        "share_at_token_limit": None if None in ends or not n else ends.count("length") / n,
        "generation": settings[0] if len(settings) == 1 else settings,
        "bootstrap": {"seed": SEED, "resamples": RESAMPLES, "level": 0.95, "unit": "rows"},
        "warnings": [],
        "not_comparable": [],
    }
    if result["n_empty"]:
        result["warnings"].append(f"{result['n_empty']} empty answers, counted like any other")
    if (result["share_at_token_limit"] or 0) >= CUT_SHARE:
        cut = f"{100 * result['share_at_token_limit']:.0f} % of the answers were cut off by --max-new-tokens"
        not_comparable(result, f"{cut}: the model does not end them, or the limit is too low")
    sources = {str(row.get("source", "")) for row in rows}
    if unknown := sorted(source for source in sources if UNKNOWN_VERSION in source):
        not_comparable(result, f"questions of an unpublished version ({', '.join(unknown)})")
    if n_expected not in (None, n):
        not_comparable(result, f"{n} rows, the official set has {n_expected}: not comparable with published numbers")
    return result


def not_comparable(result: dict, reason: str) -> None:
    """A warning that also marks the result's cells in a table."""
    result["warnings"].append(reason)
    result["not_comparable"].append(reason)


def show(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def show_interval(ends: list[float] | None) -> str:
    return f"[{', '.join(show(end) for end in ends or [])}]"


def print_result(result: dict) -> None:
    paths = [file["path"] for file in result["answers"]]
    print(f"{result['scorer']} | {result['protocol']} | {paths}")
    names = ("n", "n_expected", "n_empty", "mean_words", "mean_tokens", "share_at_token_limit")
    print(" | ".join(f"{name} {show(result[name])}" for name in names))
    for name, value in result["metrics"].items():
        print(f"{name:32s} {show(value):>10s}   {show_interval(result['intervals'].get(name))}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")


def compare_parts(parts_a: list[Part], parts_b: list[Part]) -> dict:
    """name -> comparison, over all parts of two results."""
    if len(parts_a) != len(parts_b):
        raise SystemExit("--compare needs the same kinds of questions in A and B.")
    compared = {}
    for a, b in zip(parts_a, parts_b, strict=True):
        compared |= compare(a, b)
    return compared


MADE = ("template", "decoding", "max_new_tokens", "image_mode", "dtype")  # of `generation`: what else moves a score


def other_making(a: dict, b: dict) -> list[str]:
    """What two results differ in beside the model: their difference shows that too."""
    found = []
    if a["protocol"] != b["protocol"]:
        found.append(f"A is {a['protocol']}, B is {b['protocol']}")
    made_a, made_b = a["generation"], b["generation"]
    if isinstance(made_a, dict) and isinstance(made_b, dict):
        for name in MADE:
            if made_a.get(name) != made_b.get(name):
                found.append(f"A was made with {name} {made_a.get(name)}, B with {made_b.get(name)}")
    return [f"{difference}: B - A shows that too" for difference in found]


def report(scored: list[tuple[dict, list[Part]]], json_path: str | None) -> None:
    """The table for the terminal and the JSON file, of one result or of the comparison of two."""
    for result, _ in scored:
        print_result(result)
    written = scored[0][0]
    if len(scored) == 2:
        (a, parts_a), (b, parts_b) = scored
        written = {"a": a, "b": b, "compare": compare_parts(parts_a, parts_b), "warnings": other_making(a, b)}
        for warning in written["warnings"]:
            print(f"warning: {warning}")
        for name, row in written["compare"].items():
            both = f"A {show(row['a'])}  B {show(row['b'])}  B - A {show(row['difference'])}"
            print(f"{name:32s} {both}   {show_interval(row['interval'])}")
    print(f"[ ]: 95 % bootstrap interval over rows, seed {SEED}, {RESAMPLES} resamples")
    if json_path:
        files.write_json(json_path, written)


def check_json(json_path: str | None, reads: list[str | None]) -> None:
    """SystemExit if --json cannot be written, or is one of the files that the command reads: paid replies, say."""
    if json_path is not None:
        beside = [Path(path).with_suffix(".settings.json") for path in reads if path]
        files.check_writable(json_path, [*reads, *beside])


def scorer_flags(doc: str, source: str, what: str, compared: str, **more) -> argparse.ArgumentParser:
    """A parser with what every scorer takes: its source of answers or --compare of two, and --json."""
    set_up_terminal()
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument(source, help=what, **more)
    either.add_argument("--compare", nargs=2, metavar=("A", "B"), help=f"two {compared}: differences B - A")
    parser.add_argument("--json", help="file for the result")
    return parser
