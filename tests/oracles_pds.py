"""Compares pds/ with numbers that the official scorers and two programs wrote down, and with PDS-DPO's own release.

    python -m tests.oracles_pds --oracles DIR [--released preferences.json]

DIR holds tiny checkpoints in the published layouts with what the official ImageReward, ArmoRM and open_clip made of
them, ranked rows with the selection and the statistics that follow from them, and the release's candidates and answers.
One PASS or FAIL line per entry, exit status 1 on a failure. Not collected by pytest: the project's own tests build the
same comparisons on models of their own.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from external import files
from formats.readers import read_pairs
from pds import analyse, armorm, candidates, clip_score, export, imagereward, images, rank_images, rank_responses
from tests.oracles_model import Report

REWARDS, COSINES, ARMORM, STATISTICS, PIXELS = 1e-4, 1e-4, 1e-5, 2e-6, 2.0


def read(file: Path):
    return json.loads(file.read_text())


def check_imagereward(report: Report, root: Path) -> None:
    folder = root / "imagereward"
    expected, inside = read(folder / "expected.json"), np.load(folder / "intermediate.npz")
    heads = expected["config"]["vision"]["heads"]
    found = imagereward.find_files(folder)
    rows = expected["rows"]
    captions = [expected["texts"][row["text"]] for row in rows]
    opened = [rank_images.open_as_saved(root / "images" / row["image"]) for row in rows]
    reward = imagereward.load_imagereward(found, heads=heads)
    for name in inside.files:
        if name.startswith("pixels/"):
            picture = rank_images.open_as_saved(root / "images" / name.removeprefix("pixels/"))
            report.close(f"imagereward {name}", imagereward.prepare(picture, reward.image_size), inside[name], 0.0)
    for text, ids, mask in zip(expected["texts"], inside["input_ids"], inside["attention_mask"], strict=True):
        report.equal(f"imagereward ids of {text[:20]!r}", reward.caption_ids(text), ids[mask == 1].tolist())
    scores = reward.score(captions, opened)
    report.close("imagereward rewards, one batch", scores, [row["reward"] for row in rows], REWARDS)
    single = [reward.score([caption], [image])[0] for caption, image in zip(captions, opened, strict=True)]
    report.close("imagereward rewards, one by one", single, [row["reward"] for row in rows], REWARDS)
    for text in range(len(expected["texts"])):
        own = [(score, row) for score, row in zip(scores, rows, strict=True) if row["text"] == text]
        order = [row["rank"] for _, row in sorted(own, key=lambda pair: -pair[0])]
        report.equal(f"imagereward order of the pictures of text {text}", order, sorted(order))
    itc = imagereward.load_itc(found, heads=heads).score(captions, opened)
    report.close("blip ITC", itc, [row["blip_itc"] for row in rows], REWARDS)


def check_clip(report: Report, root: Path) -> None:
    expected = read(root / "clip" / "expected.json")
    scorer = clip_score.load(*clip_score.find_weights(str(root / "clip")))
    opened = [rank_images.open_as_saved(root / "images" / name) for name in expected["images"]]
    for text, cosines in zip(expected["texts"], expected["cosine"], strict=True):
        report.close(f"clip cosines of {text[:20]!r}", scorer.score([text] * len(opened), opened), cosines, COSINES)


def check_armorm(report: Report, root: Path) -> None:
    expected = read(root / "armorm" / "expected.json")
    judge, rows = armorm.load(root / "armorm"), expected["rows"]
    report.equal("armorm gate pattern", judge.chat.gate_pattern, expected["gate_pattern_ids"])
    for row in rows:
        report.equal(f"armorm ids: {row['name']}", judge.chat.ids(row["question"], row["answer"]), row["ids"])
        report.equal(f"armorm gate: {row['name']}", judge.chat.gate(row["ids"]), row["gate_position"])
    ways = {
        "one by one, from ids": [judge.score_ids([row["ids"]])[0] for row in rows],
        "a padded batch, from ids": judge.score_ids([row["ids"] for row in rows]),
    }
    for way, judged in ways.items():
        for name in ("score", "rewards", "gating"):
            ours, theirs = [getattr(one, name) for one in judged], [row[name] for row in rows]
            report.close(f"armorm {name}, {way}", ours, theirs, ARMORM)
    judged = judge.score([row["question"] for row in rows], [row["answer"] for row in rows])
    report.close("armorm score, from text", [score for score, _ in judged], [row["score"] for row in rows], ARMORM)


def check_sd3(report: Report, root: Path) -> None:
    """Pictures one by one, and a batch of two prompts at one scale; 0..255."""
    expected, pixels = read(root / "sd3" / "expected_rows.json")["rows"], np.load(root / "sd3" / "expected_pixels.npz")
    pipeline = images.load_pipeline(root / "sd3", "float32", offload=False)
    args = argparse.Namespace(steps=expected[0]["steps"], scale_argument="guidance_scale", size=None)
    painter = images.Painter(pipeline, args, Path("unused"))

    def painted(numbers: list[int]) -> np.ndarray:
        own = [expected[i] for i in numbers]
        values = painter.paint(
            [row["prompt"] for row in own], own[0]["guidance"], [row["seed"] for row in own], own[0]["steps"]
        )
        return (values * 255).round()

    for i, row in enumerate(expected):
        report.close(f"sd3 picture {i}, scale {row['guidance']:g}", painted([i])[0], pixels[str(i)], PIXELS)
    for scale in sorted({row["guidance"] for row in expected}):
        numbers = [i for i, row in enumerate(expected) if row["guidance"] == scale]
        together = np.stack([pixels[str(i)] for i in numbers])
        report.close(f"sd3 a batch at scale {scale:g}", painted(numbers), together, PIXELS)


def check_selection(report: Report, folder: Path) -> None:
    cases = {case["id"]: case for case in read(folder / "selection.json")}
    for name in ("ranked.jsonl", "ranked_margin.jsonl"):
        for key, answers in candidates.by_question(files.read_rows(folder / name)).items():
            case = cases[key]
            choice = candidates.choose(answers, candidates.Rules(min_margin=case.get("min_margin", 0.0)))
            sides = [row and row["responder"] for row in (choice.chosen, choice.rejected)]
            ours = [*sides, choice.dropped, choice.refused]
            theirs = [case.get(what) for what in ("chosen", "rejected", "dropped")] + [case.get("dropped_answers", {})]
            report.equal(f"selection {key}: {case['why']}", ours, theirs)


def check_analysis(report: Report, root: Path) -> None:
    folder = root / "analysis"
    expected = read(folder / "expected_scores.json")
    rows = files.read_rows(folder / "scores.jsonl")
    found = analyse.analyse_scores(rows)
    for name in ("prompts", "left_out", "overlap", "guidance_share"):
        report.equal(f"analysis {name}", found[name], expected[name])
    prompts = rank_images.by_prompt(rows)
    for prompt, orders in expected["order_best_first"].items():
        ours = {name: [row["guidance"] for row in rank_images.ranked(prompts[prompt], name)] for name in orders}
        report.equal(f"analysis order of {prompt}", ours, orders)
    for what, case in read(folder / "similarity.json").items():
        ours = analyse.similarity(torch.tensor(case["embeddings"], dtype=torch.float64))
        report.equal(f"similarity of {what}: pairs", ours["pairs"], case["pairs"])
        report.close(f"similarity of {what}: mean", ours["mean"], case["mean"], STATISTICS)
        for q, value in case["quantiles"].items():
            report.close(f"similarity of {what}: quantile {q}", ours["quantiles"][q], value, STATISTICS)
    check_selection(report, folder)


def run(command, *argv) -> str:
    """A stage's command -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command.main([str(word) for word in argv])
    return printed.getvalue()


