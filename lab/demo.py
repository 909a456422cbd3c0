"""The demo: a small base, DPO, DPO (No Image) and mDPO in a few minutes on one core, then a table and two pictures.

    python -m lab.demo [--seed 0] [--out DIR]

What is in the folder already is used: a second call only scores and draws again.
"""

import argparse
import time
from pathlib import Path

import torch

import toy
from external.files import read_json
from external.flags import whole
from lab import figure, plotting, tables

ROWS = ("DPO", "DPO (No Image)", "mDPO")


def strangers(folder: Path) -> list[Path]:
    """What a demo that was stopped early would not have left."""
    return [file for file in folder.glob("*") if file.name not in ("base", "pairs")]


def main(argv=None) -> None:
    torch.set_num_threads(1)  # models this small gain little from a second, and waiting for a shared core costs minutes
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seed", type=whole(0), default=0, help="of the scenes, the base, the pairs and the runs")
    p.add_argument("--out", type=Path, help="folder of the results (default runs/toy-demo-SEED)")
    args = p.parse_args(argv)
    start = time.perf_counter()
    out = args.out or Path("runs") / f"toy-demo-{args.seed}"
    picture = out / "judge.png"
    plotting.new_figure(picture, 1, 1)  # a missing matplotlib is told now, not after minutes
    if not (out / "world.json").is_file() and strangers(out):
        raise SystemExit(f"{out}: not empty, and not a demo of before. Give another --out, or remove it.")
    world = toy.make_world(out, args.seed)
    runs = {}
    for name in ROWS:
        print(f"\n{name}")
        runs[name] = tables.train_row(world, name, args.seed)
    table = toy.score_rows(world, runs, world, args.seed)
    figure.judge(picture, read_json(figure.STUDY), table, f"this run, seed {args.seed}")
    print(f"{out}: table.json, captions.png, judge.png, a folder per recipe; {time.perf_counter() - start:.0f} s")
    print("Remove the folder to start afresh, or give --seed or --out for another world.")


if __name__ == "__main__":
    main()
