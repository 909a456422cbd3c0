"""evals/similarity.py: which words are compared, and what the file of pairs says; a stand-in for spaCy's vectors."""

import json
import sys
from types import SimpleNamespace

import pytest

from evals import amber, similarity

VECTORS = {"sofa": 0.0, "couch": 0.1, "lake": 5.0, "sea": 5.25, "road": 9.0}  # on a line: similarity 1 - distance


class Word:
    def __init__(self, text: str):
        self.at = VECTORS[text]

    def similarity(self, other: "Word") -> float:
        return 1 - abs(self.at - other.at)


@pytest.fixture
def data(tmp_path):
    """Words in a key, in a value, among truths and among inventions; a question that is no description."""
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sofa"], "hallu": ["sea"]},
        {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    (tmp_path / "relation.json").write_text(json.dumps({"couch": [], "lake": ["road"]}))
    (tmp_path / "safe_words.txt").write_text("snack")
    return tmp_path


def test_pairs_above_the_threshold_of_all_words_that_can_be_compared(data):
    words = similarity.vocabulary(str(data))
    assert words == ["couch", "lake", "road", "sea", "sofa"]
    # couch-sofa 1 - 0.1 = 0.9, lake-sea 1 - 0.25 = 0.75, all others below 0
    assert similarity.similar_pairs(words, Word) == [["couch", "sofa"]]


def test_the_file_is_what_the_scorer_reads_and_names_its_model(data, monkeypatch):
    out = data / "pairs.json"
    pipeline = type("Pipeline", (), {"__call__": lambda self, text: Word(text), "meta": {"version": "3.7.1"}})()
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: pipeline))
    similarity.main(["--data", str(data), "--out", str(out)])
    similar = amber.load_similarity(str(out))
    assert similar("sofa", "couch") and similar("couch", "sofa") and not similar("sofa", "lake")
    source = amber.similarity_source(str(out))
    assert (source["model"], source["version"]) == ("en_core_web_lg", "3.7.1") and len(source["sha256"]) == 64
    (data / "bare.json").write_text('[["sofa", "couch"]]')  # a list of one's own: nothing is known of it
    assert amber.similarity_source(str(data / "bare.json"))["model"] is None


def test_what_is_missing_is_named(data, monkeypatch):
    argv = ["--data", str(data), "--out", str(data / "pairs.json")]
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(SystemExit, match="pip install spacy"):
        similarity.main(argv)

    def no_model(name):
        raise OSError

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=no_model))
    with pytest.raises(SystemExit, match="python -m spacy download en_core_web_lg"):
        similarity.main(argv)
    assert not (data / "pairs.json").exists()