def check_release(report: Report, root: Path) -> None:
    """The release's forty candidates and thirty answers through the stages, with tiny weights."""
    released = read(root / "release" / "release.json")
    pictures, answers = [], []
    for own in released:
        for guidance in (5.0, 7.0, 9.0, 11.0):
            row = {"id": f"{own['id']}/g{guidance:g}", "prompt_id": own["id"], "topic": own["topic"]}
            picked = {"scores": {"picked": float(guidance == own["picked_guidance"])}}
            pictures.append(
                row
                | picked
                | {
                    "caption": own["caption"],
                    "guidance": guidance,
                    "image": f"candidates/{own['id']}-g{guidance:g}.jpg",
                }
            )
        picture = f"candidates/{own['id']}-g{own['picked_guidance']:g}.jpg"
        for answer in own["answers"]:
            answers.append(
                {
                    "id": own["id"],
                    "image": picture,
                    "prompt": f"<image> {own['question']}",
                    "topic": own["topic"],
                    "responder": answer["responder"],
                    "answer": answer["as_stored"],
                    "finish": "eos",
                }
            )
    shares = analyse.guidance_share(rank_images.by_prompt(pictures), "picked")
    report.equal(
        "release: Figure 4 of its picks", shares, {"art": {"n": 10, "5": 20.0, "7": 20.0, "9": 20.0, "11": 40.0}}
    )
    stored = {(own["id"], answer["responder"]): answer["answer"] for own in released for answer in own["answers"]}
    exported = {(row["id"], row["responder"]): rank_responses.as_exported(row)["answer"] for row in answers}
    report.equal("release: no answer keeps the question", exported, {key: text.strip() for key, text in stored.items()})
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        files.write_rows(out / "images.jsonl", pictures)
        files.write_rows(out / "answers.jsonl", answers)
        heads = read(root / "imagereward" / "expected.json")["config"]["vision"]["heads"]
        run(
            rank_images,
            out / "images.jsonl",
            "--out",
            out / "scores.jsonl",
            "--best",
            out / "best.jsonl",
            "--imagereward",
            root / "imagereward",
            "--vision-heads",
            heads,
            "--image-root",
            root / "release",
        )
        report.equal("release: forty candidates ranked", len(files.read_rows(out / "scores.jsonl")), 40)
        report.equal("release: ten best pictures", len(files.read_rows(out / "best.jsonl")), 10)
        run(rank_responses, out / "answers.jsonl", "--out", out / "ranked.jsonl", "--armorm", root / "armorm")
        printed = run(export, out / "ranked.jsonl", "--out", out / "pairs", "--image-root", root / "release")
        report.equal("release: pairs of the thirty answers", "10 pairs of 10 questions" in printed, True)
        with contextlib.redirect_stdout(io.StringIO()):
            pairs, problems = read_pairs(out / "pairs" / "pairs.jsonl")
            again, _ = read_pairs(out / "pairs" / "pds-dpo.json")
        report.equal("release: both layouts of the export are read back", (len(pairs), len(problems)), (10, 0))
        same = [(a.prompt, a.chosen, a.rejected) for a in pairs] == [(b.prompt, b.chosen, b.rejected) for b in again]
        report.equal("release: both layouts hold the same", same, True)


