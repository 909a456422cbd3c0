"""Where people look at their runs: the rows of log.jsonl, sent to W&B or TensorBoard when --track asks for it."""

from collections.abc import Callable
from pathlib import Path

KINDS = ("wandb", "tensorboard")


def tracker(kind: str | None, folder: Path, settings: dict) -> Callable[[dict], None]:
    """A function that takes the rows of the log. SystemExit where the library is not installed."""
    try:
        if kind == "wandb":
            import wandb

            run = wandb.init(project="nanomdpo", name=folder.name, dir=str(folder), config=settings, resume="allow")
            return lambda row: run.log(row, step=row["step"])
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            return lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()]
    except ImportError as e:
        raise SystemExit(f"--track {kind}: {e.name or kind} is not installed; run `pip install {kind}`") from None
    return lambda row: None
