"""The folder of a run: args.json, log.jsonl, checkpoints, adapters; and the line on the screen.

A run that was stopped, by a signal, a full disk or a power cut, is resumed by the same command and --resume: from its
last whole checkpoint (engine/state.py), with a log that has each step once.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from data import Example, PairData
from engine import state
from engine.card import model_card
from engine.distributed import World
from engine.memory import Room, peak_gib
from external import files
from external.progress import progress
from external.terminal import count
from external.tracking import tracker
from lora import lora_modules

HEADER = f"{'step':>11} |   loss |    dpo    copo   ancpo |  margin   image |  acc |      lr | gnorm | pairs/s |   GiB"
SAVE_SECONDS = 600  # between checkpoints, where --save-every does not say
SPLIT = "micro_batch tokens_per_batch checkpointing".split()  # how a step is split: the same numbers but rounded
# what may differ when a run is resumed
FREE = SPLIT + "workers out resume save_every track command made weights vision_weights left_out".split()


# ---- the folder ----------------------------------------------------------------------------------------------------


def probe(folder: Path, resume: bool) -> None:
    """SystemExit if a run in this folder could not begin, or be resumed; nothing is written."""
    try:
        begun = (folder / "args.json").exists()
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as e:  # a name that is too long, a folder that may not be looked into
        raise SystemExit(f"{folder}: {e.strerror}. Give another --out.") from None
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise SystemExit(f"{folder}: is a file, or a link to nothing. Give another --out.")
    if resume and not begun:
        raise SystemExit(f"{folder}: no run to resume (no args.json in it). Leave --resume out to begin one.")
    if begun and not resume:
        raise SystemExit(f"{folder}: a run was begun here. Resume it with --resume, or give another --out.")
    if not begun and found - {".lock", "args.json.part"}:  # these two may be left of a run killed at its very start
        raise SystemExit(f"{folder}: not empty. Give another --out, or remove it; a run never overwrites another.")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SystemExit(f"{folder}: {nearest} is not a writable folder. Give another --out.")


def lock(folder: Path) -> FileLock:
    """The run folder as ours alone, until this process ends. SystemExit if another run is in it."""
    held = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"{folder}: another process is training in this folder. Give another --out.") from None
    except OSError as e:
        raise SystemExit(f"{folder}: cannot be written ({e.strerror}). Give another --out.") from None
    return held


def compare_settings(folder: Path, settings: dict) -> bool:
    """SystemExit naming each setting that differs from the begun run's. Whether its steps were split as now."""
    old = files.read_json(folder / "args.json", dict)
    now = json.loads(json.dumps(settings))  # tuples as lists, as the file has them
    differ = []
    for name in sorted((old.keys() | now.keys()) - set(FREE)):
        if old.get(name) != now.get(name):
            differ.append(f"{name} was {old.get(name)!r}, now {now.get(name)!r}")
    if differ:
        raise SystemExit(f"{folder}: begun with other settings: {'; '.join(differ)}. Resume with the same command.")
    return all(old.get(name) == now.get(name) for name in SPLIT)


