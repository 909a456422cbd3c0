"""AMBER (Wang et al. 2023): invented, missed and misjudged things, without a language model as judge.

Generative questions (ids 1-1004, "Describe this image."): CHAIR, Cover, Hal, Cog from the nouns of a description.
Discriminative ones (1005-15220): accuracy, precision, recall, F1 of Yes/No, with No as the positive class. All values
are percentages rounded to one decimal as the official script prints them; its 0.001 offsets are kept.

Deviations:
1. Similar words: the original asks spaCy's en_core_web_lg (cosine > 0.8). Here the similar pairs come from a file made
   with it once (evals.similarity), or `exact` counts equal words only; the result names which.
2. The lemmatizer is a table of what WordNet answers on every word that touches AMBER's vocabulary.
3. The tagger is nltk's own (`--tagger DIR`); `--no-tagger` takes every word for a noun, which is for smoke tests.
4. An answer file must hold every id of the kinds it answers, unless `--partial` is given.

Run: python -m evals.amber --answers amber_g.jsonl amber_d.jsonl --data AMBER/data --tagger DIR --similarity pairs.json
"""

import importlib.util
import operator
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from evals import stats
from evals.stats import Part, ratio
from external import files

SCORER = "evals.amber 1"
WORD = re.compile(r"[A-Za-z0-9]+(?:[-./'][A-Za-z0-9]+)*(?<!'s)|'[A-Za-z]+|[^\sA-Za-z0-9]")
PUBLISHED_MODEL = "en_core_web_lg"  # spaCy's, whose similarity AMBER's script asks
TAGGER_PARTS = ("weights", "tagdict", "classes")  # files of averaged_perceptron_tagger_eng
ATTRIBUTES = ("state", "number", "action")
OFFICIAL = {  # sha256 of the data at AMBER 534babf6
    "annotations.json": "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797",
    "relation.json": "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e",
    "safe_words.txt": "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043",
}


def has_nltk() -> bool:
    return importlib.util.find_spec("nltk") is not None


def load_tagger(folder: str) -> Callable[[str], list[str]]:
    """Text -> nouns, with nltk and the three JSON files of averaged_perceptron_tagger_eng in `folder`."""
    try:
        from nltk.tag.perceptron import PerceptronTagger
        from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
    except ImportError as error:
        raise SystemExit("--tagger needs nltk: pip install nltk (or --no-tagger for a smoke test).") from error
    parts = {}
    for part in TAGGER_PARTS:
        path = Path(folder) / f"averaged_perceptron_tagger_eng.{part}.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; it is in nltk_data's taggers/averaged_perceptron_tagger_eng.zip.")
        parts[part] = files.read_json(path, list if part == "classes" else dict)
    if not parts["classes"]:
        raise SystemExit(f"{folder}: no classes in averaged_perceptron_tagger_eng.classes.json; unpack it again.")
    # filled by hand, because the loader's arguments differ between nltk versions and it searches the home folder
    tagger = PerceptronTagger(load=False)
    tagger.model.weights, tagger.tagdict = parts["weights"], parts["tagdict"]
    tagger.classes = tagger.model.classes = set(parts["classes"])
    sentences, words = PunktSentenceTokenizer(), NLTKWordTokenizer()

    def nouns(text: str) -> list[str]:
        tokens = [token for sentence in sentences.tokenize(text) for token in words.tokenize(sentence)]
        return [token for token, tag in tagger.tag(tokens) if tag.startswith("NN")]

    return nouns


def every_word(text: str) -> list[str]:
    """What `--no-tagger` takes for nouns: all but the modal "can", its most frequent error."""
    return [word for word in WORD.findall(text) if word != "can"]


def load_similarity(source: str) -> Callable[[str, str], bool]:
    """`exact`, or the file of evals.similarity: pairs [a, b] whose similarity is above 0.8 (or a bare list of them)."""
    if source == "exact":
        return operator.eq
    found = files.read_json(source)
    pairs = found.get("pairs") if isinstance(found, dict) else found
    if not isinstance(pairs, list) or not all(stats.is_texts(pair) and len(pair) == 2 for pair in pairs):
        raise SystemExit(f'{source}: must be a JSON list of pairs, such as [["sofa", "couch"]].')
    similar = {frozenset(pair) for pair in pairs}
    return lambda a, b: a == b or frozenset((a, b)) in similar


