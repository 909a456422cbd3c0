"""Compares the scorers with what the official scorers wrote down for the same made-up inputs, value by value.

    python -m tests.oracles_eval --oracles DIR --data DIR

--oracles holds chair/, objhal/, pope/, amber/, mmhal/ (or a folder eval/ of them), each with an expected.json; --data
the official synonym lists (chair/) and AMBER's files (amber/). One PASS or FAIL line per comparison, exit status 1 on
a failure. Scores must be equal, not close. Not collected by pytest, whose tests build small cases by hand.
"""

import argparse
import sys
from pathlib import Path

import eval_chair
from evals import amber, extractor, mmhal, pope, stats
from external import files

FAILED = []


def check(name: str, ours, theirs) -> None:
    print("PASS" if ours == theirs else "FAIL", name if ours == theirs else f"{name}: {ours} instead of {theirs}")
    if ours != theirs:
        FAILED.append(name)


def chair(folder: Path, data: Path) -> None:
    expected = files.read_json(folder / "chair" / "expected.json")["expected"]
    rows = stats.read_answers(folder / "chair" / "captions.json")
    vocabulary = eval_chair.load_vocabulary(data / "chair" / "synonyms.txt", "chair2018")
    ids = [eval_chair.image_id(row) for row in rows]
    truth = eval_chair.load_truth(folder / "chair" / "annotations", ids, vocabulary)
    pairs = [eval_chair.text_objects(row["answer"], vocabulary) for row in rows]
    per_caption = [expected["per_caption"][str(key)] for key in ids]
    check("chair: ground truth of every picture", [sorted(gt) for gt in truth], [c["gt"] for c in per_caption])
    said = [[node for _, node in pair] for pair in pairs]
    check("chair: objects of every caption", said, [c["generated_nodes"] for c in per_caption])
    bad = [[list(pair) for pair in said if pair[1] not in gt] for said, gt in zip(pairs, truth, strict=True)]
    check("chair: hallucinated mentions of every caption", bad, [c["hallucinated"] for c in per_caption])
    scores = eval_chair.chair_scores(said, truth)
    for name, key in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "recall_derived")):
        check(f"chair: {name}", scores[name], expected[key])
    names = ("n", "n_hallucinated", "n_mentions", "n_hallucinated_mentions")
    keys = ("captions", "hallucinated_captions", "coco_words", "hallucinated_words")
    check("chair: counts", [scores[n] for n in names], [expected["counts"][k] for k in keys])


def objhal(folder: Path, data: Path) -> None:
    expected = files.read_json(folder / "objhal" / "expected.json")
    replies = files.read_json(folder / "objhal" / "extractor_replies.json")
    rows = stats.read_answers(folder / "objhal" / "obj_halbench_answer.jsonl")
    vocabulary = eval_chair.load_vocabulary(data / "chair" / "synonyms_refine.txt", "objhal")
    ids = [eval_chair.image_id(row) for row in rows]
    truth = eval_chair.load_truth(folder / "chair" / "annotations", ids, vocabulary)
    for mode in ("no_gpt", "gpt"):
        per_response = [expected[mode]["per_response"][str(key)] for key in ids]
        if mode == "no_gpt":
            pairs = [eval_chair.text_objects(row["answer"], vocabulary) for row in rows]
        else:
            pairs = [eval_chair.noun_objects(r["objs"], vocabulary) for r in per_response]
            parsed = [extractor.reply_objects(replies[str(k)]) if str(k) in replies else [] for k in ids]
            check("objhal gpt: reply parser", parsed, [r["extract_objs"] for r in per_response])
        check(f"objhal {mode}: ground truth", [sorted(gt) for gt in truth], [r["gt"] for r in per_response])
        listed = [[list(pair) for pair in said] for said in pairs]
        check(f"objhal {mode}: mentions of every response", listed, [r["generated"] for r in per_response])
        scores = eval_chair.chair_scores([[node for _, node in said] for said in pairs], truth)
        theirs = expected[mode]["overall_metrics"]
        names = {"chair_s": "CHAIRs", "chair_s_refine": "CHAIRs_refine", "chair_i": "CHAIRi", "recall": "obj_rec"}
        names |= {"n": "sentence_num", "n_with_object": "coco_sentence_num", "n_recalled": "coco_word_count"}
        for name, key in names.items():
            check(f"objhal {mode}: {name}", scores[name], theirs[key])
        header = stats.header("", "", [], rows)
        check(f"objhal {mode}: mean words", header["mean_words"], theirs["avg_word_len"])


