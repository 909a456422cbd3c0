"""What the papers' tables say, and whether it holds in the toy world: paired over seeds, with plain sentences.

A seed's rows share scenes, base, pairs and test scenes, so rows are compared within a seed; the interval is Student's t
over the seeds' differences, 95 %. A claim holds where the interval lies on its side of 0, fails where it lies on the
other, and cannot be told where it holds 0. Nothing is corrected for the number of claims.

The papers' numbers are of Bunny-v1.0-3B (mDPO) and LLaVA-1.5-7B (PDS-DPO) on Object HalBench: beside ours, for the
order of the rows, not for their values.
"""

from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

from lab.report import markdown

# Student's t, 97.5 %, by degrees of freedom
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MOST_SEEDS = max(T_95) + 1
SCORES = ("CHAIR_s", "CHAIR_i", "coverage", "CHi@85", "AUC", "d'", "chosen", "well-formed")
Study = dict[str, dict[str, list[float]]]  # row -> score -> one value per seed


class Claim(NamedTuple):
    sentence: str
    row: str
    against: str | None  # None: against 0
    score: str
    sign: int  # 1: higher than the other, -1: lower, 0: no difference


class Table(NamedTuple):
    title: str
    rows: dict[str, str]  # row -> the paper's CHAIR_s and CHAIR_i
    claims: list[Claim]


TABLES = [
    Table(
        "mDPO, Table 1: the methods",
        {"base": "43.0 / 8.9", "DPO": "44.3 / 7.6", "mDPO": "27.0 / 4.6"},
        [
            Claim("mDPO invents less than DPO", "mDPO", "DPO", "CHAIR_s", -1),
            Claim("mDPO invents less than DPO where both say as much", "mDPO", "DPO", "CHi@85", -1),
            Claim("mDPO tells presence better than DPO", "mDPO", "DPO", "AUC", 1),
            Claim("mDPO names fewer of the true objects than the base", "mDPO", "base", "coverage", -1),
            Claim("DPO does not reduce CHAIR_s", "DPO", "base", "CHAIR_s", 0),
        ],
    ),
    Table(
        "mDPO, Figure 1: DPO does as well without pictures",
        {"DPO": "-", "DPO (No Image)": "-"},
        [
            Claim("DPO and DPO (No Image) are alike", "DPO", "DPO (No Image)", "CHAIR_s", 0),
            Claim("DPO and DPO (No Image) are alike", "DPO", "DPO (No Image)", "d'", 0),
        ],
    ),
    Table(
        "mDPO, Table 2: both parts matter, CoPO more",
        {
            "mDPO": "27.0 / 4.6",
            "mDPO -conditional": "40.3 / 7.1",
            "mDPO -anchored": "34.3 / 5.7",
            "DPO": "44.3 / 7.6",
        },
        [
            Claim("Without CoPO more is invented", "mDPO -conditional", "mDPO", "CHAIR_s", 1),
            Claim("Without CoPO more is invented where both say as much", "mDPO -conditional", "mDPO", "CHi@85", 1),
            Claim("Without AncPO more is invented", "mDPO -anchored", "mDPO", "CHAIR_s", 1),
            Claim("Without AncPO more is invented where both say as much", "mDPO -anchored", "mDPO", "CHi@85", 1),
            Claim("Without CoPO more is lost than without AncPO", "mDPO -conditional", "mDPO -anchored", "CHi@85", 1),
            Claim("Without AncPO less of what is there is named", "mDPO -anchored", "mDPO", "coverage", -1),
        ],
    ),
    Table(
        "Controls: what else could explain it",
        {"mDPO": "-", "SFT on y_w": "-", "mDPO, m_l = m_w": "-", "mDPO, mentioned objects erased": "-"},
        [
            Claim("Imitating y_w is not enough", "SFT on y_w", "mDPO", "CHi@85", 1),
            Claim(
                "m_l = m_w teaches nothing that DPO with the anchor does not",
                "mDPO, m_l = m_w",
                "mDPO -conditional",
                "CHAIR_s",
                0,
            ),
            Claim(
                "A crop is no shortcut: erasing the mentioned objects does the same",
                "mDPO, mentioned objects erased",
                "mDPO",
                "CHi@85",
                0,
            ),
        ],
    ),
    Table(
        "mDPO, Table 3: how m_l is made",
        {
            "mDPO": "27.0 / 4.6 (crop 0-20 %)",
            "mDPO, crop 20-50 %": "33.7 / 5.4",
            "mDPO, MoCo v2": "32.3 / 5.9",
            "mDPO, random image": "40.7 / 6.6",
        },
        [
            Claim("Crop 20-50 % is worse than crop 0-20 %", "mDPO, crop 20-50 %", "mDPO", "CHAIR_s", 1),
            Claim("MoCo v2 is worse than crop 0-20 %", "mDPO, MoCo v2", "mDPO", "CHAIR_s", 1),
            Claim("A random image is worse than crop 0-20 %", "mDPO, random image", "mDPO", "CHAIR_s", 1),
            Claim("Crop 20-50 % is worse where both say as much", "mDPO, crop 20-50 %", "mDPO", "CHi@85", 1),
            Claim("MoCo v2 is worse where both say as much", "mDPO, MoCo v2", "mDPO", "CHi@85", 1),
            Claim("A random image is worse where both say as much", "mDPO, random image", "mDPO", "CHi@85", 1),
        ],
    ),
    Table(
        "mDPO, Table 4: more anchors",
        {
            "mDPO": "27.0 / 4.6 (y_w)",
            "mDPO, anchors y_w, y_l": "29.3 / 5.0",
            "mDPO, anchors y_w, y_l, m_l": "34.7 / 6.1",
        },
        [
            Claim("An anchor on y_l brings nothing", "mDPO, anchors y_w, y_l", "mDPO", "CHAIR_s", 0),
            Claim("Anchors on y_l and m_l invent more", "mDPO, anchors y_w, y_l, m_l", "mDPO", "CHAIR_s", 1),
            Claim(
                "Anchors on y_l and m_l invent more where both say as much",
                "mDPO, anchors y_w, y_l, m_l",
                "mDPO",
                "CHi@85",
                1,
            ),
        ],
    ),
    Table(
        "mDPO 3.2: what becomes of the chosen answer",
        {"DPO": "-", "mDPO": "-", "mDPO -anchored": "-"},
        [
            Claim("DPO makes the chosen answer less likely", "DPO", None, "chosen", -1),
            Claim("mDPO keeps it more likely than DPO does", "mDPO", "DPO", "chosen", 1),
            Claim("mDPO keeps it more likely than without AncPO", "mDPO", "mDPO -anchored", "chosen", 1),
        ],
    ),
    Table(
        "Not in a paper: how often the judge goes by style",
        {
            "base": "-",
            "DPO, s = 0": "-",
            "mDPO, s = 0": "-",
            "DPO, s = 0.5": "-",
            "mDPO, s = 0.5": "-",
            "DPO": "-",
            "mDPO": "-",
        },
        [
            Claim("With an honest judge DPO learns to look", "DPO, s = 0", "base", "d'", 1),
            Claim("With an honest judge mDPO adds nothing", "mDPO, s = 0", "DPO, s = 0", "d'", 0),
            Claim("With half an honest judge mDPO adds something", "mDPO, s = 0.5", "DPO, s = 0.5", "d'", 1),
            Claim("With a judge of style mDPO adds something", "mDPO", "DPO", "d'", 1),
        ],
    ),
    Table(
        "PDS-DPO, Table 3: more pairs (here DPO with the honest judge's)",
        {
            "DPO, s = 0, 2/9 of the pairs": "47.3 / 35.9",
            "DPO, s = 0, 5/9 of the pairs": "43.7 / 28.0",
            "DPO, s = 0, 7/9 of the pairs": "42.4 / 26.7",
            "DPO, s = 0": "40.7 / 24.8",
        },
        [
            Claim("All pairs invent less than 2/9", "DPO, s = 0", "DPO, s = 0, 2/9 of the pairs", "CHAIR_s", -1),
            Claim(
                "5/9 invent less than 2/9",
                "DPO, s = 0, 5/9 of the pairs",
                "DPO, s = 0, 2/9 of the pairs",
                "CHAIR_s",
                -1,
            ),
            Claim("All pairs invent less than 7/9", "DPO, s = 0", "DPO, s = 0, 7/9 of the pairs", "CHAIR_s", -1),
        ],
    ),
]


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % of Student's t around the mean of at least two paired differences."""
    n = len(differences)
    half = T_95[n - 1] * stdev(differences) / sqrt(n)
    return mean(differences) - half, mean(differences) + half


