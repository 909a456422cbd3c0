"""The preference set: y_w and y_l of each question, for training and for the hub (PDS-DPO 3.3, equation 10).

    python -m pds.export ranked.jsonl --out pairs --sizes 2000 5000 7000 9000
    python train.py --recipe pds-dpo --data pairs/pairs.jsonl --base llava-1.5-7b

OUT is a folder: pairs.jsonl {id, image, prompt, chosen, rejected, score_chosen, score_rejected, responder_chosen,
responder_rejected}, the same as PDS-DPO's own JSON, the pictures, and README.md, a data card for the hub that says how
many rows each stage made, with which models under which licences, and what was dropped for which reason.
--sizes adds pairs-N.jsonl, nested: each holds the smaller ones, with as many pairs of every topic as there are.

Deviations: those of candidates.py. Whether the paper's 2K/5K/7K/9K (Table 3) are nested is not said; here they are.
"""

import argparse
import hashlib
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pictures
from external import files
from external.flags import number, whole
from external.terminal import count, printable, set_up_terminal
from pds import card, origin, runner
from pds.candidates import Export, Rules, bare, by_question, choose, without_echo
from pds.runner import Row

NEEDED = {"image": str, "prompt": str, "responder": str}


# ---- pairs ---------------------------------------------------------------------------------------------------------


def make_pairs(rows: list[Row], rules: Rules) -> Export:
    """Ranked answers -> a pair per question that has one; every other question and answer is counted."""
    pairs, dropped_pairs, dropped_answers = [], Counter(), Counter()
    for key, answers in by_question(rows).items():
        choice = choose(answers, rules)
        dropped_answers.update(choice.refused.values())
        if choice.dropped:
            dropped_pairs[choice.dropped] += 1
            continue
        chosen, rejected = choice.chosen, choice.rejected
        if not bare(chosen["prompt"]):
            dropped_pairs["no question"] += 1
            continue
        pairs.append(
            {
                "id": key,
                "image": chosen["image"],
                "prompt": bare(chosen["prompt"]),
                "chosen": without_echo(chosen["prompt"], chosen["answer"]),
                "rejected": without_echo(rejected["prompt"], rejected["answer"]),
                "score_chosen": chosen["score"],
                "score_rejected": rejected["score"],
                "responder_chosen": chosen["responder"],
                "responder_rejected": rejected["responder"],
            }
        )
    return Export(pairs, dropped_pairs, dropped_answers)


def pds_dpo(pair: Row) -> Row:
    """A pair in the layout of the released set."""
    question = {"from": "human", "value": f"<image> {pair['prompt']}"}
    return {
        "id": pair["id"],
        "image": pair["image"],
        "conversations": [question, {"from": "gpt", "value": pair["chosen"]}],
        "rejected_conversations": [question, {"from": "gpt", "value": pair["rejected"]}],
    }


def balanced_order(pairs: list[Row], topics: dict[str, str], seed: int) -> list[Row]:
    """All pairs so that the first n of them are balanced for every n: topic by topic in turn, shuffled within each."""
    by_topic = defaultdict(list)
    for pair in pairs:
        by_topic[topics[pair["id"]]].append(pair)
    for name, own in by_topic.items():
        own.sort(key=lambda pair: hashlib.sha256(f"{seed} {name} {pair['id']}".encode()).digest())
    ordered = []
    for place in range(max(map(len, by_topic.values()), default=0)):
        ordered += [by_topic[name][place] for name in sorted(by_topic) if place < len(by_topic[name])]
    return ordered


def say_fewer(rows: list[Row]) -> None:
    """Says which questions have answers of fewer responders than the others: a shard may be missing."""
    counts = {key: len(answers) for key, answers in by_question(rows).items()}
    most = max(counts.values())
    fewer = [key for key, n in counts.items() if n < most]
    if fewer:
        print(printable(f"{count(len(fewer), 'question')} with fewer than {most} answers, such as {fewer[0]}"))


# ---- pictures ------------------------------------------------------------------------------------------------------


