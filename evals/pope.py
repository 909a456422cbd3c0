"""POPE (Li et al. 2023): yes-or-no questions about objects, asked of answers that may say anything.

Positive class: yes. The published number is the mean of F1 (and accuracy) over the splits random, popular, adversarial.

Deviations:
1. A value whose denominator is 0 is null; the original script stops there.
2. Answers are matched to labels by `question_id` where both have it, and the questions must agree in any case. The
   original goes by order alone, which scores answers to the older question files without a word.

Run: python -m evals.pope --answers random.jsonl popular.jsonl adversarial.jsonl
     --labels coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json [--json result.json]
"""

from pathlib import Path

import numpy as np

from evals import stats
from evals.stats import Part, ratio
from external import files

SCORER = "evals.pope 1"
# Two versions of the questions are in use. The older (random: 2,910 rows; LLaVA-1.5's and Bunny's tables) differs in
# 44 and 58 rows of popular and adversarial.
VERSIONS = {
    "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994": "current random",
    "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753": "current popular",
    "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8": "current adversarial",
    "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35": "older (e3e3926) random",
    "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc": "older (e3e3926) popular",
    "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26": "older (e3e3926) adversarial",
}


def yes_or_no(answer: str) -> str:
    """The official rule: "no" iff No, not or no is a word before the first full stop; everything else is "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def pope_metrics(s: dict) -> dict:
    """Counts -> metrics; numbers or arrays."""
    precision = ratio(s["tp"], s["tp"] + s["fp"])
    recall = ratio(s["tp"], s["tp"] + s["fn"])
    n = s["tp"] + s["fp"] + s["tn"] + s["fn"]
    return {
        "accuracy": ratio(s["tp"] + s["tn"], n),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(s["tp"] + s["fp"], n),
    }


def pope_counts(said: list[str], truth: list[str]) -> list[dict[str, int]]:
    """One 1 for each pair of "yes" or "no"."""
    counts = []
    for pair in zip(said, truth, strict=True):
        counts.append(
            {
                "tp": int(pair == ("yes", "yes")),
                "fp": int(pair == ("yes", "no")),
                "tn": int(pair == ("no", "no")),
                "fn": int(pair == ("no", "yes")),
            }
        )
    return counts


def match(rows: list[dict], labels: list[dict]) -> list[dict]:
    """The answer to each label, by question_id where all rows have one, else by order."""
    both = f"{rows[0]['_where']} and {labels[0]['_where']}"
    if all("question_id" in row for row in rows + labels):
        answered = stats.check_unique([row["question_id"] for row in rows], rows, "question")
        wanted = stats.check_unique([label["question_id"] for label in labels], labels, "question")
        check_complete(both, wanted.keys() - answered.keys(), "answer")
        check_complete(both, answered.keys() - wanted.keys(), "label")
        rows = [answered[key] for key in wanted]  # in the order of the labels
    if len(rows) != len(labels):
        raise SystemExit(f"{both} on: {len(rows)} answers for {len(labels)} labels; answer every question once.")
    for row, label in zip(rows, labels, strict=True):
        asked = stats.question_of(row)
        if label["text"] not in asked or row.get("label", label["label"]) != label["label"]:
            raise SystemExit(
                f"{row['_where']}: answers {asked!r}, but {label['_where']} asks {label['text']!r} (label "
                f"{label['label']}); another order or version of the questions. Use the labels it was made from."
            )
    return rows


def check_complete(both: str, odd: set, lack: str) -> None:
    if odd:
        some = sorted(odd, key=str)[:3]
        raise SystemExit(f"{both} on: {len(odd)} questions have no {lack}, such as {some}; complete both.")


def score_split(path: str, labels_path: str) -> tuple[dict, list[dict], Part]:
    labels = files.read_rows(labels_path)
    for label in labels:
        if label.get("label") not in ("yes", "no") or not isinstance(label.get("text"), str) or not label["text"]:
            raise SystemExit(f"{label['_where']}: a label row needs `text` and `label` yes or no.")
    rows = stats.read_answers(path)
    for row in rows + labels:
        if not isinstance(row.get("question_id", 0), str | int):
            raise SystemExit(f"{row['_where']}: `question_id` is {row['question_id']!r}, wanted a number or a text.")
    rows = match(rows, labels)
    said = [yes_or_no(row["answer"]) for row in rows]
    ids = [label.get("question_id", i) for i, label in enumerate(labels)]
    part = Part(ids, pope_counts(said, [label["label"] for label in labels]), pope_metrics)
    digest = files.sha256(Path(labels_path).read_bytes())
    split = {
        "labels": str(labels_path),
        "labels_sha256": digest,
        "labels_version": VERSIONS.get(digest),
        "n": len(rows),
        "counts": stats.sums(part.rows),
        **stats.summary(part),
        "rows": [{"id": key, "said": word} for key, word in zip(ids, said, strict=True)],
    }
    return split, rows, part


def score(paths: list[str], labels: list[str]) -> tuple[dict, list[Part]]:
    splits, every_row, parts = {}, [], []
    for path, label in zip(paths, labels, strict=True):
        split, rows, part = score_split(path, label)
        splits[Path(label).stem] = split
        every_row += rows
        parts.append(part)
    if len(splits) < len(labels):
        raise SystemExit(f"--labels names a split twice: {', '.join(labels)}.")
    protocol = f"POPE, mean over {len(parts)} splits" if len(parts) > 1 else f"POPE, {Path(labels[0]).stem}"
    result = stats.header(SCORER, protocol, paths, every_row, sum(len(part.ids) for part in parts))
    # each split is drawn on its own: its questions are another sample
    samples = [stats.bootstrap(part, stats.SEED + i) for i, part in enumerate(parts)]
    metrics, intervals = {}, {}
    for name in samples[0]:
        found = [split["metrics"][name] for split in splits.values()]
        metrics[name] = None if None in found else sum(found) / len(found)
        intervals[name] = stats.interval(np.mean([s[name] for s in samples], axis=0))
    versions = {(split["labels_version"] or "unknown").split()[0] for split in splits.values()}
    if len(versions) > 1 or "unknown" in versions:
        stats.not_comparable(result, f"label files: {', '.join(sorted(versions))} (not one official version)")
    return result | {"metrics": metrics, "intervals": intervals, "splits": splits}, parts


def main(argv: list[str] | None = None) -> None:
    what = "one answer file per split"
    parser = stats.scorer_flags(__doc__, "--answers", what, "files of one split", nargs="+")
    parser.add_argument("--labels", nargs="+", required=True, help="the official question files, in the same order")
    args = parser.parse_args(argv)
    if len(args.labels) != len(args.answers or [0]):
        parser.error("--labels needs one file per file of --answers, or one with --compare")
    stats.check_json(args.json, [*(args.compare or args.answers), *args.labels])
    compared = [[path] for path in args.compare] if args.compare else [args.answers]
    scored = [score(paths, args.labels) for paths in compared]
    for result, _ in scored:
        for name, split in result["splits"].items():
            print(f"{name} | " + " | ".join(f"{key} {stats.show(x)}" for key, x in split["metrics"].items()))
    stats.report(scored, args.json)


if __name__ == "__main__":
    main()
