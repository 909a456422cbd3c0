"""CHAIR (Rohrbach et al. 2018) and Object HalBench (RLHF-V, Yu et al. 2023): which objects does a caption invent?

Both find the 80 COCO objects in a text by a list of synonyms and compare with the instances and reference captions of
the picture. Object HalBench has 300 answers, its own list, WordNet lemmas, and (as published) a language model that
lists the objects first.

CHAIR_s has two denominators, so it has two names here (`chair_metrics`):

    chair_s         answers that invent an object / all answers                       CHAIR 2018, and our toy world
    chair_s_refine  answers that invent an object / answers that name an object       Object HalBench, as it publishes

mDPO's Table 1 says "CHAIR_s on Object HalBench" and no denominator; `lab/report.py` puts `chair_s_refine` beside it.

Deviations:
1. `pattern.en.singularize` and the WordNet lemmatizer are replaced by tables of what they answer on every word that
   touches the synonym lists, the tokenizer by one regular expression (1 of 20,000 captions differs).
2. With an extractor, the prompt is ours, any model may answer (the original is switched off), and compound nouns are
   found by a plain rule, not by a part-of-speech tagger. Such numbers compare with each other, not with papers.
3. Code fences around a reply are dropped before it is read. Answer files called *coh* get no special trimming.
4. COCO's train split is read only when an answered picture is not in val; no picture is in both, so nothing changes.

Run: python eval_chair.py --answers answers.jsonl --annotations coco/annotations --synonyms synonyms_refine.txt
     --protocol objhal [--extractor URL --extractor-model M] [--json result.json]
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from evals import stats
from evals.extractor import extract
from evals.stats import Part, ratio
from external import endpoint, files

SCORER = "eval_chair.py 1"

# ---- the scores ----------------------------------------------------------------------------------------------------

DENOMINATORS = {
    "chair_s": "answers that invent an object / all answers (CHAIRs)",
    "chair_s_refine": "answers that invent an object / answers that name an object (Response Hall, as published)",
    "chair_i": "invented mentions / all mentions, pooled over answers (CHAIRi, Object Hall)",
    "recall": "true objects that were named / all true objects, pooled over answers",
    "mean_objects": "mentions / answers",
}


def chair_counts(said: list[str], truth: set[str]) -> dict[str, int]:
    """A caption's share of every sum the scores are made of. A mention is hallucinated iff it is not in truth."""
    invented = [node for node in said if node not in truth]
    return {
        "n": 1,
        "n_with_object": int(len(said) > 0),
        "n_hallucinated": int(len(invented) > 0),
        "n_mentions": len(said),
        "n_hallucinated_mentions": len(invented),
        "n_truth": len(truth),
        "n_recalled": len(truth.intersection(said)),
    }


def chair_metrics(s: dict) -> dict:
    """Sums over captions -> scores; numbers or arrays."""
    return {
        "chair_s": ratio(s["n_hallucinated"], s["n"]),
        "chair_s_refine": ratio(s["n_hallucinated"], s["n_with_object"]),
        "chair_i": ratio(s["n_hallucinated_mentions"], s["n_mentions"]),
        "recall": ratio(s["n_recalled"], s["n_truth"]),
        "mean_objects": ratio(s["n_mentions"], s["n"]),
    }


def chair_scores(mentions: list[list[str]], truth: list[set[str]]) -> dict:
    """Scores from node words: mentions[i] as said in caption i, in order, with repetitions; truth[i] what is there.

    Fractions 0..1 (DENOMINATORS says of what), None where the denominator is 0; and the counts behind them.
    """
    part = chair_part(list(range(len(mentions))), mentions, truth)
    return stats.values(part) | stats.sums(part.rows)


def chair_part(ids: list[int], mentions: list[list[str]], truth: list[set[str]]) -> Part:
    counts = [chair_counts(said, true) for said, true in zip(mentions, truth, strict=True)]
    return Part(ids, counts, chair_metrics)


# ---- text -> objects -----------------------------------------------------------------------------------------------

WORD = re.compile(r"[a-z0-9]+(?:[-./'][a-z0-9]+)*(?<!'s)|'[a-z]+|[^\sa-z0-9]")
OFFICIAL_SYNONYMS = {
    "chair2018": "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2",
    "objhal": "681041d2958d7871ed6fa69c3108f34aa6a0a354eb53ed4c5a425e65f86bc72a",
}
# CHAIR 2018's two-word names ("stove top oven" never matches). Home plate and train track only hide their words.
PAIRS_2018 = (
    "traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,parking meter,suit case,sports ball,"
    "baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,mobile phone,teddy bear,hair drier,"
    "potted plant,bow tie,laptop computer,motor bike,motor cycle,air plane,home plate,train track"
).split(",")
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
OTHER_PAIRS = {
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # the 2018 singular of "glass" is "glas"
}


