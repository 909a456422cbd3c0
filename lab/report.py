"""Runs side by side: the benchmarks' results as in mDPO's Table 1, and the curves of their training as a picture.

    python -m lab.report runs/a runs/b --table                  a Markdown table on the terminal
    python -m lab.report runs/a runs/b --curves curves.png      loss, margins, and what became of the chosen answers

A run is a folder with train.py's log.jsonl and args.json, and the scorers' results as `--json` wrote them:
eval_mmhal.json, eval_chair.json (--protocol objhal), eval_amber.json, eval_pope.json. What is not there is a dash.

Deviations from Table 1: POPE is added, which mDPO does not report; CHAIR_s is `chair_s_refine` (answers that invent an
object / answers that name one), which is what the benchmark publishes; the paper does not say which one it divides by.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bases.adapter import adapter_sha256
from evals.stats import is_texts
from external import files
from external.terminal import count, printable, set_up_terminal
from lab import plotting


class Column(NamedTuple):
    heading: str  # an arrow says which way is better
    file: str  # of the run folder
    metric: str
    factor: int
    decimals: int


COLUMNS = [
    Column("MMHal Score ↑", "eval_mmhal.json", "score", 1, 2),
    Column("MMHal HalRate ↓", "eval_mmhal.json", "hallucination_rate", 1, 2),
    Column("ObjHal CHAIRs ↓", "eval_chair.json", "chair_s_refine", 100, 1),
    Column("ObjHal CHAIRi ↓", "eval_chair.json", "chair_i", 100, 1),
    Column("AMBER CHAIR ↓", "eval_amber.json", "chair", 1, 1),
    Column("AMBER Cover ↑", "eval_amber.json", "cover", 1, 1),
    Column("AMBER HalRate ↓", "eval_amber.json", "hal", 1, 1),
    Column("AMBER Cog ↓", "eval_amber.json", "cog", 1, 1),
    Column("POPE Acc ↑", "eval_pope.json", "accuracy", 100, 1),
    Column("POPE F1 ↑", "eval_pope.json", "f1", 100, 1),
]
GENERATION = {"decoding", "max_new_tokens", "image_mode"}  # what evals.answers writes beside the answers, at least
RESULT = {"protocol", "metrics", "generation", "n", "warnings"}  # what a scorer's file has at least
PAPER = [  # mDPO, Table 1: the rows that share base, data and judge
    ("Bunny-v1.0-3B", "2.11 0.58 43.0 8.9 9.8 75.6 64.9 6.0"),
    ("Bunny + DPO", "2.28 0.56 44.3 7.6 7.9 74.1 58.9 4.8"),
    ("Bunny + mDPO", "2.96 0.42 27.0 4.6 4.9 67.4 37.7 2.4"),
    ("LLaVA-v1.5-7B", "2.19 0.57 54.7 15.9 7.4 51.8 34.7 4.1"),
    ("LLaVA + DPO", "2.14 0.65 49.0 13.0 6.5 55.1 34.5 2.3"),
    ("LLaVA + mDPO", "2.39 0.54 35.7 9.8 4.4 52.4 24.5 2.4"),
]


# ---- table ---------------------------------------------------------------------------------------------------------


def results(run: Path) -> dict[str, dict]:
    """File name -> a scorer's result, of those that the run folder has."""
    if not run.is_dir():
        raise SystemExit(f"{run}: no such run folder")
    found = {}
    for column in COLUMNS:
        file = run / column.file
        if file.is_file() and column.file not in found:
            found[column.file] = files.read_json(file, dict)
    for name, result in found.items():
        if not is_result(result):
            raise SystemExit(f"{run / name}: not the result of one answer file (a --compare result?); score it again")
        for reason in changed_since(run, result):
            result["not_comparable"] = [*result.get("not_comparable", []), reason]
            result["warnings"].append(reason)
    return found


def generations(result: dict) -> list[dict]:
    """How the answers of a result were made, of each answer file whose settings are known."""
    found = result["generation"] if isinstance(result["generation"], list) else [result["generation"]]
    return [generation for generation in found if generation]


def are_generations(result: dict) -> bool:
    return all(isinstance(own, dict) and GENERATION <= own.keys() for own in generations(result))


def changed_since(run: Path, result: dict) -> list[str]:
    """What is another one now than when the result was made: the run's adapter, trained on, say; an answers file."""
    reasons = []
    now = adapter_sha256(run) if (run / "adapter_config.json").is_file() else None
    if now and any(own.get("adapter_sha256", now) != now for own in generations(result)):
        reasons.append("answers of another adapter than the one that is in the run now; answer and score again")
    for answers in result.get("answers", []):
        file = Path(answers["path"])
        if file.is_file() and files.file_sha256(file) != answers["sha256"]:
            reasons.append(f"{file} has changed since; score it again")
    return reasons


def is_result(result: dict) -> bool:
    """Whether a file holds what a scorer writes, as far as it is shown here."""
    answers = result.get("answers", [])
    return (
        RESULT <= result.keys()
        and is_numbers(result["metrics"])
        and are_generations(result)
        and is_texts(result["warnings"])
        and is_texts(result.get("not_comparable", []))
        and isinstance(answers, list)
        and all(isinstance(own, dict) and is_texts([own.get("path"), own.get("sha256")]) for own in answers)
    )


def is_numbers(metrics) -> bool:
    """Whether it is {name: a number, or None where there is none}."""
    if not isinstance(metrics, dict):
        return False
    return all(value is None or type(value) in (int, float) and abs(value) < 1e9 for value in metrics.values())


