"""The papers' tables in miniature: every row of them trained and scored in the toy world, seed by seed.

    python -m lab.tables --seeds 6 7 8 9 10 --out DIR      resumable: a row that is there is not trained again
    python -m lab.tables --figure judge.png                redraws the README's figure from the committed numbers

Each seed has its own scenes, base, pairs and test scenes. Rows stand in GROUPS in the order of their worth, and a group
is finished for all seeds before the next starts, so that a run that is stopped early leaves whole tables. DIR gets
tables.md with what holds and what does not (lab/claims.py), study.json with the numbers, judge.png and chosen.png.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import toy
import train
from external.files import check_writable, read_json, write_json, write_rows, write_text
from external.flags import whole
from lab import claims, figure, plotting

# ---- rows ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    flags: str | None  # of train.py, for the toy's pairs; None: the base as it is
    s: float = 1.0  # how often the judge of its pairs goes by style
    data: str = "train"  # or "erased", or the number of ninths of the pairs


GROUPS = {
    "headline": {
        "base": Row(None),
        "DPO": Row("--recipe dpo"),
        "DPO (No Image)": Row("--recipe dpo-no-image"),
        "mDPO": Row("--recipe mdpo"),
        "mDPO -conditional": Row("--terms dpo,ancpo"),
        "mDPO -anchored": Row("--terms dpo,copo"),
    },
    "judge": {
        "DPO, s = 0.5": Row("--recipe dpo", s=0.5),
        "mDPO, s = 0.5": Row("--recipe mdpo", s=0.5),
        "DPO, s = 0": Row("--recipe dpo", s=0.0),
        "mDPO, s = 0": Row("--recipe mdpo", s=0.0),
    },
    "controls": {
        # -log sigma(log pi / pi_ref - 100) is 100 + log pi_ref - log pi: maximum likelihood of y_w in the same loop
        "SFT on y_w": Row("--terms ancpo --beta 1 --delta 100"),
        "mDPO, m_l = m_w": Row("--rejected-image same"),
        "mDPO, mentioned objects erased": Row("--rejected-image given", data="erased"),
    },
    "rejected image": {
        "mDPO, crop 20-50 %": Row("--rejected-image crop20-50"),
        "mDPO, random image": Row("--rejected-image random"),
        "mDPO, MoCo v2": Row("--rejected-image moco"),
    },
    "anchors": {
        "mDPO, anchors y_w, y_l": Row("--anchors w,l"),
        "mDPO, anchors y_w, y_l, m_l": Row("--anchors w,l,m_l"),
    },
    "pairs": {
        "DPO, s = 0, 2/9 of the pairs": Row("--recipe dpo", s=0.0, data="2"),
        "DPO, s = 0, 5/9 of the pairs": Row("--recipe dpo", s=0.0, data="5"),
        "DPO, s = 0, 7/9 of the pairs": Row("--recipe dpo", s=0.0, data="7"),
    },
}
ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}


def slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-")


def pairs_folder(world: Path, row: Row, seed: int) -> Path:
    """The pairs of the row's judge, from the same base and scenes; made if they are not there."""
    folder = world / ("pairs" if row.s == 1.0 else f"pairs-s{row.s:g}")
    if not (folder / "scenes.json").is_file():  # written last
        toy.make_pairs(world, folder, seed, row.s)
    return folder