def with_picture(pairs: list[Row], root: Path, answered: dict[str, str]) -> list[Row]:
    """The pairs whose picture can be used, its path as it is inside `root`.

    answered: id -> sha256 of the picture that the answers are about, where it is known.
    """
    usable = []
    for pair in pairs:
        try:
            source = files.inside(root, pair["image"])
            pictures.open_image(source)
            if answered.get(pair["id"], "") not in ("", origin.picture_sha256(source)):
                raise ValueError("another picture than the answers are about")
        except ValueError as error:
            print(f"{pair['id']}: {pair['image']}: {error}; no pair")
            continue
        usable.append(pair | {"image": str(source.relative_to(root))})
    return usable


def copy_pictures(pairs: list[Row], root: Path, out: Path) -> None:
    """Copies each pair's picture to the same path inside `out`."""
    for pair in pairs:
        source, target = root / pair["image"], out / pair["image"]
        if target.resolve() != source:
            with files.whole(target) as part:
                shutil.copyfile(source, part)


# ---- command line --------------------------------------------------------------------------------------------------


def check_out(args: argparse.Namespace) -> None:
    """SystemExit if --out has files of the set's names that no export wrote, or cannot be written."""
    others = [name for name in ("pairs.jsonl", "README.md") if (args.out / name).exists()]
    if others and not (args.out / "pds-dpo.json").exists():  # the first that an export writes
        raise SystemExit(f"{args.out}: has a {others[0]} that is of no export; give a folder of its own")
    files.check_writable(args.out / "pairs.jsonl", [args.input])


def write(args: argparse.Namespace, export: Export, topics: dict[str, str], readme: str) -> None:
    """The files of the folder, instead of those of an earlier export."""
    if (args.out / "pds-dpo.json").exists():  # an earlier export, whose subsets are no parts of this one
        for old in args.out.glob("pairs-*.jsonl"):
            if re.fullmatch(r"pairs-\d+", old.stem):
                old.unlink()
    files.write_json(args.out / "pds-dpo.json", [pds_dpo(pair) for pair in export.pairs])
    files.write_rows(args.out / "pairs.jsonl", export.pairs)
    ordered = balanced_order(export.pairs, topics, args.seed)
    for size in args.sizes:
        files.write_rows(args.out / f"pairs-{size}.jsonl", ordered[:size])
    files.write_text(args.out / "README.md", readme)


def parse_args(argv=None) -> argparse.Namespace:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("input", type=Path, metavar="IN", help="ranked.jsonl: {id, image, prompt, responder, answer, score}")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the data set; an old one is replaced")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: IN's)")
    p.add_argument("--min-words", type=whole(0), default=Rules().min_words, help="of an answer (default 3)")
    p.add_argument(
        "--min-margin", type=number(0.0), default=Rules().min_margin, help="least score_chosen - score_rejected"
    )
    p.add_argument("--sizes", type=whole(1), nargs="+", default=[], metavar="N", help="nested subsets (Table 3)")
    p.add_argument("--seed", type=int, default=0, help="of the subsets (default 0)")
    return p.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    rows = runner.read_inputs(args.input, NEEDED)
    topics = {str(row["id"]): str(row.get("topic", "")) for row in rows}
    export = make_pairs(rows, Rules(args.min_words, args.min_margin))
    check_out(args)
    root = (args.image_root or args.input.parent).resolve()
    answered = {str(row["id"]): row["image_sha256"] for row in rows if "image_sha256" in row}
    usable = with_picture(export.pairs, root, answered)
    export.dropped_pairs["picture"] += len(export.pairs) - len(usable)
    export = export._replace(pairs=usable, dropped_pairs=+export.dropped_pairs)
    if not export.pairs:
        raise SystemExit(
            f"{args.input}: no pair is left; dropped: {card.listed(export.dropped_pairs)}; answers that were no "
            f"candidates: {card.listed(export.dropped_answers)}"
        )
    if too_many := [size for size in args.sizes if size > len(export.pairs)]:
        raise SystemExit(f"--sizes {too_many[0]}: there are only {len(export.pairs)} pairs")
    readme = card.text(args, export, topics)
    copy_pictures(export.pairs, root, args.out)
    write(args, export, topics, readme)
    say_fewer(rows)
    print(f"answers that were no candidates: {card.listed(export.dropped_answers)}")
    pairs, questions = len(export.pairs), len(topics)
    print(f"{args.out}: {pairs} pairs of {questions} questions; dropped: {card.listed(export.dropped_pairs)}")


if __name__ == "__main__":
    main()