class Vocabulary(NamedTuple):
    node: dict[str, str]  # synonym -> its COCO object ("puppy" -> "dog")
    pairs: dict[str, str]  # two words -> the word they become ("bow tie" -> "tie")
    forms: dict[str, str]  # token -> singular or lemma


def load_vocabulary(synonyms: str, protocol: str) -> Vocabulary:
    """synonyms: one line per COCO object, the object's name first."""
    node = {}
    for line in files.read_text(synonyms).strip().split("\n"):
        if protocol == "chair2018":
            # at ", " and nothing else, so that " motor bike" after a double blank never matches: the published numbers
            # have it so
            names = line.strip().split(", ")
        else:
            names = [name.strip() for name in line.split(",")]
        node.update(dict.fromkeys(names, names[0]))
    if protocol == "chair2018":
        pair_names = PAIRS_2018
    else:
        pair_names = [name for name in node if " " in name] + ["home plate", "train track"]
    pairs = {name: name for name in pair_names}
    for animal in ANIMALS:
        pairs[f"baby {animal}"] = animal
        pairs[f"adult {animal}"] = animal
    table = "chair_singular_forms.json" if protocol == "chair2018" else "wordnet_noun_forms.json"
    return Vocabulary(node, pairs | OTHER_PAIRS, stats.word_forms(table))


def merge_pairs(words: list[str], pairs: dict[str, str]) -> list[str]:
    """Joins two-word names from left to right; a word belongs to one name only."""
    merged, i = [], 0
    while i < len(words):
        pair = pairs.get(" ".join(words[i : i + 2]))
        merged.append(pair or words[i])
        i += 2 if pair else 1
    return merged


