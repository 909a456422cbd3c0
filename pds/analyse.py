"""What was chosen, in numbers and pictures: PDS-DPO's Table 4, Figure 4 and Figure 6, and who wins.

    python -m pds.analyse scores.jsonl ranked.jsonl --json analysis.json --figures figures --sheet sheet.png

Rows with `scores` are candidates of rank_images, rows with `responder` are answers of rank_responses.
  overlap         how often scorers agree on a prompt's k best pictures: the mean of |intersection| / k (Table 4)
  guidance_share  how often each guidance scale made the best picture of a topic (Figure 4)
  similarity      cosine of all unordered pairs of prompts, and of answers; lower is more diverse (Figure 6)
  responders      how often each was chosen, was rejected, was no candidate

Deviations from the paper, which does not define its numbers
1. Overlap is read off Table 4: every value is a multiple of 1/500 over k, so it is a mean over 500 prompts. Chance is
   given beside it. Prompts that lack a candidate or a score are left out and counted.
2. The embedding of Figure 6 is not stated: here TF-IDF, which needs nothing, or the text tower of an open_clip folder.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from external import files
from external.flags import file_ending, whole
from external.terminal import printable, set_up_terminal
from pds import candidates, clip_score, figures, rank_images, runner
from pds.runner import Row

EXACT_UP_TO = 3000  # texts, for the quantiles of their cosines
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PAPER = {  # Table 4 and the text of 4.3; RM is ImageReward
    "overlap": {
        "RM & CLIP": {"top1": 36.8, "top2": 59.5, "top3": 79.13},
        "RM & BLIP": {"top1": 31.8, "top2": 53.6, "top3": 77.40},
        "CLIP & BLIP": {"top1": 28.6, "top2": 55.9, "top3": 76.53},
        "RM & CLIP & BLIP": {"top1": 11.8, "top2": 34.2, "top3": 61.87},
    },
    "guidance_share": "7.0 highest, around 30 %; 11.0 below 20 % (art, industrial, school)",
}


# ---- pictures: Table 4 and Figure 4 --------------------------------------------------------------------------------


def complete_prompts(rows: list[Row], scorers: list[str]) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """prompt id -> candidates, of those with every candidate and score; and why the others are left out."""
    prompts = rank_images.by_prompt(rows)
    wanted = max(map(len, prompts.values()))
    complete, left_out = {}, {}
    for prompt, own in prompts.items():
        lacking = []
        for row in own:
            scores = row.get("scores") or {}
            lacking += [
                f"no {name} score for {row['id']}" for name in scorers if not runner.is_number(scores.get(name))
            ]
        if len(own) < wanted:
            left_out[prompt] = f"{len(own)} of {wanted} candidates"
        elif lacking:
            left_out[prompt] = lacking[0]
        else:
            complete[prompt] = own
    return complete, left_out


def top_k_overlap(orders: list[dict[str, list]], scorers: tuple[str, ...], k: int) -> float:
    """100 * mean over prompts of |intersection of the k best| / k. `orders`: {scorer: best first} of each prompt."""
    common = 0
    for order in orders:
        best_sets = [set(order[name][:k]) for name in scorers]
        common += len(set.intersection(*best_sets))
    return 100 * common / (k * len(orders))


def overlaps(prompts: dict[str, list[Row]], scorers: list[str]) -> dict:
    """{"a & b": {top1, top2, ...}, ...} for every group of scorers, and what chance would give."""
    n = max(map(len, prompts.values()))
    orders = [best_first(own, scorers) for own in prompts.values()]
    found, chance = {}, {}
    for size in range(2, len(scorers) + 1):
        for group in combinations(scorers, size):
            name = " & ".join(group)
            found[name], chance[name] = {}, {}
            for k in range(1, n):
                found[name][f"top{k}"] = round(top_k_overlap(orders, group, k), 4)
                # one scorer has a picture among its k best with probability k/n: all have n (k/n)^size of them
                chance[name][f"top{k}"] = round(100 * (k / n) ** (size - 1), 4)
    return {"overlap": found, "chance": chance}


def best_first(candidates_of_one: list[Row], scorers: list[str]) -> dict[str, list]:
    """{scorer: ids of the candidates, best first}."""
    orders = {}
    for name in scorers:
        orders[name] = [row["id"] for row in rank_images.ranked(candidates_of_one, name)]
    return orders


def guidance_share(prompts: dict[str, list[Row]], scorer: str) -> dict:
    """topic -> {n, share of prompts whose best picture has each guidance scale, in %}."""
    scales = sorted({row["guidance"] for own in prompts.values() for row in own})
    winners = {}
    for own in prompts.values():
        best = rank_images.ranked(own, scorer)[0]
        winners.setdefault(best.get("topic", ""), Counter())[best["guidance"]] += 1
    shares = {}
    for topic, counts in sorted(winners.items()):
        n = counts.total()
        shares[topic] = {"n": n} | {f"{scale:g}": round(100 * counts[scale] / n, 4) for scale in scales}
    return shares


def image_scores(rows: list[Row], scorers: list[str]) -> dict[str, list[float]]:
    """scorer -> every score it gave."""
    values = {name: [] for name in scorers}
    for row in rows:
        for name, value in (row.get("scores") or {}).items():
            if runner.is_number(value):
                values[name].append(value)
    return values


def analyse_scores(rows: list[Row]) -> dict:
    """Everything about candidates; the first scorer of the file is the one that chose."""
    scorers = []
    for row in rows:
        scorers += [name for name in row.get("scores") or {} if name not in scorers]
    complete, left_out = complete_prompts(rows, scorers)
    if not complete:
        raise SystemExit(f"no prompt has all its candidates and scores; left out: {left_out}")
    values = image_scores(rows, scorers)
    return {
        "prompts": len(complete),
        "left_out": left_out,
        "scorers": scorers,
        **overlaps(complete, scorers),
        "guidance_share": guidance_share(complete, scorers[0]),
        "scores": {name: summary(torch.tensor(own, dtype=torch.float64)) for name, own in values.items()},
    }


# ---- texts: Figure 6 -----------------------------------------------------------------------------------------------


def summary(values: Tensor) -> dict:
    quantiles = np.quantile(values.numpy(), QUANTILES)
    return {
        "n": len(values),
        "mean": values.mean().item(),
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def tf_idf(texts: list[str]) -> Tensor:
    """Texts -> unit vectors (n, words), sparse: counts times ln((1 + n) / (1 + texts with the word)) + 1."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    with_word = Counter(word for own in counts for word in own)
    column = {word: i for i, word in enumerate(sorted(with_word))}
    weight = {word: math.log((1 + len(texts)) / (1 + with_word[word])) + 1 for word in column}
    places, values = [], []
    for row, own in enumerate(counts):
        length = math.sqrt(sum((count * weight[word]) ** 2 for word, count in own.items()))
        places += [(row, column[word]) for word in own]
        values += [count * weight[word] / length for word, count in own.items()]
    values = torch.tensor(values, dtype=torch.float64)
    return torch.sparse_coo_tensor(
        torch.tensor(places).T, values, (len(texts), len(column)), check_invariants=True
    ).coalesce()


