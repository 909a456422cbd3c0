"""The toy study as pictures: what the judge rewards decides whether DPO learns to look; mDPO looks either way.

`judge` is the README's figure: five frozen seeds (assets/toy_study.json, as `python -m lab.tables` wrote it), to which
the demo adds its own. `chosen` shows what becomes of log pi(y_w) in training (mDPO 3.2). A study is {"seeds": [...],
"rows": {row: {score: [one value per seed]}}, "chosen_by_step": {row: [mean over seeds, in nats]}}.
"""

from pathlib import Path
from statistics import mean

from lab import plotting

STUDY = Path(__file__).parent.parent / "assets" / "toy_study.json"
SHARES = (0.0, 0.5, 1.0)  # s: how often the judge goes by style
LINES = {  # row at s = 1 -> colour, marker: told apart by the colour-blind, and in grey
    "base": ("#6e7781", "s"),
    "DPO": ("#d55e00", "o"),
    "mDPO": ("#0072b2", "D"),
}
PANELS = {  # score -> title
    "CHAIR_s": "captions that invent an object, %  (lower is better)",
    "d'": "grounding, d'  (higher is better)",
}
CHOSEN = {"DPO": "-", "mDPO": "-", "mDPO -anchored": "--", "mDPO -conditional": ":"}  # row -> line
GREY = "#6e7781"


def row_at(name: str, s: float) -> str:
    """The study's row of a line at s; the base has no judge."""
    if name == "base" or s == 1.0:
        return name
    return f"{name}, s = {s:g}"


def judge(file: Path, study: dict, own: dict[str, dict[str, float]] | None = None, label: str = ""):
    """Grounding against s; own: the demo's table, drawn beside s = 1. Returns the figure."""
    figure = plotting.new_figure(file, width=9.0, height=3.6)
    panels = figure.subplots(1, len(PANELS))
    for axes, (score, title) in zip(panels, PANELS.items(), strict=True):
        plotting.clean(axes)
        for name in LINES:
            values = [study["rows"][row_at(name, s)][score] for s in SHARES]  # per s, one per seed
            draw_line(axes, name, values)
            if own:
                colour, marker = LINES[name]
                axes.scatter([1.06], [own[name][score]], color="white", edgecolor=colour, marker=marker, zorder=3)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks(SHARES, ["never", "half the time", "always"])
        axes.set_xlim(-0.08, 1.14)
        axes.set_xlabel("how often the judge goes by style, not by what is there")
    axes.legend(frameon=False)
    seeds = len(study["seeds"])
    note = f"Lines: means of {seeds} seeds; bands: from the lowest to the highest of them."
    figure.supxlabel(f"{note} Hollow: {label}." if own else note, fontsize=9, color=GREY)
    plotting.save(figure, file, dpi=200)
    return figure


def draw_line(axes, name: str, values: list[list[float]]) -> None:
    colour, marker = LINES[name]
    means = [mean(of_seeds) for of_seeds in values]
    lowest = [min(of_seeds) for of_seeds in values]
    highest = [max(of_seeds) for of_seeds in values]
    axes.plot(SHARES, means, color=colour, marker=marker, label=name, linewidth=2)
    axes.fill_between(SHARES, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def chosen(file: Path, study: dict):
    """log pi / pi_ref of y_w by optimiser step, mean over seeds. Returns the figure."""
    figure = plotting.new_figure(file, width=6.0, height=3.6)
    axes = figure.subplots()
    plotting.clean(axes)
    for name, line in CHOSEN.items():
        colour, _ = LINES["DPO" if name == "DPO" else "mDPO"]
        axes.plot(study["chosen_by_step"][name], line, color=colour, label=name)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title("log π/π_ref of the chosen answer, nats", loc="left", fontsize=11)
    axes.set_xlabel("optimiser step")
    axes.legend(frameon=False)
    plotting.save(figure, file, dpi=200)
    return figure