def known_objects(words: list[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """(word, object) of every word in the list of synonyms; with a toilet anywhere, a seat is part of the toilet."""
    if "toilet" in words:
        words = [word for word in words if word != "seat"]
    return [(word, vocabulary.node[word]) for word in words if word in vocabulary.node]


def text_objects(text: str, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every mention of a COCO object in a text, in order, with repetitions."""
    words = [vocabulary.forms.get(word, word) for word in WORD.findall(text.lower())]
    return known_objects(merge_pairs(words, vocabulary.pairs), vocabulary)


# ---- objects listed by a language model ----------------------------------------------------------------------------

# Words that end a compound noun or only describe one; they stand in for the original's part-of-speech tagger.
NOT_A_NOUN = frozenset(
    "a an the of on in at with and or by for from to near next his her their its some several many few one two three "
    "four five six seven eight nine ten large big small little tiny tall short long old young new black white red blue "
    "green yellow brown orange gray grey pink purple silver golden dark light bright wooden open empty full various "
    "other adult stuffed colorful - / ' . ,".split()
)


def phrase_nouns(name: str, vocabulary: Vocabulary) -> list[str]:
    """Nouns of one extracted name: its known pairs if there are any, else runs of words that are not NOT_A_NOUN."""
    words = [vocabulary.forms.get(word, word) for word in WORD.findall(name.lower())]
    words = ["man" if word == "men" else word for word in words]  # the tagger's lemma; WordNet alone keeps "men"
    neighbours = [" ".join(two) for two in zip(words, words[1:], strict=False)]
    if found := [vocabulary.pairs[pair] for pair in neighbours if pair in vocabulary.pairs]:
        return found
    runs = " ".join("|" if word in NOT_A_NOUN else word for word in words).split("|")
    nouns = [run.strip() for run in runs if run.strip()]
    return nouns or words[-1:]  # a name of nothing but describing words ("orange", "light") ends in a noun after all


def noun_objects(nouns: list[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """With an extractor a word counts once per answer: "man" and "woman" are two mentions, "man" twice is one."""
    return known_objects(list(dict.fromkeys(nouns)), vocabulary)


# ---- what is in the pictures ---------------------------------------------------------------------------------------


def load_truth(annotations: str, image_ids: list[int], vocabulary: Vocabulary) -> list[set[str]]:
    """Objects of each picture: its COCO instances, and what its reference captions mention."""
    truth = {image_id: set() for image_id in image_ids}
    known = set()
    for split in ("val2014", "train2014"):
        if known.issuperset(truth):
            break
        instances = files.read_json(f"{annotations}/instances_{split}.json", dict)
        captions = files.read_json(f"{annotations}/captions_{split}.json", dict)
        try:
            known.update(image["id"] for image in instances["images"] + captions["images"])
            objects = {category["id"]: category["name"] for category in instances["categories"]}
            for row in instances["annotations"]:
                if row["image_id"] in truth:
                    truth[row["image_id"]].add(vocabulary.node[objects[row["category_id"]]])
            for row in captions["annotations"]:
                if row["image_id"] in truth:
                    truth[row["image_id"]].update(node for _, node in text_objects(row["caption"], vocabulary))
        except (KeyError, TypeError) as error:
            raise SystemExit(
                f"{annotations}: instances_{split}.json and captions_{split}.json are not COCO's, or their objects are "
                f"not in --synonyms ({type(error).__name__}: {error})"
            ) from None
    if missing := [image_id for image_id in image_ids if image_id not in known]:
        raise SystemExit(f"{annotations}: {len(missing)} answered pictures have no annotations, such as {missing[:3]}.")
    return [truth[image_id] for image_id in image_ids]


def image_id(row: dict) -> int:
    """The COCO number: `image_id`, or the end of a COCO file name."""
    found = re.fullmatch(r"\d+", str(row.get("image_id", "")))
    found = found or re.search(r"(?<!\d)\d{12}(?=\.\w+$)", str(row.get("image", "")))
    if not found:
        raise SystemExit(f"{row['_where']}: no `image_id`, and `image` is not a COCO file name; add the COCO number.")
    return int(found[0])


# ---- answers -> result ---------------------------------------------------------------------------------------------


def score(path: str, replies: str | None, vocabulary: Vocabulary, args: argparse.Namespace) -> tuple[dict, list[Part]]:
    """The result of one answer file; `replies` is where the language model's lists are, if it is asked."""
    rows = stats.read_answers(path)
    ids = [image_id(row) for row in rows]
    stats.check_unique(ids, rows, "image")
    if args.protocol == "objhal":
        for row in rows:
            row["answer"] = row["answer"].replace("Assistant:", "").strip()
    truth = load_truth(args.annotations, ids, vocabulary)
    if replies:
        names = extract(rows, ids, replies, endpoint.from_flags(args, args.url, args.model))
        nouns = [[noun for name in listed for noun in phrase_nouns(name, vocabulary)] for listed in names]
        pairs = [noun_objects(said, vocabulary) for said in nouns]
        protocol = f"Object HalBench, objects listed by {args.model or 'saved replies'}"
    else:
        pairs = [text_objects(row["answer"], vocabulary) for row in rows]
        protocol = "CHAIR 2018" if args.protocol == "chair2018" else "Object HalBench, no language model"
    part = chair_part(ids, [[node for _, node in said] for said in pairs], truth)
    result = stats.header(SCORER, protocol, [path], rows, 300 if args.protocol == "objhal" else None)
    if args.protocol == "objhal":
        stats.not_comparable(result, f"{protocol}: published numbers had theirs listed by gpt-3.5-turbo-0613")
    digest = files.sha256(Path(args.synonyms).read_bytes())
    if digest != OFFICIAL_SYNONYMS[args.protocol]:
        stats.not_comparable(result, f"{args.synonyms} is not the official list for {args.protocol}")
    result |= {
        "synonyms_sha256": digest,
        "replies": replies,
        "denominators": DENOMINATORS,
        **stats.summary(part),
        "counts": stats.sums(part.rows),
        "rows": [{"id": key, "mentions": pairs[i], "truth": sorted(truth[i])} for i, key in enumerate(ids)],
    }
    return result, [part]


def main(argv: list[str] | None = None) -> None:
    what = "answers.jsonl, an Object HalBench answer file or COCO captions"
    parser = stats.scorer_flags(__doc__, "--answers", what, "answer files")
    parser.add_argument("--annotations", required=True, help="folder of instances_ and captions_{train,val}2014.json")
    parser.add_argument("--synonyms", required=True, help="synonyms.txt (chair2018) or synonyms_refine.txt (objhal)")
    parser.add_argument("--protocol", required=True, choices=["chair2018", "objhal"])
    parser.add_argument("--extractor", dest="url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--extractor-model", dest="model", help="name of the model there")
    parser.add_argument("--replies", nargs="+", help="its saved replies, a file per answer file (ANSWERS.replies.json)")
    endpoint.add_flags(parser)
    args = parser.parse_args(argv)
    paths = args.compare or [args.answers]
    if (args.url or args.replies) and args.protocol != "objhal":
        parser.error("--extractor and --replies belong to --protocol objhal")
    if args.url and not args.model:
        parser.error("--extractor needs --extractor-model")
    replies = args.replies
    if not replies:
        replies = [str(Path(path).with_suffix(".replies.json")) if args.url else None for path in paths]
    if len(replies) != len(paths):
        parser.error("--replies needs one file per answer file")
    stats.check_json(args.json, [*paths, *replies, args.synonyms, *Path(args.annotations).glob("*.json")])
    vocabulary = load_vocabulary(args.synonyms, args.protocol)
    scored = [score(path, reply, vocabulary, args) for path, reply in zip(paths, replies, strict=True)]
    stats.report(scored, args.json)


if __name__ == "__main__":
    main()
