"""Which of a prompt's pictures to keep: r_i = R_I(x, I_i), and the best of them (PDS-DPO 3.2, equations 6 and 7).

    python -m pds.rank_images images.jsonl --out scores.jsonl --best best.jsonl
    python -m pds.rank_images images.jsonl --out scores.jsonl --scorer imagereward --scorer clip --scorer blip

IN has a row per picture: {id: "art-1/g7", prompt_id, topic, caption, guidance, image}; `image` lies in IN's folder or
--image-root. OUT has these rows with `scores: {name: float}`; --best a row per prompt, {id, topic, caption, image,
guidance, scores}, chosen by the first --scorer.

Deviations from the paper and its release
1. "Images with lower scores are discarded": the best of a prompt stays, whatever its score; --min-score and
   --drop-lowest, off by default, also discard prompts whose best picture is poor.
2. The lower guidance wins a tie; in the release the first of the equal ones.
3. Scores are kept; the release prints them.
4. The picture keeps its prompt's id; the release numbers the winners by their line, `art-1`, whatever the topic.
"""

import argparse
import math
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import pictures
from external import files
from external.flags import file_ending, number, whole
from external.terminal import count, printable
from pds import clip_score, imagereward, origin, runner
from pds.runner import Row

NEEDED = {"prompt_id": str, "topic": str, "caption": str, "guidance": int | float, "image": str}
ROW_BYTES = 150 << 20  # of a picture in both towers, and of its pixels before they are made small


def check_scores(file: Path, rows: list[Row]) -> None:
    """SystemExit where `scores`, of an earlier run with other scorers, are no scores by names that may name files."""
    for row in rows:
        scores = row.get("scores") or {}
        if not isinstance(scores, dict) or not all(re.fullmatch(r"[\w.-]+", name) for name in scores):
            raise SystemExit(f"{file}: id {row['id']}: `scores` is {row['scores']!r:.40}, wanted {{scorer: number}}")


# ---- choosing (equation 7) -----------------------------------------------------------------------------------------


def by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    """prompt id -> its candidates, lower guidance first."""
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.get("guidance", 0)):
        found[str(row.get("prompt_id", row["id"]))].append(row)
    return found


def ranked(candidates: list[Row], scorer: str) -> list[Row]:
    """Best first; of equals, lower guidance first. Candidates without this score are left out."""
    scored = [row for row in candidates if runner.is_number(row.get("scores", {}).get(scorer))]
    return sorted(scored, key=lambda row: (-row["scores"][scorer], row["guidance"]))


def best_images(
    rows: list[Row], scorer: str, min_score: float | None = None, drop_lowest: float = 0.0
) -> tuple[list[Row], Counter]:
    """A row per prompt with its best picture, and how many prompts were dropped, by reason.

    `drop_lowest` percent of the prompts go, those whose best pictures score lowest; `min_score` goes first.
    """
    best, dropped = [], Counter()
    for prompt, candidates in by_prompt(rows).items():
        order = ranked(candidates, scorer)
        if not order:
            dropped["no picture"] += 1
        elif min_score is not None and order[0]["scores"][scorer] < min_score:
            dropped["min-score"] += 1
        else:
            kept = ("topic", "caption", "image", "image_sha256", "guidance", "scores")
            best.append({"id": prompt} | {name: order[0][name] for name in kept if name in order[0]})
    lowest = sorted(best, key=lambda row: (row["scores"][scorer], row["id"]))[: int(len(best) * drop_lowest / 100)]
    gone = {row["id"] for row in lowest}
    if gone:
        dropped["drop-lowest"] = len(gone)
    return [row for row in best if row["id"] not in gone], dropped


def say_fewer(rows: list[Row], scorer: str) -> None:
    """Says which prompts had fewer pictures to choose from than the others: a shard or a retry may be missing."""
    counts = {prompt: len(ranked(own, scorer)) for prompt, own in by_prompt(rows).items()}
    most = max(counts.values(), default=0)
    fewer = [prompt for prompt, n in counts.items() if n < most]
    if fewer:
        print(printable(f"{count(len(fewer), 'prompt')} with fewer than {most} pictures, such as {fewer[0]}"))


# ---- scoring (equation 6) ------------------------------------------------------------------------------------------


def open_as_saved(path: Path) -> Image.Image:
    """A picture in the mode it was saved in, as both official scorers take it. ValueError if it cannot be used."""
    image = pictures.open_image(path)  # RGB, all checks done
    with Image.open(path) as saved:
        if saved.mode in ("RGBA", "LA", "P", "PA", "CMYK"):  # resizing these before they are RGB gives other pixels
            return saved.copy()
    return image