def verdict(low: float, high: float, sign: int) -> str:
    if sign == 0:
        return "does not hold here" if low > 0 or high < 0 else "no difference can be told here"
    if sign < 0:
        low, high = -high, -low
    if low > 0:
        return "holds here"
    return "does not hold here: the reverse does" if high < 0 else "cannot be told here"


def check(claim: Claim, study: Study) -> str:
    """One line: the sentence, the difference with its interval, the verdict."""
    ours = study[claim.row][claim.score]
    theirs = study[claim.against][claim.score] if claim.against else [0.0] * len(ours)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(differences)
    shown = f"{claim.score} {mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{claim.sentence}: {shown}, **{verdict(low, high, claim.sign)}**."


def write(table: Table, study: Study) -> str:
    """One table in Markdown with its claims; rows and claims that were not run are named as such."""
    rows = [["row", *SCORES, "the paper's CHAIR_s / CHAIR_i"]]
    for name, paper in table.rows.items():
        cells = ["not run"] * len(SCORES)
        if name in study:
            cells = [f"{mean(study[name][score]):.2f} ± {stdev(study[name][score]):.2f}" for score in SCORES]
        rows.append([name, *cells, paper])
    lines = []
    for claim in table.claims:
        there = claim.row in study and (claim.against is None or claim.against in study)
        lines.append(f"- {check(claim, study)}" if there else f"- {claim.sentence}: not run.")
    return f"### {table.title}\n\n{markdown(rows)}\n\n" + "\n".join(lines) + "\n"