def similarity_source(source: str) -> dict:
    """What the similar words are from, for the result; `model` is None where the file does not say."""
    if source == "exact":
        return {"source": "exact", "model": None}
    found = files.read_json(source)
    made_with = found.get("made_with") if isinstance(found, dict) else None
    if not isinstance(made_with, dict):
        made_with = {}
    digest = files.sha256(Path(source).read_bytes())
    return {"source": source, "sha256": digest, "model": made_with.get("model"), "version": made_with.get("version")}


def load_data(folder: str) -> tuple[list[dict], dict[str, list[str]], set[str]]:
    """Annotations (id i at i - 1), related words, and the words that are never wrong."""
    annotations = files.read_json(Path(folder) / "annotations.json", list)
    relation = files.read_json(Path(folder) / "relation.json", dict)
    for i, row in enumerate(annotations, 1):
        if not isinstance(row, dict) or row.get("id") != i or not is_annotation(row):
            raise SystemExit(f"{folder}/annotations.json: row {i} is not AMBER's; use the official file.")
    for word, related in relation.items():
        if not stats.is_texts(related):
            raise SystemExit(f"{folder}/relation.json: {word!r} is not AMBER's; use the official file.")
    return annotations, relation, set(files.read_text(Path(folder) / "safe_words.txt").split())


def is_annotation(row: dict) -> bool:
    if row.get("type") == "generative":
        return stats.is_texts(row.get("truth")) and stats.is_texts(row.get("hallu"))
    return isinstance(row.get("type"), str) and row.get("truth") in ("yes", "no")


def category(annotation: dict) -> str:
    """generative, existence, state, number, action or relation, from types like discriminative-attribute-state."""
    return annotation["type"].rpartition("-")[2].replace("hallucination", "existence")


def entries(words: list[str], relation: dict[str, list[str]]) -> list[tuple[str, int]]:
    """(word, index of its entry): related words of all entries first, the entries themselves last, as the original."""
    related = [(other, i) for i, word in enumerate(words) for other in relation.get(word, [])]
    return related + [(word, i) for i, word in enumerate(words)]


def first_entry(words: list[tuple[str, int]], noun: str, same: Callable[[str, str], bool]) -> int | None:
    """The index of the entry that the first word that is the same as the noun stands for."""
    return next((i for word, i in words if same(noun, word)), None)


def score_nouns(nouns: list[str], annotation: dict, relation: dict, safe: set[str], similar: Callable) -> dict:
    """Counts of one response from its lemmatized nouns (case kept: "Ship" is not in the vocabulary)."""
    vocabulary = set(relation).union(*relation.values())
    nouns = [noun for noun in nouns if noun in vocabulary]
    truth = entries(annotation["truth"], relation)
    hallu = entries(annotation["hallu"], relation)
    covered, marked, bad = set(), set(), 0
    for noun in nouns:
        if noun in safe:  # not judged, but stays in the denominator
            continue
        equal = first_entry(truth, noun, operator.eq)
        if equal is not None:
            covered.add(equal)
            continue
        # the first equal and the first similar entry, perhaps two; a noun can count here and still be safe below
        marked.add(first_entry(hallu, noun, operator.eq))
        marked.add(first_entry(hallu, noun, similar))
        close = first_entry(truth, noun, similar)
        covered.add(close)
        if close is None:
            bad += 1
    return {
        "rows": 1,
        "clean": int(bad == 0),
        "bad_nouns": bad,
        "nouns": len(nouns),
        "covered": len(covered - {None}),
        "truth": len(annotation["truth"]),
        "marked": len(marked - {None}),
        "hallu": len(annotation["hallu"]),
    }


def score_answer(answer: str, truth: str) -> dict[str, int]:
    """Counts of one Yes/No question; an answer that is neither is wrong, and is not a No."""
    said_no, truth_no = answer == "No", truth == "no"
    return {
        "questions": 1,
        "right": int(answer == truth.capitalize()),
        "neither": int(answer not in ("Yes", "No")),
        "said_no": int(said_no),
        "truth_no": int(truth_no),
        "right_no": int(said_no and truth_no),
    }


def first_word(answer: str) -> str:
    """Yes or No from "Yes, there is." and the like; anything else stays as it is."""
    word = (re.findall(r"[a-z]+", answer.lower()) or [""])[0]
    return word.capitalize() if word in ("yes", "no") else answer