class Judge:
    """Scores batches of rows with every scorer."""

    def __init__(self, scorers: dict, image_root: Path):
        self.scorers, self.image_root = scorers, image_root
        self.seen, self.cut = set(), {name: set() for name in scorers}

    def open(self, row: Row) -> Image.Image | str:
        """The picture of a row, or what is wrong with it."""
        try:
            return open_as_saved(files.inside(self.image_root, row["image"]))
        except ValueError as error:
            return f"{row['image']}: {error}"

    def __call__(self, rows: list[Row]) -> list[Row]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            opened = list(pool.map(self.open, rows))
        usable = [i for i, image in enumerate(opened) if isinstance(image, Image.Image)]
        judged = self.judge([rows[i] for i in usable], [opened[i] for i in usable])
        results = [runner.failed(row, f"{problem}") for row, problem in zip(rows, opened, strict=True)]
        for i, row in zip(usable, judged, strict=True):
            results[i] = row
        return results

    def judge(self, rows: list[Row], images: list[Image.Image]) -> list[Row]:
        """Rows with pictures that can be used -> the same with scores, or with `error` where one is no number."""
        captions = [row["caption"] for row in rows]
        scores = [dict(row.get("scores") or {}) for row in rows]  # of an earlier run with other scorers
        self.seen |= set(captions)
        for name, scorer in self.scorers.items():
            self.cut[name] |= {caption for caption in captions if scorer.is_cut(caption)}
            values = scorer.score(captions, images) if rows else []
            for own, value in zip(scores, values, strict=True):
                own[name] = value
        return [self.checked(row, own) for row, own in zip(rows, scores, strict=True)]

    def checked(self, row: Row, scores: dict[str, float]) -> Row:
        bad = [name for name in self.scorers if not math.isfinite(scores[name])]
        if bad:
            return runner.failed(row, f"the score of {', '.join(bad)} is not a finite number")
        return row | {"scores": scores}

    def say_cut(self) -> None:
        for name, captions in self.cut.items():
            if captions:
                print(f"{name}: {len(captions)} of {len(self.seen)} captions are longer than it reads, and were cut")


def find_scorers(args: argparse.Namespace) -> tuple[dict, dict]:
    """Where each scorer's files are, and what the settings say of them; nothing is loaded yet."""
    found, described = {}, {}
    for name in args.scorer:
        if name == "clip":
            model, weights = clip_score.find_weights(args.clip)
            found[name] = (model, weights)
            beside = sorted(weights.parent.glob("*.json")) if Path(args.clip).is_dir() else []
            described[name] = origin.describe_model(args.clip, weights.parent, [weights, *beside])
        else:
            folder = args.imagereward if name == "imagereward" else args.blip
            found[name] = imagereward.find_files(folder)
            model = str(folder or imagereward.REPOSITORY)
            described[name] = origin.describe_model(model, found[name].weights.parent, list(found[name]))
    return found, described


def load_scorers(args: argparse.Namespace, found: dict) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorers = {}
    for name, where in found.items():
        if name == "clip":
            scorers[name] = clip_score.load(*where, device)
        elif name == "imagereward":
            scorers[name] = imagereward.load_imagereward(where, device, args.vision_heads)
        else:
            scorers[name] = imagereward.load_itc(where, device, args.vision_heads)
    return scorers


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    p = runner.stage_parser(__doc__, "images.jsonl: {id, prompt_id, topic, caption, guidance, image}")
    p.add_argument(
        "--scorer",
        action="append",
        choices=("imagereward", "clip", "blip"),
        help="repeatable; the first one chooses (default imagereward)",
    )
    p.add_argument("--imagereward", type=Path, metavar="FOLDER", help="ImageReward.pt, med_config.json, vocab.txt")
    p.add_argument("--clip", default=clip_score.DEFAULT, metavar="FOLDER", help="open_clip folder, or OpenAI's name")
    p.add_argument(
        "--blip",
        type=Path,
        metavar="FOLDER",
        help="model_large.pth (or ImageReward.pt), med_config.json, vocab.txt; the score is BLIP's ITC",
    )
    p.add_argument("--vision-heads", type=whole(1), help="of ImageReward and BLIP, where a head is not 64 wide")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: IN's)")
    p.add_argument("--best", type=file_ending(".jsonl"), metavar="FILE", help="a row per prompt, with its best picture")
    p.add_argument("--min-score", type=number(-math.inf), help="drop prompts whose best picture scores less")
    p.add_argument("--drop-lowest", type=float, default=0.0, metavar="PERCENT", help="drop the worst best pictures")
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    args.scorer = list(dict.fromkeys(args.scorer or ["imagereward"]))
    if "blip" in args.scorer and args.blip is None:
        p.error(
            "--scorer blip needs --blip FOLDER: BLIP-L's model_large.pth is not on the hub, "
            "github.com/salesforce/BLIP says where it is"
        )
    if not 0 <= args.drop_lowest < 100:
        p.error("--drop-lowest is a percentage below 100")
    if args.best is None and (args.min_score is not None or args.drop_lowest):
        p.error("--min-score and --drop-lowest choose what --best holds; give --best FILE")
    if args.best:
        files.check_writable(args.best, [args.input, args.out])
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    inputs = runner.read_inputs(args.input, NEEDED)
    check_scores(args.input, inputs)
    image_root = Path(args.image_root or args.input.parent).resolve()
    inputs = origin.with_pictures(inputs, lambda row: files.inside(image_root, row["image"]))
    found, described = find_scorers(args)
    settings = {
        "stage": "rank_images",
        "in": runner.beside(args.input, args.out),
        "scorers": described,
        "vision_heads": args.vision_heads,
        "dtype": "float32",
        "torch": torch.__version__,
    }
    judges = []

    def load() -> runner.Work:
        judge = Judge(load_scorers(args, found), image_root)
        judges.append(judge)
        return runner.Work(judge, ROW_BYTES)

    result = runner.run(args, inputs, settings, {"scores", "error"}, load)
    for judge in judges:
        judge.say_cut()
    dropped = Counter()
    if args.best:
        best, dropped = best_images(result.rows, args.scorer[0], args.min_score, args.drop_lowest)
        files.write_rows(args.best, best)
        chosen_by = {"best_by": args.scorer[0], "min_score": args.min_score, "drop_lowest": args.drop_lowest}
        files.write_json(runner.settings_file(args.best), settings | chosen_by)
        print(f"{args.best}: {count(len(best), 'prompt')} with their best picture by {args.scorer[0]}")
        say_fewer(result.rows, args.scorer[0])
    runner.report(args, result, dropped)


if __name__ == "__main__":
    main()
