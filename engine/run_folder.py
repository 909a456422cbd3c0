"""The folder of a run and the lines of its log."""

import argparse
from pathlib import Path

# ---- set-up --------------------------------------------------------------------------------------------------------


def new_run_folder(args: argparse.Namespace) -> Path:
    """args.out, or runs/BASE-RECIPE-SEED; created. SystemExit if something is already in it."""
    out = args.out or Path("runs") / f"{Path(args.base).name}-{args.recipe}-{args.seed}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out}: not empty. Give another --out, or remove it; a run never overwrites another.")
    out.mkdir(parents=True, exist_ok=True)
    return out


LINE = ("step", "loss", "losses/dpo", "losses/copo", "losses/ancpo", "rewards/margins", "rewards/image_margins",
        "rewards/accuracies", "lr", "grad_norm", "pairs_per_s", "peak_gib")  # fmt: skip
HEADER = f"{'step':>11} |   loss |    dpo    copo   ancpo | margin  image |  acc |      lr | gnorm | pairs/s |   GiB"


def line(row: dict, steps: int) -> str:
    """One log row, fixed width; a term that is off shows as a dash."""
    v = [row.get(key) for key in LINE]
    t = [f"{x:7.4f}" if x is not None else "      -" for x in v[2:7]]
    return (f"{v[0]:>5}/{steps:<5} | {v[1]:6.4f} | {t[0]} {t[1]} {t[2]} | {t[3][1:]} {t[4][1:]} | {v[7]:4.2f} | "
            f"{v[8]:.1e} | {v[9]:5.2f} | {v[10]:7.2f} | {v[11]:5.2f}")  # fmt: skip
