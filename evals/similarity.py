"""AMBER's similar words, made once with spaCy's en_core_web_lg, so that scoring needs neither.

    python -m venv spacy && spacy/bin/pip install spacy tqdm numpy
    spacy/bin/python -m spacy download en_core_web_lg
    spacy/bin/python -m evals.similarity --data AMBER/data --out amber_pairs.json

AMBER's script takes two words for the same when their cosine is above 0.8. All words it can compare are in its own
files, some 420, so the pairs are a short list. The file says which model made it; evals.amber puts that and the file's
hash into its result. An environment of its own is needed for this command alone (it imports numpy, tqdm, spacy).

Deviations: none; a word that the model has no vector for is similar to nothing, as there.
"""

import argparse
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from evals.amber import PUBLISHED_MODEL, load_data
from external import files
from external.progress import progress
from external.terminal import set_up_terminal

THRESHOLD = 0.8


def vocabulary(folder: str) -> list[str]:
    """Every word that AMBER's files hold, in order: what a noun may be, and what it is compared with."""
    annotations, relation, _ = load_data(folder)
    words = set(relation).union(*relation.values())
    for annotation in annotations:
        if annotation["type"] == "generative":
            words.update(annotation["truth"], annotation["hallu"])
    return sorted(words)


def similar_pairs(words: list[str], parse: Callable) -> list[list[str]]:
    """[a, b], a before b, of all words whose similarity is above THRESHOLD; `parse` is a spaCy pipeline."""
    parsed = {word: parse(word) for word in progress(words, "words")}
    pairs = []
    for a, b in progress(combinations(words, 2), "pairs", len(words) * (len(words) - 1) // 2):
        if parsed[a].similarity(parsed[b]) > THRESHOLD:
            pairs.append([a, b])
    return pairs


def load_pipeline(model: str):
    try:
        import spacy
    except ImportError:
        raise SystemExit("This needs spaCy: pip install spacy, best in an environment of its own.") from None
    try:
        return spacy.load(model)
    except OSError:
        raise SystemExit(f"spaCy has no {model}: python -m spacy download {model}") from None


def main(argv: list[str] | None = None) -> None:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", required=True, help="AMBER's data folder: annotations.json, relation.json, safe_words.txt")
    p.add_argument("--out", type=Path, required=True, help="file for the pairs")
    p.add_argument("--model", default=PUBLISHED_MODEL, help=f"spaCy model (default {PUBLISHED_MODEL}, AMBER's own)")
    args = p.parse_args(argv)
    files.check_writable(args.out)
    words = vocabulary(args.data)
    pipeline = load_pipeline(args.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one for each word without a vector
        pairs = similar_pairs(words, pipeline)
    made_with = {"model": args.model, "version": pipeline.meta["version"], "threshold": THRESHOLD}
    files.write_json(args.out, {"made_with": made_with, "words": len(words), "pairs": pairs})
    print(f"{args.out}: {len(pairs)} similar pairs of {len(words)} words, by {args.model} {pipeline.meta['version']}")


if __name__ == "__main__":
    main()
