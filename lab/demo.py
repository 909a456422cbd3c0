"""The demo: `python -m lab.demo`."""

import argparse
import re
import time
from pathlib import Path

import torch

import toy
import train
from external.files import write_json

# ---- runs ----------------------------------------------------------------------------------------------------------

DPO = dict(recipe="dpo", terms=["dpo"])  # what differs from mDPO
ROWS = {"DPO": DPO, "DPO (No Image)": DPO | dict(recipe="dpo-no-image"), "mDPO": {}}
CONTROLS = {
    "mDPO -conditional": dict(terms=["dpo", "ancpo"]),
    "mDPO -anchored": dict(terms=["dpo", "copo"]),
    "mDPO, m_l = m_w": dict(rejected_image="same"),
    # -log sigma(log pi / pi_ref - 100) is 100 + log pi_ref - log pi: maximum likelihood of y_w in the same loop
    "SFT on y_w": dict(terms=["ancpo"], beta=1.0, delta=100.0),
}


def run_rows(args: argparse.Namespace, world: Path, rows: dict[str, dict]) -> dict[str, dict]:
    """Trains and scores each row, args with its changes, beside the base; writes table.json and captions.png."""
    runs = {}
    for name, changes in rows.items():
        print(f"\n{name}")
        folder = world / re.sub(r"\W+", "-", name.lower()).strip("-")
        own = dict(weights=world / "base", data=world / "pairs" / "train.jsonl", out=folder)
        runs[name] = train.train(argparse.Namespace(**vars(args) | own | changes))
    return toy.score_rows(world, runs, world, args.seed, hidden=CONTROLS)


def main(argv=None) -> None:
    """The demo; with --study all rows and controls for each seed: study.json, and a folder like the demo's per seed."""
    torch.set_num_threads(1)  # models this small gain little from a second, and waiting for a shared core costs minutes
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--study", action="store_true", help="all rows with their controls, several seeds")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--style-share", type=float, default=1.0, help="s: how often the judge goes by style")
    p.add_argument("--out", type=Path, help="folder of the results (default runs/toy-demo-SEED)")
    args, tables, start = p.parse_args(argv), [], time.perf_counter()
    for seed in args.seeds:
        folder = (args.out / f"seed-{seed}" if args.study else args.out) or Path("runs") / f"toy-demo-{seed}"
        if not args.study and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"{folder}: not empty. Give another --out, or remove it; a run never overwrites another.")
        world = toy.make_world(folder, seed, args.style_share)
        run_args = train.parse_args(["--base", "toy", "--seed", str(seed)])
        tables.append(run_rows(run_args, world, ROWS | CONTROLS if args.study else ROWS))
    if args.study:
        write_json(args.out / "study.json", {"seeds": args.seeds, "style_share": args.style_share, "tables": tables})
        toy.print_table(tables)
    else:
        print(f"{folder}: table.json, captions.png, a run folder per recipe; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