def later_cosines(vectors: Tensor) -> Iterator[Tensor]:
    """Cosines of every unordered pair of unit vectors (n, d), sparse or dense, in blocks of 1000 rows."""
    n = len(vectors)
    for start in range(0, n, 1000):
        rows = torch.arange(start, min(start + 1000, n))  # (b,)
        block = vectors.index_select(0, rows).to_dense()  # (b, d)
        cosines = (vectors @ block.T).T  # (b, n)
        yield cosines[torch.arange(n) > rows[:, None]].clamp(-1, 1)  # (b, n) mask: each pair once


def similarity(vectors: Tensor) -> dict:
    """Cosines of all unordered pairs of unit vectors (n, d): how many, mean, quantiles, histogram.

    36,000 answers are 650 million pairs: above EXACT_UP_TO rows they are only counted, in bins of 0.0005, and the
    quantiles are ends of bins.
    """
    n, bins = len(vectors), 4000
    counts, kept = torch.zeros(bins, dtype=torch.long), []
    for cosines in later_cosines(vectors):
        counts += torch.histc(cosines, bins, -1, 1).long()
        if n <= EXACT_UP_TO:
            kept.append(cosines)
    pairs = n * (n - 1) // 2
    total = vectors.sum(0).to_dense()  # (d,)
    mean = (total.square().sum().item() - n) / (n * (n - 1))  # (|sum u|^2 - n) / (n (n - 1))
    if kept:
        quantiles = np.quantile(torch.cat(kept).numpy(), QUANTILES)
    else:
        ends = torch.linspace(-1, 1, bins + 1)[1:]
        quantiles = ends[torch.searchsorted(counts.cumsum(0), (torch.tensor(QUANTILES) * pairs).long())]
    return {
        "pairs": pairs,
        "mean": mean,
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "histogram": counts.view(40, -1).sum(1).tolist(),  # (4000,) -> (40, 100) -> bins of 0.05
    }


