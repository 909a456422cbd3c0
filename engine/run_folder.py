"""The folder of a run: args.json, log.jsonl, an adapter per epoch and the last one; and the line on the screen."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data import Example
from engine.memory import peak_gib
from external import files

HEADER = f"{'step':>11} |   loss |    dpo    copo   ancpo |  margin   image |  acc |      lr | gnorm | pairs/s |   GiB"


def new_folder(folder: Path) -> Path:
    """The folder, created. SystemExit if something is already in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder}: not empty. Give another --out, or remove it; a run never overwrites another.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Run:
    """Adds up a step's metrics, stops at numbers that are not finite, writes the log and the adapter."""

    def __init__(self, folder: Path, settings: dict, steps: int, steps_per_epoch: int, save: Callable[[Path], None]):
        """Writes args.json and opens the log. `save(folder)` writes the adapter there."""
        self.folder, self.steps, self.steps_per_epoch, self.save = folder, steps, steps_per_epoch, save
        files.write_json(folder / "args.json", settings)
        self.log_file = open(folder / "log.jsonl", "w", encoding="utf-8")
        self.bar = tqdm(total=steps, desc=settings["recipe"], disable=None)
        self.clock = time.perf_counter()
        self.clear()
        print(HEADER)

    def clear(self) -> None:
        """Forgets what the step has added up so far."""
        self.examples, self.sums = 0, defaultdict(float)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Metrics of a micro-batch, each (B,)."""
        for name, value in metrics.items():
            self.sums[name] += value.sum()
        self.examples += len(metrics["rewards/chosen"])

    def stop_if_not_finite(self, step: int, grad_norm: Tensor, examples: list[Example]) -> None:
        """SystemExit, before the optimizer steps, on a loss or a gradient that is not a number."""
        loss = self.loss()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            ids = [e.pair.id for e in examples]
            raise SystemExit(f"step {step}: loss {loss}, gradient norm {float(grad_norm)} for examples {ids}")

    def loss(self) -> float:
        """The sum of the terms, a mean over the step's examples."""
        return float(sum(value for name, value in self.sums.items() if name.startswith("losses/"))) / self.examples

    def log(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """One row of log.jsonl and one line on the screen, means over the step's examples; an epoch's adapter."""
        row = {"step": step, "epoch": step // self.steps_per_epoch, "loss": self.loss()}
        row |= {name: float(value) / self.examples for name, value in self.sums.items()}
        last, self.clock = self.clock, time.perf_counter()
        row["lr"] = lr
        row["grad_norm"] = float(grad_norm)
        row["pairs_per_s"] = self.examples / (self.clock - last)
        row["peak_gib"] = peak_gib(grad_norm.device)
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        self.bar.update()
        self.bar.write(line(row, self.steps))
        if (step + 1) % self.steps_per_epoch == 0:
            self.save(self.folder / f"epoch-{row['epoch'] + 1}")

    def finish(self) -> Path:
        """The last adapter; the run's folder."""
        self.log_file.close()
        self.bar.close()
        self.save(self.folder)
        print(f"{self.folder}: adapter_model.safetensors, adapter_config.json, args.json, log.jsonl")
        return self.folder


def line(row: dict, steps: int) -> str:
    """One log row, fixed width; a term that is off shows as a dash."""

    def shown(name: str, width: int, decimals: int = 4) -> str:
        return f"{row[name]:{width}.{decimals}f}" if name in row else "-".rjust(width)

    terms = " ".join(shown(f"losses/{name}", 7) for name in ("dpo", "copo", "ancpo"))
    margins = f"{shown('rewards/margins', 7)} {shown('rewards/image_margins', 7)}"
    return (
        f"{row['step']:>5}/{steps:<5} | {row['loss']:6.4f} | {terms} | {margins} | {row['rewards/accuracies']:4.2f} | "
        f"{row['lr']:.1e} | {row['grad_norm']:5.2f} | {row['pairs_per_s']:7.2f} | {row['peak_gib']:5.2f}"
    )