def check_released_pairs(report: Report, file: Path) -> None:
    """The ten released pairs: an empty or one-word answer is no candidate, so three of them go."""
    answers = []
    for pair in read(file):
        question = pair["conversations"][0]["value"]
        for side, score in (("conversations", 1.0), ("rejected_conversations", 0.0)):
            answers.append(
                {
                    "id": pair["id"],
                    "image": pair["image"],
                    "prompt": question,
                    "responder": side,
                    "answer": pair[side][1]["value"],
                    "score": score,
                }
            )
    found = export.make_pairs(answers, candidates.Rules())
    report.equal("released pairs: seven stay", len(found.pairs), 7)
    gone = sorted({row["id"] for row in answers} - {pair["id"] for pair in found.pairs})
    report.equal("released pairs: which go", gone, ["art-2", "art-3", "art-4"])
    report.equal("released pairs: why", dict(found.dropped_answers), {"empty": 2, "short": 1})


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--oracles", type=Path, required=True, help="folder with the tiny checkpoints and expected numbers")
    p.add_argument("--released", type=Path, help="preferences.json of the PDS-DPO repository")
    args = p.parse_args(argv)
    report = Report()
    check_imagereward(report, args.oracles)
    check_clip(report, args.oracles)
    check_armorm(report, args.oracles)
    check_sd3(report, args.oracles)
    check_analysis(report, args.oracles)
    check_release(report, args.oracles)
    if args.released:
        check_released_pairs(report, args.released)
    print(f"{report.compared} compared, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