def generative_metrics(s: dict, offset: float = 0.0) -> dict:
    """Sums -> percentages; numbers or arrays. The intervals are without the official offset and rounding."""
    return {
        "chair": 100 * ratio(s["bad_nouns"], s["nouns"] + offset),
        "cover": 100 * ratio(s["covered"], s["truth"] + offset),
        "hal": 100 - 100 * ratio(s["clean"], s["rows"] + offset),
        "cog": 100 * ratio(s["marked"], s["hallu"] + offset),  # the original code's, not its paper's
    }


def discriminative_metrics(s: dict, offset: float = 0.0) -> dict:
    precision = ratio(s["right_no"], s["said_no"] + offset)
    recall = ratio(s["right_no"], s["truth_no"] + offset)
    return {
        "accuracy": 100 * ratio(s["right"], s["questions"] + offset),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
    }


def printed(metrics: dict) -> dict[str, float]:
    return {name: round(float(value), 1) for name, value in metrics.items()}


def generative_table(s: dict[str, int]) -> dict[str, float]:
    """The printed values: every denominator starts at 0.001."""
    return printed(generative_metrics(s, 0.001))


def discriminative_table(rows: list[dict[str, int]], categories: list[str]) -> dict[str, dict[str, float]]:
    """The printed values per category and over all; attribute pools three counters, so three offsets."""
    groups = {"overall": set(categories), "attribute": ATTRIBUTES}
    groups |= {name: {name} for name in ("existence", *ATTRIBUTES, "relation")}
    table = {}
    for name, group in groups.items():
        members = [row for row, category in zip(rows, categories, strict=True) if category in group]
        if not members:
            continue
        row = printed(discriminative_metrics(stats.sums(members), 0.003 if name == "attribute" else 0.001))
        p, r = row["precision"] / 100, row["recall"] / 100
        row["f1"] = round(2 * p * r / (p + r + (0.001 if name == "existence" else 0.0001)) * 100, 1)
        table[name] = {"n": len(members), **row}
    return table


class Answered(NamedTuple):
    """Answer rows by id, and how many ids each kind that is answered has."""

    rows: dict[int, dict]
    kinds: dict[str, int]


def read_responses(paths: list[str], annotations: list[dict], partial: bool) -> Answered:
    """The rows of all files. A kind that is answered must be complete, unless `partial`."""
    rows = [row for path in paths for row in stats.read_answers(path)]
    answered = stats.check_unique([read_id(row, len(annotations)) for row in rows], rows, "id")
    members = defaultdict(set)
    for annotation in annotations:
        kind = category(annotation)
        members["attribute" if kind in ATTRIBUTES else kind].add(annotation["id"])
    members = {kind: ids for kind, ids in members.items() if ids & answered.keys()}
    wanted = set().union(*members.values())
    if (lost := sorted(wanted - answered.keys())) and not partial:
        raise SystemExit(
            f"{', '.join(paths)}: {len(lost)} of {len(wanted)} ids are not answered, such as {lost[:3]}. Answer them, "
            "or add --partial to score the rest under that name."
        )
    return Answered(dict(sorted(answered.items())), {kind: len(ids) for kind, ids in members.items()})


def read_id(row: dict, last: int) -> int:
    """AMBER's number of an answer, under `id` or `question_id`."""
    for name in ("id", "question_id"):
        found = str(row.get(name, ""))
        if found.isdecimal():
            if 1 <= int(found) <= last:
                return int(found)
            break
    raise SystemExit(f"{row['_where']}: `id` is {row.get('id')!r}, not one of AMBER's 1 to {last}.")