def text_similarity(texts: list[str], embed) -> dict | None:
    """Similarity of the texts that have a word; None if fewer than two do."""
    usable = [text for text in texts if re.search(r"\w", text)]
    if len(usable) < 2:
        return None
    return similarity(embed(usable)) | {"texts": len(usable), "left_out": len(texts) - len(usable)}


# ---- answers -------------------------------------------------------------------------------------------------------


def answer_scores(rows: list[Row]) -> list[float]:
    return [row["score"] for row in rows if runner.is_number(row.get("score"))]


def analyse_answers(rows: list[Row], embed) -> dict:
    """Everything about ranked answers."""
    won, lost, refused, dropped = Counter(), Counter(), {}, Counter()
    for answers in candidates.by_question(rows).values():
        choice = candidates.choose(answers, candidates.Rules())
        for responder, reason in choice.refused.items():
            refused.setdefault(responder, Counter())[reason] += 1
        if choice.dropped:
            dropped[choice.dropped] += 1
        else:
            won[choice.chosen["responder"]] += 1
            lost[choice.rejected["responder"]] += 1
    names = sorted({row["responder"] for row in rows})
    responders = {
        name: {"chosen": won[name], "rejected": lost[name], "no candidate": dict(refused.get(name, {}))}
        for name in names
    }
    scores = answer_scores(rows)
    questions = {str(row["id"]): row["prompt"] for row in rows if "prompt" in row}  # not where pds.ask had failed
    answers = [row["answer"] for row in rows if isinstance(row.get("answer"), str)]
    return {
        "responders": responders,
        "dropped": dict(dropped),
        "scores": summary(torch.tensor(scores, dtype=torch.float64)) if scores else None,
        "similarity": {
            "prompts": text_similarity(list(questions.values()), embed),
            "responses": text_similarity(answers, embed),
        },
    }


# ---- tables for the terminal ---------------------------------------------------------------------------------------


def print_scores(found: dict) -> None:
    print(f"{found['prompts']} prompts, {len(found['left_out'])} left out")
    for prompt, reason in list(found["left_out"].items())[:5]:
        print(f"  {prompt}: {reason}")
    if found["overlap"]:
        print_overlap(found)
    print(f"\nguidance scale of the best picture, % by {found['scorers'][0]}")
    for topic, shares in found["guidance_share"].items():
        cells = "   ".join(f"{scale} {share:5.1f}" for scale, share in shares.items() if scale != "n")
        print(f"  {printable(topic):28s} {cells}   of {shares['n']}")
    print(f"  paper: {PAPER['guidance_share']}")


