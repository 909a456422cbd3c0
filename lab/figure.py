"""The README's figure: what the judge rewards decides whether DPO learns to look; mDPO looks either way.

Five frozen seeds (assets/toy_study.json, written by `python -m lab.tables`), mean and each seed; the demo adds its own
seed to the same axes.
"""

from pathlib import Path
from statistics import mean

from lab import plotting

STUDY = Path(__file__).parent.parent / "assets" / "toy_study.json"
SHARES = (0.0, 0.5, 1.0)  # s: how often the judge goes by style
LINES = {  # row at s = 1 -> colour, marker: apart for the colour-blind, and in grey
    "base": ("#6e7781", "s"),
    "DPO": ("#d55e00", "o"),
    "mDPO": ("#0072b2", "D"),
}
PANELS = {  # score -> title
    "CHAIR_s": "captions that invent an object, %",
    "d'": "grounding, d'",
}


def row_at(name: str, s: float) -> str:
    """The study's row of a line at s; the base has no judge."""
    if name == "base" or s == 1.0:
        return name
    return f"{name}, s = {s:g}"


def draw(file: Path, study: dict, own: dict[str, dict[str, float]] | None = None, label: str = ""):
    """study: {"seeds", "rows": {row: {score: [one value per seed]}}}. own: the demo's table, drawn at s = 1.

    Returns the figure."""
    figure = plotting.new_figure(file, width=9.0, height=3.6)
    for axes, (score, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        plotting.clean(axes)
        for name, (colour, marker) in LINES.items():
            values = [study["rows"][row_at(name, s)][score] for s in SHARES]  # per s, one per seed
            axes.plot(SHARES, [mean(v) for v in values], color=colour, marker=marker, label=name, linewidth=2)
            axes.fill_between(SHARES, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
            if own:
                axes.scatter([1.06], [own[name][score]], color="white", edgecolor=colour, marker=marker, zorder=3)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks(SHARES, ["never", "half the time", "always"])
        axes.set_xlim(-0.08, 1.14)
        axes.set_xlabel("how often the judge of the pairs goes by style")
    axes.legend(frameon=False)
    seeds = len(study["seeds"])
    note = f"Lines: means of {seeds} seeds; bands: all {seeds}."
    figure.supxlabel(f"{note} Hollow: {label}." if own else note, fontsize=9, color="#6e7781")
    figure.savefig(file, dpi=200)
    return figure