def score(paths: list[str], data: tuple, nouns_of: Callable | None, similar: Callable, args) -> tuple[dict, list[Part]]:
    """The result of the answer files of one model: descriptions, yes-or-no questions, or both."""
    annotations, relation, safe = data
    rows, kinds = read_responses(paths, annotations, args.partial)
    n_expected = sum(kinds.values())
    truth = {key: annotations[key - 1] for key in rows}
    described = [key for key in rows if category(truth[key]) == "generative"]
    asked = [key for key in rows if category(truth[key]) != "generative"]
    partial = " (partial)" if len(rows) < n_expected else ""
    protocol = f"AMBER {', '.join(kinds)}{partial} | Yes/No: {args.yes_no}"
    result = stats.header(SCORER, protocol, paths, list(rows.values()), n_expected)
    result |= {"kinds": kinds, "metrics": {}, "similarity": None, "nouns": None}
    for name, published in OFFICIAL.items():
        file = Path(args.data) / name
        if files.sha256(file.read_bytes()) != published:
            stats.not_comparable(result, f"{file} is not AMBER's published one")
    parts = []
    if described:
        if nouns_of is None:
            raise SystemExit("Descriptions (ids 1-1004) need --tagger DIR, or --no-tagger for a smoke test.")
        forms = stats.word_forms("wordnet_noun_forms.json")
        counts = []
        for key in described:
            nouns = [forms.get(noun, noun) for noun in nouns_of(rows[key]["answer"])]
            counts.append(score_nouns(nouns, truth[key], relation, safe, similar))
        parts.append(Part(described, counts, generative_metrics))
        result["metrics"] = generative_table(stats.sums(counts))
        words = similarity_source(args.similarity)
        result |= {"similarity": words, "nouns": args.tagger or "every word (--no-tagger)"}
        result["rows"] = [{"id": key, **count} for key, count in zip(described, counts, strict=True)]
        if args.no_tagger:
            stats.not_comparable(result, "every word taken for a noun (--no-tagger), published ones by NLTK's tagger")
        if args.similarity == "exact":
            reason = f"equal words only (--similarity exact), published ones by {PUBLISHED_MODEL}"
            stats.not_comparable(result, reason)
        elif words["model"] != PUBLISHED_MODEL:
            reason = f"similar words by {words['model'] or 'an unknown model'}, published ones by {PUBLISHED_MODEL}"
            stats.not_comparable(result, reason)
    if asked:
        counts = [score_answer(read_yes_no(rows[key]["answer"], args.yes_no), truth[key]["truth"]) for key in asked]
        parts.append(Part(asked, counts, discriminative_metrics))
        table = discriminative_table(counts, [category(truth[key]) for key in asked])
        neither = sum(count["neither"] for count in counts)
        result["metrics"] |= {name: value for name, value in table["overall"].items() if name != "n"}
        result |= {"categories": table, "n_neither_yes_nor_no": neither}
        if neither:
            result["warnings"].append(f"{neither} answers are neither Yes nor No and count as wrong (see --yes-no)")
    add_intervals(result, parts)
    return result, parts


def read_yes_no(answer: str, how: str) -> str:
    return first_word(answer) if how == "first-word" else answer


def add_intervals(result: dict, parts: list[Part]) -> None:
    """Intervals of every metric; with both parts also AMBER's own score, the mean of 100 - CHAIR and F1."""
    samples = {}
    for i, part in enumerate(parts):
        samples |= stats.bootstrap(part, stats.SEED + i)
    if len(parts) == 2:
        metrics = result["metrics"]
        metrics["amber_score"] = round((100 - metrics["chair"] + metrics["f1"]) / 2, 2)
        samples["amber_score"] = (100 - samples["chair"] + samples["f1"]) / 2
    result["intervals"] = {name: stats.interval(values) for name, values in samples.items()}


def main(argv: list[str] | None = None) -> None:
    what = "answer files, ours or [{id, response}]; their ids say the kind"
    parser = stats.scorer_flags(__doc__, "--answers", what, "answer files", nargs="+")
    parser.add_argument("--data", required=True, help="folder of annotations.json, relation.json, safe_words.txt")
    parser.add_argument("--similarity", default="exact", help="exact, or the file of evals.similarity")
    tagger = parser.add_mutually_exclusive_group()
    tagger.add_argument("--tagger", metavar="DIR", help="folder of nltk's averaged_perceptron_tagger_eng")
    tagger.add_argument("--no-tagger", action="store_true", help="every word is a noun; for smoke tests")
    parser.add_argument("--yes-no", default="exact", choices=["exact", "first-word"], help="how Yes and No are read")
    parser.add_argument("--partial", action="store_true", help="score fewer ids than the kind has")
    args = parser.parse_args(argv)
    data_files = [Path(args.data) / name for name in OFFICIAL]
    stats.check_json(args.json, [*(args.compare or args.answers), args.similarity, *data_files])
    nouns_of = every_word if args.no_tagger else None
    if args.tagger:
        nouns_of = load_tagger(args.tagger)
    data, similar = load_data(args.data), load_similarity(args.similarity)
    compared = [[path] for path in args.compare] if args.compare else [args.answers]
    scored = [score(paths, data, nouns_of, similar, args) for paths in compared]
    for result, _ in scored:
        for name, row in result.get("categories", {}).items():
            print(f"{name:12s}" + " | ".join(f"{key} {value}" for key, value in row.items()))
    stats.report(scored, args.json)


if __name__ == "__main__":
    main()