def print_overlap(found: dict) -> None:
    print("\noverlap of the k best pictures, % (chance); the paper's are of 500 prompts of its own")
    for name, values in found["overlap"].items():
        chance = found["chance"][name]
        print(f"  {name:28s} " + "   ".join(f"{k} {value:6.2f} ({chance[k]:5.2f})" for k, value in values.items()))
    for name, values in PAPER["overlap"].items():
        print(f"  paper: {name:21s} " + "           ".join(f"{k} {value:6.2f}" for k, value in values.items()))


def print_answers(found: dict) -> None:
    print("\nresponder                      chosen  rejected  no candidate")
    for name, counts in found["responders"].items():
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts["no candidate"].items())
        print(f"  {printable(name):28s} {counts['chosen']:6d}  {counts['rejected']:8d}  {reasons or 'none'}")
    print(f"  no pair: {', '.join(f'{n} {reason}' for reason, n in found['dropped'].items()) or 'none'}")
    for what, values in found["similarity"].items():
        if values:
            middle = values["quantiles"]["0.5"]
            print(f"similarity of {what}: mean {values['mean']:.4f}, median {middle:.4f}, {values['pairs']} pairs")


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "input", type=Path, nargs="+", metavar="FILE", help="rows of rank_images, of rank_responses, or both"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    p.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="Figures 4 and 6 and score histograms, needs matplotlib"
    )
    p.add_argument(
        "--sheet",
        type=file_ending(".png"),
        metavar="PNG",
        help="prompts x candidates with their scores, the winner framed",
    )
    p.add_argument("--rows", type=whole(1), default=10, help="prompts on the sheet (default 10)")
    p.add_argument("--embed", metavar="FOLDER", help="open_clip folder or name for the similarity (default TF-IDF)")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: FILE's)")
    args = p.parse_args(argv)
    for file in (args.json, args.sheet, args.figures and args.figures / "responders.png"):
        if file:
            files.check_writable(file, args.input)
    return args


def read_kind(file: Path) -> tuple[str, list[Row]]:
    """What a file holds, "answers" or "images", and its rows, checked."""
    found = files.read_rows(file)
    if any("responder" in row for row in found):
        return "answers", runner.check_inputs(file, found, {"prompt": str, "responder": str})
    if any("scores" in row for row in found):
        rows = runner.check_inputs(file, found, rank_images.NEEDED)
        rank_images.check_scores(file, rows)
        return "images", rows
    raise SystemExit(f"{file}: neither rows of rank_images (`scores`) nor of rank_responses (`responder`)")


def find_embedder(name: str | None):
    """texts -> vectors (n, d)."""
    if name is None:
        return tf_idf
    scorer = clip_score.load(*clip_score.find_weights(name, "--embed"))

    def embed(texts: list[str]) -> Tensor:
        batches = (texts[i : i + 64] for i in range(0, len(texts), 64))
        return torch.cat([scorer.encode_texts(batch).double() for batch in batches])  # unit vectors (n, P)

    return embed


def main(argv=None) -> None:
    args = parse_args(argv)
    found, values, score_rows, image_root = {}, {}, [], args.image_root
    embed = find_embedder(args.embed)
    for file in args.input:
        kind, rows = read_kind(file)
        if kind in found:
            raise SystemExit(f"{file}: a second file of {kind}; `cat` joins the shards of a stage into one file")
        if kind == "answers":
            found["answers"] = analyse_answers(rows, embed) | {"embedder": args.embed or "TF-IDF"}
            values["answers"] = {"judge": answer_scores(rows)}
            print_answers(found["answers"])
        else:
            score_rows, image_root = rows, image_root or file.parent
            found["images"] = analyse_scores(rows)
            values["images"] = image_scores(rows, found["images"]["scorers"])
            print_scores(found["images"])
    if args.json:
        files.write_json(args.json, found | {"paper": PAPER})
    if args.figures:
        figures.draw(found, values, args.figures)
    if args.sheet:
        if not score_rows:
            raise SystemExit("--sheet draws candidates: give the file of rank_images too")
        figures.sheet(score_rows, found["images"]["scorers"], Path(image_root).resolve(), args.sheet, args.rows)


if __name__ == "__main__":
    main()
