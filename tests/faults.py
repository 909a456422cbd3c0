"""Injects the faults of a newcomer and of a hostile tester, one after the other, and says what became of each.

    python -m tests.faults                   all but the slow ones
    python -m tests.faults --slow            those too
    python -m tests.faults --only 41 0.11    some, by number
    python -m tests.faults --markdown        the result as a table, for docs/results.md

Small models and pictures, no network but loopback. A line per fault: number, what was injected, what happened, verdict
(faults_bench.py says what the verdicts mean). Exit status 1 if one of them is a BUG.
"""

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

from external.terminal import count
from tests import (  # noqa: F401  each puts its faults into FAULTS
    faults_data,
    faults_endpoint,
    faults_evaluation,
    faults_files,
    faults_flags,
    faults_more,
    faults_pds,
    faults_pictures,
    faults_places,
    faults_resumed,
    faults_stale,
    faults_weights,
)
from tests.faults_bench import FAULTS, Fault, Outcome, make_master, run_one

SHOWN = 150  # letters of an outcome


def wanted(found: Fault, only: list[str] | None, slow: bool) -> bool:
    """By number, with or without its letter; slow ones only if asked for."""
    if only:
        return found.number in only or re.sub("[a-z]+$", "", found.number) in only
    return slow or not found.slow


def run_all(chosen: list[Fault], folder: Path) -> list[tuple[Fault, Outcome]]:
    """Each in a folder of its own; prints a line as soon as it is known."""
    master = make_master(folder / "master")
    results = []
    for i, found in enumerate(chosen):
        outcome = run_one(found, folder / str(i), master)
        print(f"{found.number:>5}  {found.what} | {outcome.says[:SHOWN]} | {outcome.verdict}", flush=True)
        results.append((found, outcome))
    return results


def markdown(results: list[tuple[Fault, Outcome]]) -> str:
    """A table by section."""
    lines = ["| # | injected | what happened | verdict |", "|---|---|---|---|"]
    for section in dict.fromkeys(found.section for found, _ in results):
        lines.append(f"| | **{section}** | | |")
        for found, outcome in results:
            if found.section == section:
                cells = (found.number, found.what, outcome.says[:SHOWN], outcome.verdict)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def summary(results: list[tuple[Fault, Outcome]]) -> str:
    counts = Counter(outcome.verdict for _, outcome in results)
    return f"{count(len(results), 'fault')}: " + ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in ("OK", "POOR", "BUG")
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", metavar="N", help="numbers of faults")
    p.add_argument("--slow", action="store_true", help="those of more than about 20 seconds too")
    p.add_argument("--markdown", action="store_true", help="print the result as a table")
    args = p.parse_args(argv)
    chosen = [found for found in FAULTS if wanted(found, args.only, args.slow)]
    if not chosen:
        p.error("no fault has this number")
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(chosen, Path(folder).resolve())
    if args.markdown:
        print(markdown(results))
    print(summary(results))
    if any(outcome.verdict == "BUG" for _, outcome in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