def cell(found: dict[str, dict], column: Column, footnotes: dict[str, str]) -> str:
    """A number, with the marks of what keeps it from being put beside the paper's: "35.7 (a)"."""
    result = found.get(column.file)
    if result is None or result["protocol"] == "CHAIR 2018":  # another benchmark: its own captions, words, denominator
        return "-"
    value = result["metrics"].get(column.metric)
    if value is None:
        return "-"
    marks = [footnotes.setdefault(reason, letters(len(footnotes))) for reason in result.get("not_comparable", [])]
    shown = f"{value * column.factor:.{column.decimals}f}"
    return f"{shown} ({', '.join(marks)})" if marks else shown


def letters(number: int) -> str:
    """0, 1, ... -> a, b, ..., z, aa, ab, ..."""
    before = letters(number // 26 - 1) if number >= 26 else ""
    return before + chr(ord("a") + number % 26)


def how_made(generation: dict) -> str:
    decoding = json.dumps(generation["decoding"])
    return f"{decoding}, at most {generation['max_new_tokens']} tokens, image {generation['image_mode']}"


def notes(run: Path, found: dict[str, dict]) -> list[str]:
    """What decides whether a number may be compared: protocol, size, decoding, warnings."""
    lines = []
    for name, result in found.items():
        how = sorted({how_made(own) for own in generations(result)}) or ["decoding not recorded"]
        lines.append(f"{run}, {name}: {result['protocol']}; n {result['n']}; {'; '.join(how)}")
        lines += [f"{run}, {name}: warning: {warning}" for warning in result["warnings"]]
    return lines


def table(runs: list[Path]) -> str:
    rows = [["run", *(column.heading for column in COLUMNS)]]
    below = []
    footnotes = {}  # reason -> mark
    for run in runs:
        found = results(run)
        rows.append([printable(str(run)).replace("|", "\\|"), *(cell(found, column, footnotes) for column in COLUMNS)])
        below += [f"- {printable(note)}" for note in notes(run, found)]
    for name, numbers in PAPER:
        rows.append([f"{name} (the paper's)", *numbers.split(), "-", "-"])  # it does not report POPE
    marked = [f"({mark}) not comparable with the paper's: {printable(reason)}" for reason, mark in footnotes.items()]
    return markdown(rows) + "\n\n" + "".join(f"{line}\n" for line in marked + below)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, the first row its heading, columns as wide as their widest cell."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


# ---- curves --------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    title: str
    unit: str
    value: Callable[[dict, float], float | None]  # what of a log row, given beta; None where the run has no such thing


PANELS = [
    Panel("loss", "nats per pair", lambda row, beta: row["loss"]),
    Panel("margin: chosen − rejected", "reward", lambda row, beta: row["rewards/margins"]),
    Panel("image margin: m_w − m_l", "reward", lambda row, beta: row.get("rewards/image_margins")),
    Panel("log π/π_ref of the chosen answer", "nats", lambda row, beta: row["rewards/chosen"] / beta),
]
NEEDED = {"step", "loss", "rewards/margins", "rewards/chosen"}  # in every row of a log


def read_log(run: Path) -> tuple[list[dict], float]:
    """Rows of log.jsonl and beta. A last line that is being written is left out; a step logged twice counts once."""
    log, args = run / "log.jsonl", run / "args.json"
    if not log.is_file() or not args.is_file():
        raise SystemExit(f"{run}: no log.jsonl and args.json; give the folder of a run of train.py")
    lines = files.read_text(log).split("\n")[:-1]
    rows = [files.parse_json(line, f"{log}:{n}") for n, line in enumerate(lines, 1)]
    if not rows:
        raise SystemExit(f"{log}: no complete step yet")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), float | int) for name in NEEDED):
            raise SystemExit(f"{log}:{n}: no row of a run of train.py, which has {', '.join(sorted(NEEDED))}")
    by_step = {row["step"]: row for row in rows}
    beta = files.read_json(args, dict).get("beta")
    if not isinstance(beta, float | int) or beta <= 0:
        raise SystemExit(f"{args}: beta is {beta!r}; it is not as train.py wrote it")
    return list(by_step.values()), beta


def smooth(values: list[float]) -> list[float]:
    """The mean of the last twentieth of the run at each step, at most what there is."""
    window = max(1, len(values) // 20)
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [mean(part) for part in parts]


def draw(runs: list[Path], file: Path):
    """The four panels and a legend, as a file; each run pale, and its moving mean. Returns the figure."""
    logs = {run: read_log(run) for run in runs}
    figure = plotting.new_figure(file, width=12.0, height=6.5)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        plotting.clean(axes)
        for i, (run, (rows, beta)) in enumerate(logs.items()):
            steps = [row["step"] for row in rows]
            values = [panel.value(row, beta) for row in rows]
            if None in values:
                continue  # an objective without m_l has no image margin
            axes.plot(steps, values, color=f"C{i}", alpha=0.25)
            axes.plot(steps, smooth(values), color=f"C{i}", linewidth=2, label=str(run))
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(panel.unit)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    plotting.save(figure, file, dpi=150)
    return figure


def main(argv=None) -> None:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    p.add_argument("--table", action="store_true", help="print the benchmarks' results beside the paper's")
    p.add_argument("--curves", type=Path, help="file for the picture of the training curves: .png, .svg, .pdf")
    args = p.parse_args(argv)
    if not args.table and not args.curves:
        p.error("give --table, --curves FILE or both")
    if args.curves:
        draw(args.runs, args.curves)
        print(f"{args.curves}: training curves of {count(len(args.runs), 'run')}, by optimiser step")
    if args.table:
        print(table(args.runs))


if __name__ == "__main__":
    main()