def data_file(folder: Path, data: str) -> Path:
    """train.jsonl, or a file beside it that is made from it."""
    whole = folder / "train.jsonl"
    if data == "train":
        return whole
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    if data == "erased":
        rows = erase_mentioned(rows, folder)
    else:
        rows = rows[: len(rows) * int(data) // 9]  # nested: the smaller sets are parts of the larger
    file = folder / f"{data}.jsonl"
    write_rows(file, rows)
    return file


def erase_mentioned(rows: list[dict], folder: Path) -> list[dict]:
    """The positive control: m_l is m_w without the objects that y_w names."""
    (folder / "erased").mkdir(exist_ok=True)
    changed = []
    for row, scene in zip(rows, read_json(folder / "scenes.json"), strict=True):
        named = toy.mentions(row["chosen"])
        left = {name: place for name, place in scene["places"].items() if name not in named}
        file = f"erased/{Path(row['image']).name}"
        toy.draw_picture(scene["kind"], left).save(folder / file)
        changed.append(row | {"image_rejected": file})
    return changed


def train_row(world: Path, name: str, seed: int) -> Path | None:
    """The row's run folder; trained unless it is there, whole. None for the base."""
    row = ROWS[name]
    if row.flags is None:
        return None
    out = world / slug(name)
    if (out / "adapter_model.safetensors").is_file():  # written last
        print(f"{out}: trained already")
        return out
    if out.exists():
        shutil.rmtree(out)  # what a stopped run left
    data = data_file(pairs_folder(world, row, seed), row.data)
    own = ["--base", "toy", "--weights", world / "base", "--data", data, "--out", out, "--seed", seed]
    return train.train(train.parse_args([*map(str, own), *row.flags.split()]))


def score_row(world: Path, name: str, seed: int) -> dict:
    """The row's result, read from the disk where it is there: scores, greedy captions, and the curve of log pi(y_w)."""
    file = world / "rows" / f"{slug(name)}.json"
    if file.is_file():
        return read_json(file)
    print(f"\nseed {seed}: {name}", flush=True)
    run = train_row(world, name, seed)
    pairs = pairs_folder(world, ROWS[name], seed).name
    scores, texts = toy.evaluate(world, run, toy.test_scenes(seed), seed, pairs)
    curve = []
    if run:
        beta = read_json(run / "args.json")["beta"]
        curve = [json.loads(line)["rewards/chosen"] / beta for line in (run / "log.jsonl").read_text().splitlines()]
    result = {"row": name, "seed": seed, "scores": scores, "chosen_by_step": curve, "captions": texts}
    write_json(file, result)
    print(" | ".join(f"{key} {value:.2f}" for key, value in scores.items()), flush=True)
    return result


def collect(out: Path, seeds: list[int]) -> dict:
    """A study (lab/figure.py) of the rows that every seed has."""
    study = {"seeds": seeds, "rows": {}, "chosen_by_step": {}}
    for name in ROWS:
        files = [out / f"seed-{seed}" / "rows" / f"{slug(name)}.json" for seed in seeds]
        if not all(file.is_file() for file in files):
            continue
        results = [read_json(file) for file in files]
        scores = [result["scores"] for result in results]
        study["rows"][name] = {score: [round(of_seed[score], 4) for of_seed in scores] for score in scores[0]}
        if name in figure.CHOSEN:
            steps = zip(*(result["chosen_by_step"] for result in results), strict=True)
            study["chosen_by_step"][name] = [round(mean(values), 4) for values in steps]
    return study


def report(out: Path, seeds: list[int]) -> None:
    """study.json; with two seeds or more tables.md; the figures whose rows are there."""
    study = collect(out, seeds)
    write_json(out / "study.json", study)
    written = ["study.json"]
    if len(seeds) > 1:  # an interval needs two
        text = "\n".join(claims.write(table, study["rows"]) for table in claims.TABLES)
        write_text(out / "tables.md", text)
        print(f"\n{text}")
        written.append("tables.md")
    if GROUPS["headline"].keys() <= study["rows"].keys():
        figure.chosen(out / "chosen.png", study)
        written.append("chosen.png")
        if GROUPS["judge"].keys() <= study["rows"].keys():
            figure.judge(out / "judge.png", study)
            written.append("judge.png")
    print(f"{out}: {', '.join(written)}")


def main(argv=None) -> None:
    torch.set_num_threads(1)  # models this small gain little from a second, and waiting for a shared core costs minutes
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=whole(0), nargs="+", default=[6, 7, 8, 9, 10])
    p.add_argument("--out", type=Path, help="folder of the results, a folder per seed in it")
    p.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="which rows")
    p.add_argument("--figure", type=Path, help="redraw the README's figure from the committed numbers, nothing else")
    args = p.parse_args(argv)
    if args.figure:
        figure.judge(args.figure, read_json(figure.STUDY))
        print(args.figure)
        return
    if not args.out:
        p.error("give --out DIR, or --figure FILE")
    if len(set(args.seeds)) < len(args.seeds) or len(args.seeds) > claims.MOST_SEEDS:
        p.error(f"--seeds: each once, at most {claims.MOST_SEEDS}: intervals are over different worlds")
    check_writable(args.out / "study.json")
    plotting.new_figure(args.out / "judge.png", 1, 1)  # a missing matplotlib is told now, not after an hour
    for group in args.groups:
        for seed in args.seeds:
            world = toy.make_world(args.out / f"seed-{seed}", seed)
            for name in GROUPS[group]:
                score_row(world, name, seed)
    report(args.out, args.seeds)


if __name__ == "__main__":
    main()
