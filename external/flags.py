"""Types for argparse: what a flag's text must be, so that a wrong one ends a command before anything is loaded."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from external.terminal import printable

FOREIGN = {  # flags of TRL and LLaMA-Factory, and what says the same here; differences stand in docs/flags.md
    "--model_name_or_path": "--base",
    "--dataset_name": "--data",
    "--dataset": "--data",
    "--dataset_dir": "--data",
    "--media_dir": "--image-root",
    "--output_dir": "--out",
    "--per_device_train_batch_size": "--batch and --micro-batch",
    "--gradient_accumulation_steps": "--batch and --micro-batch",
    "--learning_rate": "--lr",
    "--num_train_epochs": "--epochs",
    "--max_steps": "--max-steps",
    "--warmup_ratio": "--warmup",
    "--warmup_steps": "--warmup",
    "--weight_decay": "--weight-decay",
    "--adam_beta2": "--adam-beta2",
    "--max_grad_norm": "--clip",
    "--loss_type": "--recipe and --terms",
    "--pref_loss": "--recipe and --terms",
    "--pref_beta": "--beta",
    "--lora_r": "--lora-r",
    "--lora_rank": "--lora-r",
    "--lora_alpha": "--lora-alpha",
    "--max_length": "--max-length",
    "--cutoff_len": "--max-length",
    "--precompute_ref_log_probs": "--reference cached",
    "--padding_free": "--pack",
    "--gradient_checkpointing": "--checkpointing",
    "--bf16": "--dtype bfloat16",
    "--dataloader_num_workers": "--workers",
    "--save_steps": "--save-every",
    "--resume_from_checkpoint": "--resume",
    "--report_to": "--track",
    "--load_in_4bit": "--quant nf4",
    "--load_in_8bit": "--quant int8",
    "--quantization_bit": "--quant",
}


def refuse_words(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Ends the command where a flag is another trainer's name for one of ours, where a value is empty, as that of an
    unset shell variable is, or no text; `argv` as argparse takes it."""
    words = sys.argv[1:] if argv is None else argv
    for before, word in zip(["", *words], words, strict=False):
        flag, has_value, value = word.partition("=")
        if not word or (has_value and not value):
            parser.error(f"{flag or before} is empty; a shell variable that is not set?")
        if (value or word).startswith("~"):
            parser.error(
                f"{printable(word)}: the shell has left the ~ in it; write the folder in full, or --flag ~/..."
            )
        if any("\ud800" <= c <= "\udfff" for c in word):  # how Python spells bytes that are not UTF-8
            parser.error(f"{printable(word)}: not UTF-8; rename it")
        ours = FOREIGN.get(f"--{flag[2:].replace('-', '_')}")  # they take both spellings
        if flag.startswith("--") and ours not in (None, flag):
            parser.error(f"{flag}: here {ours} (docs/flags.md)")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the default of each flag that has one, written as the flag takes it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {','.join(action.default)})"
        return super()._get_help_string(action)


def given(text: str) -> str:
    """A text that is not empty, as that of an unset shell variable is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; a shell variable that is not set?")
    return text


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number {bounds(low, high)}")
        return value

    return convert


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A finite number from `low` to `high`; `above`: greater than `low`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = low < value <= high if above else low <= value <= high
        if not inside or math.isinf(value):
            wanted = bounds(low, high, above)
            raise argparse.ArgumentTypeError(f"{text}: must be a number {wanted}")
        return value

    return convert


def bounds(low: float, high: float, above: bool = False) -> str:
    if low == -math.inf:
        return "that is finite"
    if high == math.inf:
        return f"above {low:g}" if above else f"of at least {low:g}"
    return f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"


def file_ending(*endings: str) -> Callable[[str], Path]:
    """The name of a file with one of these endings: the kind that is written into it."""

    def convert(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text}: must be the name of a {' or '.join(endings)} file")
        return Path(text)

    return convert


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Names out of `known`, separated by commas."""

    def convert(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
        return given

    return convert


ALL_LAYERS = 10**6  # more than any model has


def layer_count(text: str) -> int:
    """How many layers: none, full, or a number."""
    words = {"none": 0, "full": ALL_LAYERS}
    if text not in words and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: none, full or a number of layers")
    return words[text] if text in words else int(text)
