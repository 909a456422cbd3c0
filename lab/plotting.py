"""Matplotlib, asked for only where a picture is drawn: an optional package, and a user's error where it is missing."""

from pathlib import Path

from external import files


def new_figure(file: Path, width: float, height: float):
    """An empty figure of this size in inches, for a file of a kind that matplotlib writes. SystemExit where not."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SystemExit(
            f"{file}: drawing needs matplotlib, which is not installed: python -m pip install 'matplotlib>=3.8'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in known:
        choices = ", ".join(known)
        raise SystemExit(f"{file}: no picture can be written with the ending {file.suffix!r}; known: {choices}")
    return figure


def clean(axes) -> None:
    """Only the lines that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure, file: Path, dpi: int) -> None:
    """The figure as a file of the kind that its ending says, whole or not at all."""
    with files.whole(file) as part:
        figure.savefig(part, dpi=dpi, format=file.suffix[1:].lower())
