"""What the benchmark scorers share: answer files, bootstrap intervals, the form of a result, asking a language model.

Not from a paper. Deviations: none. Run: imported by eval_chair.py, eval_pope.py, eval_amber.py and eval_mmhal.py.

Nothing here may shrink a denominator in silence: a row that cannot be read or matched ends the run with the file, the
row and what to do. A scorer hands over numbers per row (`Part`), so that a value, its interval and the paired
difference of two runs come from one formula of their sums.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from external.files import read_json, read_rows, sha256, write_json

SEED, RESAMPLES = 0, 1000  # of every bootstrap
# ours; POPE, Object HalBench and LLaVA; AMBER; COCO caption files; a filled MMHal template. The first in a row counts.
ANSWER_KEYS = ("answer", "text", "response", "caption", "model_answer")


def read_answers(path: str | Path) -> list[dict]:
    """Rows of an answer file, ours or an official layout, with the text under `answer`. Empty answers stay in."""
    rows = read_rows(path)
    for row in rows:
        key = next((key for key in ANSWER_KEYS if key in row), "")
        if not isinstance(row.get(key), str):
            found = f"`{key}` is {row[key]!r}, not a text" if key else "no answer"
            raise SystemExit(f"{row['_where']}: {found}; a row needs a text in one of {', '.join(ANSWER_KEYS)}.")
        row["answer"] = row[key]
    return rows


def word_forms(table: str) -> dict[str, str]:
    """Word -> singular or lemma, a table of assets/."""
    return read_json(Path(__file__).parent.parent / "assets" / table)["forms"]


def check_unique(ids: list, rows: list[dict], name: str) -> dict:
    """id -> row. SystemExit naming both places if an id is there twice."""
    found = {}
    for key, row in zip(ids, rows, strict=True):
        if key in found:
            first = found[key]["_where"]
            raise SystemExit(f"{row['_where']}: {name} {key} was answered at {first} already; keep one of them.")
        found[key] = row
    return found


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
    table = np.array([list(row.values()) for row in part.rows], dtype=np.float64).T  # (n, sums) -> (sums, n)
    generator, n = np.random.default_rng(seed), table.shape[1]
    draws = [table @ np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]
    return part.metrics(dict(zip(part.rows[0], np.array(draws).T, strict=True)))


def interval(samples: np.ndarray) -> list[float] | None:
    """Middle 95 % of the resampled values; None when no resample has a value."""
    samples = samples[~np.isnan(samples)]
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])] if len(samples) else None


def summary(part: Part) -> dict:
    return {"metrics": values(part), "intervals": {name: interval(x) for name, x in bootstrap(part).items()}}


def compare(a: Part, b: Part) -> dict:
    """B minus A on the same questions, with paired intervals."""
    if set(a.ids) != set(b.ids):
        odd = sorted(set(a.ids) ^ set(b.ids), key=str)
        raise SystemExit(f"--compare needs the same questions in A and B; {len(odd)} are in one only: {odd[:3]}.")
    row_of = dict(zip(b.ids, b.rows, strict=True))
    b = b._replace(rows=[row_of[key] for key in a.ids])
    va, vb, sa, sb, result = values(a), values(b), bootstrap(a), bootstrap(b), {}
    for name in va:
        difference = None if None in (va[name], vb[name]) else vb[name] - va[name]
        ends = interval(sb[name] - sa[name])
        result[name] = {"a": va[name], "b": vb[name], "difference": difference, "interval": ends}
    return result


def header(scorer: str, protocol: str, paths: list[str], rows: list[dict], n_expected: int | None = None) -> dict:
    """What all results share, None where the files do not say; `generation` is what generate.py wrote beside them."""
    n, tokens, ends = len(rows), [r.get("n_tokens") for r in rows], [r.get("finish") for r in rows]
    beside = [Path(path).with_suffix(".settings.json") for path in paths]
    settings = [read_json(path) if path.is_file() else None for path in beside]
    empty = sum(not r["answer"].strip() for r in rows)
    warnings = [f"{empty} empty answers, counted like any other"] if empty else []
    if n_expected not in (None, n):
        warnings.append(f"{n} rows, the official set has {n_expected}: not comparable with published numbers")
    return {
        "scorer": scorer, "protocol": protocol,
        "answers": [{"path": str(path), "sha256": sha256(Path(path).read_bytes())} for path in paths],
        "n": n, "n_expected": n_expected, "n_empty": empty,
        "mean_words": sum(len(r["answer"].split()) for r in rows) / n if n else None,
        "mean_tokens": None if None in tokens or not n else sum(tokens) / n,
        "share_at_token_limit": None if None in ends or not n else ends.count("length") / n,
        "generation": settings[0] if len(settings) == 1 else settings,
        "bootstrap": {"seed": SEED, "resamples": RESAMPLES, "level": 0.95, "unit": "rows"}, "warnings": warnings,
    }  # fmt: skip


def show(value) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def report(scored: list[tuple[dict, list[Part]]], json_path: str | None) -> None:
    """The table for the terminal and the JSON file, of one result or of the comparison of two."""
    for result, _ in scored:
        print(f"{result['scorer']} | {result['protocol']} | {[file['path'] for file in result['answers']]}")
        names = ("n", "n_expected", "n_empty", "mean_words", "mean_tokens", "share_at_token_limit")
        print(" | ".join(f"{name} {show(result[name])}" for name in names))
        for name, value in result["metrics"].items():
            print(f"{name:32s} {show(value):>10s}   [{', '.join(map(show, result['intervals'].get(name) or []))}]")
        print("".join(f"warning: {warning}\n" for warning in result["warnings"]), end="")
    result = scored[0][0]
    if len(scored) == 2:
        (a, parts_a), (b, parts_b) = scored
        if len(parts_a) != len(parts_b):
            raise SystemExit("--compare needs the same kinds of questions in A and B.")
        rows = [compare(*pair) for pair in zip(parts_a, parts_b, strict=True)]
        result = {"a": a, "b": b, "compare": {name: row for part in rows for name, row in part.items()}}
        for name, row in result["compare"].items():
            ends = ", ".join(map(show, row["interval"] or []))
            print(f"{name:32s} A {show(row['a'])}  B {show(row['b'])}  B - A {show(row['difference'])}   [{ends}]")
    print(f"[ ]: 95 % bootstrap interval over rows, seed {SEED}, {RESAMPLES} resamples")
    if json_path:
        write_json(json_path, result)


def parser_of(doc: str, source: str, what: str, compared: str, **more) -> argparse.ArgumentParser:
    """A scorer's flags: its source of answers or --compare of two, and --json."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument(source, help=what, **more)
    either.add_argument("--compare", nargs=2, metavar=("A", "B"), help=f"two {compared}: differences B - A")
    parser.add_argument("--json", help="file for the result")
    return parser
