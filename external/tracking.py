"""Where people look at their runs: the rows of log.jsonl, sent to W&B or TensorBoard when --track asks for it."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

KINDS = ("wandb", "tensorboard")


def installed(kind: str) -> str:
    """The kind, for argparse: a library that is missing is told before anything is loaded."""
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{kind}: choose from {', '.join(KINDS)}")
    if not find_spec(kind):
        raise argparse.ArgumentTypeError(f"{kind} is not installed; run `pip install {kind}`")
    return kind


def tracker(kind: str | None, folder: Path, settings: dict) -> Callable[[dict], None]:
    """A function that takes the rows of the log. SystemExit where W&B will not begin a run."""
    if kind == "wandb":
        import wandb

        try:
            run = wandb.init(project="nanomdpo", name=folder.name, dir=str(folder), config=settings, resume="allow")
        except wandb.Error as error:  # no key and nobody to ask, or no network
            raise SystemExit(f"--track wandb: {error}. WANDB_MODE=offline keeps the log here.") from None
        return lambda row: run.log(row, step=row["step"])
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()]
    return lambda row: None
