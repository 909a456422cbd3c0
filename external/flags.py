"""Types for argparse: what a flag's text must be, so that a wrong one ends a command before anything is loaded."""

import argparse
import math
from collections.abc import Callable


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
            wanted = f"above {low:g}" if above else bounds(low, high)
            raise argparse.ArgumentTypeError(f"{text}: must be a number {wanted}")
        return value

    return convert


def bounds(low: float, high: float) -> str:
    return f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Names out of `known`, separated by commas."""

    def convert(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
        return given

    return convert