def describe(args: dict, model: nn.Module, data: PairData) -> dict:
    """All that decides a run and made it, for args.json; prints what is trained on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    weight = model.lm_head.weight
    print(
        f"{count(len(data), 'pair')}; LoRA r {args['lora_r']} on {count(len(lora_modules(model)), 'linear')}, "
        f"{trained:,} of {total:,} parameters; {weight.device} {str(weight.dtype).removeprefix('torch.')}"
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in args.items()}
    settings["rejected_image"] = data.strategy
    settings["pairs"] = len(data)
    settings["left_out"] = data.left_out
    words = [word for word in sys.argv[1:] if word != "--resume"]
    settings["command"] = shlex.join(["python", "train.py", *words, "--resume"])  # what takes the run up again
    settings["data_sha256"] = data.digest()
    settings["made"] = environment(weight.device)
    return settings


def environment(device: torch.device) -> dict:
    """What the numbers were made with, for args.json."""
    root = Path(__file__).parents[1]
    commit = None
    if shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        commit = head.stdout.strip() if head.returncode == 0 else None
    packages = ("torch", "safetensors", "tokenizers", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "commit": commit,
    }


# ---- the run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Adds up a step's metrics, stops at numbers that are not finite, writes log, checkpoints and adapters."""

    folder: Path
    settings: dict  # of args.json
    plan: list  # of each step: the examples of this process, how many there are in all
    steps_per_epoch: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    room: Room
    reference: Callable | None  # the cached one, whose numbers are saved with the checkpoints
    save_adapter: Callable[[Path], None]
    base: str  # as the hub names it, for the model card
    world: World

    def __post_init__(self):
        """Begins the run or, with settings["resume"], takes it up after its last whole checkpoint, at `step`."""
        self.world.agree_on({name: value for name, value in self.settings.items() if name not in FREE})
        self.lock = lock(self.folder) if self.world.main else None
        self.step, self.steps = 0, len(self.plan)
        if self.settings["resume"]:
            same_split = compare_settings(self.folder, self.settings)
            room = self.room if same_split else None
            self.step = state.read_newest(self.folder, self.model, self.optimizer, room, self.reference)
            print(f"{self.folder}: resumed after {self.step} of {count(self.steps, 'step')}")
            self.world.wait()  # all ranks have read args.json before it is written anew
        self.stopped = 0  # the signal that asked for an end
        self.listen()
        self.clear()
        self.clock = self.saved = time.perf_counter()
        if self.world.main:
            with told(self.folder):
                files.write_json(self.folder / "args.json", self.settings)
                self.open_log()
            self.track = tracker(self.settings["track"], self.folder, self.settings)
            self.bar = progress(what=f"{self.settings['recipe']}, steps", total=self.steps, done=self.step)
        print(HEADER)

    def open_log(self) -> None:
        """log.jsonl with the rows of the steps that are done, and no others."""
        path = self.folder / "log.jsonl"
        rows = []
        if path.exists():
            complete = files.read_text(path).split("\n")[:-1]  # a last line may be torn
            for number, text in enumerate(complete, 1):
                row = files.parse_json(text, f"{path}:{number}")
                if not isinstance(row, dict) or type(row.get("step")) is not int or "rewards/margins" not in row:
                    raise SystemExit(f"{path}:{number}: no row of this log; remove the line")
                if row["step"] < self.step:
                    rows.append(row)
        if [row["step"] for row in rows] != list(range(self.step)):
            print(f"{path}: note: it has not one row for each of the {count(self.step, 'step')} that are done")
        files.write_rows(path, rows)
        self.log_file = open(path, "a", encoding="utf-8")

    # -- a step --

    def clear(self) -> None:
        """Forgets what the step has added up so far."""
        self.examples, self.sums = 0, defaultdict(float)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Metrics of a micro-batch, each (B,)."""
        for name, value in metrics.items():
            self.sums[name] += value.sum()
        self.examples += len(metrics["rewards/chosen"])

    def loss(self) -> float:
        """The sum of the terms, a mean over the step's examples."""
        return float(sum(value for name, value in self.sums.items() if name.startswith("losses/"))) / self.examples

    def stop_if_not_finite(self, step: int, grad_norm: Tensor, examples: list[Example]) -> None:
        """SystemExit, before the optimizer steps, on a loss or a gradient that is not a number; ids are kept."""
        loss = self.loss()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.close()
        ids = [e.pair.id for e in examples]
        found = {"step": step, "loss": str(loss), "grad_norm": str(float(grad_norm)), "examples": ids}
        files.write_json(self.folder / f"not-finite-{self.world.rank}.json", found)
        raise SystemExit(
            f"step {step}: loss {loss}, gradient norm {float(grad_norm)} for examples {ids}. Nothing was updated; the "
            f"checkpoints in {self.folder} are from before."
        )

    def log(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """One row of log.jsonl and one line on the screen, means over the step's examples; saves where it is time."""
        row = {"step": step, "epoch": step // self.steps_per_epoch, "loss": self.loss()}
        row |= {name: float(value) / self.examples for name, value in self.sums.items()}
        last, self.clock = self.clock, time.perf_counter()
        row["lr"] = lr
        row["grad_norm"] = float(grad_norm)
        row["pairs_per_s"] = self.examples / (self.clock - last)
        row["peak_gib"] = peak_gib(grad_norm.device)
        epoch_ends = (step + 1) % self.steps_per_epoch == 0
        if epoch_ends:
            self.world.end_epoch(self.model, self.reference)
        if self.world.main:
            self.bar.update()
            self.bar.write(line(row, self.steps))
            self.track(row)
            with told(self.folder):
                self.log_file.write(json.dumps(row) + "\n")
                self.log_file.flush()
                if epoch_ends:
                    self.save_adapter(self.folder / f"epoch-{row['epoch'] + 1}")
                if epoch_ends or self.stopped or self.is_time_to_save(step):
                    state.write_checkpoint(self.folder, step + 1, self.model, self.optimizer, self.room, self.reference)
                    self.saved = time.perf_counter()
        if self.stopped:
            self.end_early(step)

    def is_time_to_save(self, step: int) -> bool:
        if self.settings["save_every"]:
            return (step + 1) % self.settings["save_every"] == 0
        return time.perf_counter() - self.saved > SAVE_SECONDS

    # -- the end --

    def listen(self) -> None:
        """SIGTERM and Ctrl-C finish the step, save and end the run; a second Ctrl-C ends at once."""
        if threading.current_thread() is not threading.main_thread():
            return

        def note(number, frame) -> None:
            self.stopped = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print(f"{signal.Signals(number).name}: the step is finished and saved first; Ctrl-C ends at once")

        self.handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def end_early(self, step: int) -> None:
        self.close()
        print(f"{self.folder}: stopped after {step + 1} of {count(self.steps, 'step')}. Resume with")
        print(f"    {self.settings['command']}")
        raise SystemExit(128 + self.stopped)

    def close(self) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        if self.world.main:
            self.bar.close()
            self.log_file.close()
            self.lock.release()

    def finish(self) -> Path:
        """The last adapter; the run's folder."""
        if self.world.main:
            with told(self.folder):
                self.save_adapter(self.folder)
                rows = [json.loads(text) for text in (self.folder / "log.jsonl").read_text().splitlines()]
                files.write_text(self.folder / "README.md", model_card(self.base, self.settings, rows))
        self.close()
        print(f"{self.folder}: adapter_model.safetensors, adapter_config.json, README.md, args.json, log.jsonl")
        return self.folder


@contextmanager
def told(folder: Path):
    """Inside, a disk that is full or gone ends the run with a sentence."""
    try:
        yield
    except OSError as e:
        raise SystemExit(
            f"{e.filename or folder}: {e.strerror}. What was saved before is whole; when there is room, the same "
            "command with --resume takes the run up again."
        ) from None


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
