"""Runs side by side: the benchmarks' results as in mDPO's Table 1, and the curves of their training as a picture.

    python -m lab.report runs/a runs/b --table                  a Markdown table on the terminal
    python -m lab.report runs/a runs/b --curves curves.svg      loss, margins, and what became of the chosen answers

A run is a folder with train.py's log.jsonl and args.json, and the scorers' results as `--json` wrote them:
eval_mmhal.json, eval_chair.json (--protocol objhal), eval_amber.json, eval_pope.json. What is not there is a dash.

Deviations from Table 1: POPE is added, which mDPO does not report; CHAIR_s is `chair_s_refine` (answers that invent an
object / answers that name one), which is what the benchmark publishes; the paper does not say which one it divides by.
"""

import argparse
import json
from collections.abc import Callable
from html import escape
from pathlib import Path

from external import files

COLUMNS = [  # heading, file, metric, factor, decimals; an arrow says which way is better
    ("MMHal Score ↑", "eval_mmhal.json", "score", 1, 2),
    ("MMHal HalRate ↓", "eval_mmhal.json", "hallucination_rate", 1, 2),
    ("ObjHal CHAIRs ↓", "eval_chair.json", "chair_s_refine", 100, 1),
    ("ObjHal CHAIRi ↓", "eval_chair.json", "chair_i", 100, 1),
    ("AMBER CHAIR ↓", "eval_amber.json", "chair", 1, 1),
    ("AMBER Cover ↑", "eval_amber.json", "cover", 1, 1),
    ("AMBER HalRate ↓", "eval_amber.json", "hal", 1, 1),
    ("AMBER Cog ↓", "eval_amber.json", "cog", 1, 1),
    ("POPE Acc ↑", "eval_pope.json", "accuracy", 100, 1),
    ("POPE F1 ↑", "eval_pope.json", "f1", 100, 1),
]
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
    found = {name: files.read_json(run / name) for name in dict.fromkeys(c[1] for c in COLUMNS)
             if (run / name).is_file()}  # fmt: skip
    for name, result in found.items():
        if "metrics" not in result or "protocol" not in result:
            raise SystemExit(f"{run / name}: not the result of one answer file (a --compare result?); score it again")
    return found


def cells(found: dict[str, dict]) -> list[str]:
    row = []
    for _, file, metric, factor, decimals in COLUMNS:
        result = found.get(file, {"metrics": {}, "protocol": ""})
        # CHAIR 2018 is another benchmark: its own captions, words and denominator
        value = None if result["protocol"] == "CHAIR 2018" else result["metrics"].get(metric)
        row.append("-" if value is None else f"{value * factor:.{decimals}f}")
    return row


def notes(run: Path, found: dict[str, dict]) -> list[str]:
    """What decides whether a number may be compared: protocol, size, decoding, warnings."""
    lines = []
    for name, result in found.items():
        made = result["generation"] if isinstance(result["generation"], list) else [result["generation"]]
        how = sorted({json.dumps(g["decoding"]) + f", at most {g['max_new_tokens']} tokens, image {g['image_mode']}"
                      if g else "decoding not recorded" for g in made})  # fmt: skip
        lines.append(f"{run}, {name}: {result['protocol']}; n {result['n']}; {'; '.join(how)}")
        lines += [f"{run}, {name}: warning: {warning}" for warning in result["warnings"]]
    return lines


def table(runs: list[Path]) -> str:
    found = {run: results(run) for run in runs}
    rows = [["run", *(c[0] for c in COLUMNS)]] + [[str(run), *cells(f)] for run, f in found.items()]
    rows += [[f"{name} (the paper's)", *numbers.split(), "-", "-"] for name, numbers in PAPER]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    below = [note for run, f in found.items() for note in notes(run, f)]
    return "\n".join(lines) + "\n\n" + "".join(f"- {note}\n" for note in below)


# ---- curves --------------------------------------------------------------------------------------------------------