def check_pope(folder: Path) -> None:
    expected = files.read_json(folder / "pope" / "expected.json")
    splits = ("random", "popular", "adversarial")
    answers = [str(folder / "pope" / f"answers_{split}.jsonl") for split in splits]
    labels = [str(folder / "pope" / f"labels_{split}.jsonl") for split in splits]
    result, _ = pope.score(answers, labels)
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    keys = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
    for split in splits:
        ours, theirs = result["splits"][f"labels_{split}"], expected[split]
        check(f"pope {split}: every answer", [row["said"] for row in ours["rows"]], theirs["parsed_answers"])
        for name, key in zip(names, keys, strict=True):
            check(f"pope {split}: {name}", ours["metrics"][name], theirs["metrics"][key])
        counts = [ours["counts"][k.lower()] for k in ("TP", "FP", "TN", "FN")]
        check(f"pope {split}: counts", counts, [theirs["metrics"][k] for k in ("TP", "FP", "TN", "FN")])
    for key, value in expected["mean_over_splits"].items():
        check(f"pope mean: {key}", result["metrics"][dict(zip(keys, names, strict=True))[key]], value)


def toy_similarity(folder: Path):
    vectors = {word: dict(v) for word, v in files.read_json(folder / "toy_vectors.json")["vectors"].items()}

    def similar(a: str, b: str) -> bool:
        u, v = vectors.get(a, {}), vectors.get(b, {})
        return a == b or sum(x * v.get(i, 0.0) for i, x in u.items()) > 0.8

    return similar


def check_amber(folder: Path, data: Path) -> None:
    folder = folder / "amber"
    expected = files.read_json(folder / "expected.json")
    annotations, relation, safe = amber.load_data(data / "amber")
    similarity = {"exact": amber.load_similarity("exact"), "toy": toy_similarity(folder)}
    keys = {"bad_nouns": "chair_score", "nouns": "chair_num", "covered": "safe_cover_score", "truth": "safe_cover_num"}
    keys |= {"marked": "hallu_cover_score", "hallu": "hallu_cover_num", "clean": "non_hallu_score"}
    for mode, similar in similarity.items():
        theirs = expected[f"generative_{mode}"]
        ours = {
            key: amber.score_nouns(response["nouns"], annotations[int(key) - 1], relation, safe, similar)
            for key, response in theirs["per_response"].items()
        }
        for name, key in keys.items():
            found = [counts[name] for counts in ours.values()]
            check(f"amber {mode}: {key} of every response", found, [r[key] for r in theirs["per_response"].values()])
        table = amber.generative_table({n: sum(c[n] for c in ours.values()) for n in (*keys, "rows")})
        for name, value in theirs["printed"].items():
            check(f"amber {mode}: printed {name}", table[name.lower()], value)
    args = argparse.Namespace(partial=True, yes_no="exact", tagger=None, no_tagger=False, similarity="exact")
    args.data = data / "amber"
    data = (annotations, relation, safe)
    result, _ = amber.score([str(folder / "discriminative.json")], data, None, similarity["exact"], args)
    ours_of = {"Descriminative": "overall", "Exsitence": "existence"}
    for mode in ("d", "de", "da", "dr"):
        for name, row in expected[f"discriminative_{mode}"]["printed"].items():
            ours = result["categories"][ours_of.get(name, name.lower())]
            check(f"amber {mode}: printed {name}", {key: ours[key.lower()] for key in row}, row)


def check_mmhal(folder: Path) -> None:
    expected = files.read_json(folder / "mmhal" / "expected.json")
    reviews = str(folder / "mmhal" / "reviews.mmhal_test_eval.json")
    result, _ = mmhal.score(reviews, argparse.Namespace(answers=None, prompt=None))
    scores = [row["rating"] or 0 for row in result["rows"]]
    check("mmhal: every score", scores, expected["scores"])
    check("mmhal: every flag", [int(score < 3) for score in scores], expected["hallucination_flags"])
    check("mmhal: replies without a rating", result["reviews"]["n_without_rating"], expected["warnings"])
    exact, printed = expected["exact"], expected["printed"]
    check("mmhal: average", result["metrics"]["score"], exact["average"])
    check("mmhal: hallucination rate", result["metrics"]["hallucination_rate"], exact["hallucination_rate"])
    check("mmhal: types", list(result["per_type"].values()), exact["per_type"])
    check("mmhal: names of the types", list(result["per_type"]), expected["question_types"])
    check("mmhal: printed average", f"{result['metrics']['score']:.2f}", printed["average"])
    check("mmhal: printed types", [str(round(x, 2)) for x in result["per_type"].values()], printed["per_type"])
    percent = 100 * result["metrics"]["informativeness"]
    check("mmhal: informativeness", round(percent, 10), round(expected["rlhfv_informativeness_percent"], 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--oracles", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    folder = args.oracles / "eval" if (args.oracles / "eval").is_dir() else args.oracles
    chair(folder, args.data)
    objhal(folder, args.data)
    check_pope(folder)
    check_amber(folder, args.data)
    check_mmhal(folder)
    print(f"{len(FAILED)} failed")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