PANELS: list[tuple[str, Callable[[dict, float], float]]] = [  # title, what of a log row (and beta)
    ("loss", lambda row, beta: row["loss"]),
    ("reward margin, chosen − rejected", lambda row, beta: row["rewards/margins"]),
    ("log π/π_ref of the chosen answer, nats", lambda row, beta: row["rewards/chosen"] / beta),
]
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
W, H, LEFT, TOP, GAP = 330, 220, 60, 30, 75  # of a panel, in pixels; its margins


def read_log(run: Path) -> tuple[list[dict], float]:
    """Rows of log.jsonl and beta. A last line that is being written is left out; a step logged twice counts once."""
    log, args = run / "log.jsonl", run / "args.json"
    if not log.is_file() or not args.is_file():
        raise SystemExit(f"{run}: no log.jsonl and args.json; give the folder of a run of train.py")
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [files.parse_json(line, f"{log}:{n}") for n, line in enumerate(lines, 1)]
    if not rows:
        raise SystemExit(f"{log}: no complete step yet")
    return list({row["step"]: row for row in rows}.values()), files.read_json(args)["beta"]


def smooth(values: list[float]) -> list[float]:
    """The mean of the last twentieth of the run at each step, at most what there is."""
    window = max(1, len(values) // 20)
    return [sum(v := values[max(0, i + 1 - window) : i + 1]) / len(v) for i in range(len(values))]


def panel(title: str, curves: list[tuple[list[int], list[float]]], x0: int) -> str:
    """One plot: each run's values, pale, and their moving mean."""
    last = max(max(steps) for steps, _ in curves) or 1
    low, high = min(min(v) for _, v in curves), max(max(v) for _, v in curves)
    high = high if high > low else low + 1
    out = [f'<text x="{x0}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        value, y = low + (high - low) * i / 4, TOP + H - H * i / 4
        out.append(f'<path d="M{x0} {y:.0f}h{W}" stroke="#ddd"/>')
        out.append(f'<text x="{x0 - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.3g}</text>')
        out.append(f'<text x="{x0 + W * i / 4:.0f}" y="{TOP + H + 18}" text-anchor="middle">{last * i // 4}</text>')
    if low < 0 < high:
        out.append(f'<path d="M{x0} {TOP + H + H * low / (high - low):.1f}h{W}" stroke="#888" stroke-dasharray="4"/>')
    for (steps, values), colour in zip(curves, COLOURS, strict=False):
        for line, style in ((values, 'opacity="0.25"'), (smooth(values), 'stroke-width="2"')):
            points = " ".join(f"{x0 + W * s / last:.1f},{TOP + H - H * (v - low) / (high - low):.1f}"
                              for s, v in zip(steps, line, strict=True))  # fmt: skip
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
    return "\n".join(out)


def draw(runs: list[Path]) -> str:
    """The three panels and a legend as SVG."""
    if len(runs) > len(COLOURS):
        raise SystemExit(f"{len(runs)} runs: at most {len(COLOURS)} can be told apart in one picture")
    logs = [read_log(run) for run in runs]
    width, height = len(PANELS) * (W + GAP) + LEFT, TOP + H + 40 + 18 * len(runs)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
           'font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for i, (title, value) in enumerate(PANELS):
        curves = [([row["step"] for row in log], [value(row, beta) for row in log]) for log, beta in logs]
        out.append(panel(title, curves, LEFT + i * (W + GAP)))
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        y = TOP + H + 40 + 18 * i
        out.append(f'<path d="M{LEFT} {y}h30" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{LEFT + 38}" y="{y + 4}">{escape(str(run))}</text>')
    return "\n".join([*out, "</svg>\n"])


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    p.add_argument("--table", action="store_true", help="print the benchmarks' results beside the paper's")
    p.add_argument("--curves", type=Path, help="file for the picture of the training curves (SVG)")
    args = p.parse_args(argv)
    if not args.table and not args.curves:
        p.error("give --table, --curves FILE or both")
    if args.curves:
        args.curves.write_text(draw(args.runs), encoding="utf-8")
        print(f"{args.curves}: training curves of {len(args.runs)} runs, by optimiser step")
    if args.table:
        print(table(args.runs))


if __name__ == "__main__":
    main()
