"""AMBER: nouns against the annotations, Yes/No with No as the positive class, the printed values, the files."""

import json
import sys

import pytest

from evals import amber
from evals.amber import discriminative_table, first_word, generative_table, load_similarity, score_answer, score_nouns

RELATION = {"sea": ["lake", "water"], "lake": [], "dog": ["puppy"], "cat": [], "sofa": [], "couch": [], "camera": []}
EXACT = load_similarity("exact")
TYPES = ["discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation", "relation"]


@pytest.fixture
def data(tmp_path):
    """Ids 1, 2 are descriptions; 3, 4 existence, 5, 6 state, 7, 8 relation."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"type": "generative", "truth": ["sea", "dog"], "hallu": ["cat"]},
        {"type": "generative", "truth": ["sofa"], "hallu": ["dog", "cat"]},
        {"type": TYPES[0], "truth": "no"},
        {"type": TYPES[0], "truth": "no"},
        {"type": TYPES[1], "truth": "yes"},
        {"type": TYPES[1], "truth": "no"},
        {"type": TYPES[2], "truth": "yes"},
        {"type": TYPES[3], "truth": "no"},
    ]
    (folder / "annotations.json").write_text(json.dumps([{"id": i, **row} for i, row in enumerate(rows, 1)]))
    (folder / "relation.json").write_text(json.dumps(RELATION))
    (folder / "safe_words.txt").write_text("camera\nlight")
    return str(folder)


def run(tmp_path, data: str, rows: dict[int, str], *more: str) -> dict:
    (tmp_path / "a.json").write_text(json.dumps([{"id": i, "response": text} for i, text in rows.items()]))
    argv = ["--answers", str(tmp_path / "a.json"), "--data", data, "--json", str(tmp_path / "r.json"), *more]
    amber.main(argv)
    return json.loads((tmp_path / "r.json").read_text())


def count(nouns: str, truth: str, hallu: str = "", similar=EXACT) -> tuple[int, int, int, int]:
    """(invented, nouns, covered, marked)"""
    annotation = {"truth": truth.split(), "hallu": hallu.split()}
    c = score_nouns(nouns.split(), annotation, RELATION, {"camera"}, similar)
    assert (c["truth"], c["hallu"], c["clean"]) == (len(truth.split()), len(hallu.split()), int(c["bad_nouns"] == 0))
    return c["bad_nouns"], c["nouns"], c["covered"], c["marked"]


def test_words_outside_the_vocabulary_and_capitals_fall_out():
    assert count("Dog zebra dog dog", "dog") == (0, 2, 1, 0)


def test_safe_words_are_never_wrong_but_stay_in_the_denominator():
    assert count("camera cat", "dog") == (1, 2, 0, 0)


def test_related_words_come_before_the_truth_itself():
    # "lake" is related to sea, so it covers sea (index 0), not lake: only one of the two entries is covered
    assert count("lake lake", "sea lake") == (0, 2, 1, 0)
    assert count("lake sea", "lake sea") == (0, 2, 1, 0)


def test_a_double_truth_entry_is_covered_once():
    assert count("dog dog", "dog dog") == (0, 2, 1, 0)


def test_likely_inventions_are_marked_once_and_are_wrong():
    assert count("cat cat puppy", "sofa", "cat dog") == (3, 3, 0, 2)


def test_a_similar_word_can_be_marked_and_safe_at_once(tmp_path):
    (tmp_path / "pairs.json").write_text('[["couch", "sofa"], ["cat", "couch"]]')
    similar = load_similarity(str(tmp_path / "pairs.json"))
    assert (
        similar("sofa", "couch") and similar("couch", "sofa") and similar("cat", "cat") and not similar("cat", "sofa")
    )
    # couch is close to sofa (truth) and to cat (likely invention)
    assert count("couch", "sofa", "cat", similar) == (0, 1, 1, 1)
    assert count("couch", "sofa", "cat") == (1, 1, 0, 0)  # exact words only
    # equal to the second entry and close to the first: both are marked
    assert count("couch", "dog", "cat couch", similar) == (1, 1, 0, 2)


def test_a_similarity_file_must_be_pairs(tmp_path):
    (tmp_path / "pairs.json").write_text('{"sofa": "couch"}')
    with pytest.raises(SystemExit, match="must be a JSON list of pairs"):
        load_similarity(str(tmp_path / "pairs.json"))


def test_generative_table_keeps_the_offsets():
    sums = {"bad_nouns": 1, "nouns": 3, "covered": 2, "truth": 3, "clean": 1, "rows": 2, "marked": 0, "hallu": 0}
    # 1/3.001 = 33.32, 2/3.001 = 66.64, 100 - 1/2.001 = 50.02, 0/0.001 = 0
    assert generative_table(sums) == {"chair": 33.3, "cover": 66.6, "hal": 50.0, "cog": 0.0}


def test_no_is_the_positive_class_and_other_words_are_wrong():
    answers = ["No", "Yes", "no", "No.", "", "Yes", "No"]
    truths = ["no", "no", "no", "no", "no", "yes", "yes"]
    rows = [score_answer(a, t) for a, t in zip(answers, truths, strict=True)]
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    # right: the first No and the sixth Yes; "no", "No." and "" are neither
    assert total == {"questions": 7, "right": 2, "said_no": 2, "truth_no": 5, "right_no": 1, "neither": 3}


def test_discriminative_table_rounds_before_f1():
    rows = [score_answer(a, "no") for a in ("No", "Yes") * 20]
    # existence: 20/40.001 = 50.0, P 20/20.001 = 99.995 -> 100.0, R 50.0; F1 = 2 * 1 * .5 / (1.5 + .001) = 66.6
    row = {"n": 40, "accuracy": 50.0, "precision": 100.0, "recall": 50.0, "f1": 66.6}
    assert discriminative_table(rows, ["existence"] * 40)["existence"] == row
    # as state questions the offset is 0.0001: 1 / 1.5001 = 66.7
    table = discriminative_table(rows, ["state"] * 40)
    assert table["state"] == table["overall"] == {**row, "f1": 66.7} and "relation" not in table


def test_attribute_pools_three_offsets():
    rows = [score_answer(a, "no") for a in ("No", "Yes")]
    table = discriminative_table(rows, ["state"] * 2)
    # state: 1/2.001 = 50.0, P 1/1.001 = 99.9, F1 = 2 * .999 * .5 / 1.4991 = 66.6
    assert table["state"] == {"n": 2, "accuracy": 50.0, "precision": 99.9, "recall": 50.0, "f1": 66.6}
    # attribute: 1/2.003 = 49.9, P 1/1.003 = 99.7, F1 = 2 * .997 * .499 / 1.4961 = 66.5
    assert table["attribute"] == {"n": 2, "accuracy": 49.9, "precision": 99.7, "recall": 49.9, "f1": 66.5}


def test_command_with_both_kinds(tmp_path, data, capsys):
    rows = {
        1: "A lake, dogs and a cat can be seen.",
        2: "A sofa.",
        3: "No",
        4: "Yes",
        5: "Yes",
        6: "No",
        7: "Yes",
        8: "No.",
    }
    result = run(tmp_path, data, rows, "--no-tagger")
    # nouns lake, dog, cat | sofa: 1 of 4 invented, 3 of 3 entries covered, 1 of 2 responses, 1 of 3 likely inventions
    m = result["metrics"]
    assert (m["chair"], m["cover"], m["hal"], m["cog"]) == (25.0, 100.0, 50.0, 33.3)
    # right: 3, 5, 6, 7 of 6 = 66.7; P 2/2.001 = 100.0; R 2/4.001 = 50.0; F1 1/1.5001 = 66.7
    assert (m["accuracy"], m["precision"], m["recall"], m["f1"]) == (66.7, 100.0, 50.0, 66.7)
    assert m["amber_score"] == 70.85  # (100 - 25 + 66.7) / 2
    assert result["n_neither_yes_nor_no"] == 1 and result["nouns"] == "every word (--no-tagger)"
    assert result["kinds"] == {"generative": 2, "existence": 2, "attribute": 2, "relation": 2}
    assert set(result["intervals"]) == set(m)
    assert "existence" in capsys.readouterr().out
    result = run(tmp_path, data, rows, "--no-tagger", "--yes-no", "first-word")
    assert result["metrics"]["recall"] == 75.0 and result["n_neither_yes_nor_no"] == 0


@pytest.mark.parametrize("text, word", [("Yes, it is.", "Yes"), (" no", "No"), ("Nothing", "Nothing"), ("", "")])
def test_first_word(text, word):
    assert first_word(text) == word


@pytest.mark.parametrize(
    "rows, message",
    [
        ({3: "No"}, r"1 of 2 ids are not answered, such as \[4\]"),
        ({3: "No", 4: "No", 1: "A dog."}, r"1 of 4 ids are not answered, such as \[2\]"),
        ({9: "No"}, "`id` is 9, not one of AMBER's 1 to 8"),
        ({0: "No"}, "`id` is 0"),
        ({1: "A dog.", 2: "A dog."}, "need --tagger DIR"),
    ],
)
def test_bad_answers_end_the_run_by_name(tmp_path, data, rows, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, data, rows)


def test_duplicates_over_two_files(tmp_path, data):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": 3, "answer": "No"}\n')
    with pytest.raises(SystemExit, match="b.jsonl:1: id 3 was answered at .*a.jsonl:1"):
        amber.main(["--answers", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--data", data])


def test_partial_is_said_in_the_result(tmp_path, data):
    result = run(tmp_path, data, {3: "No"}, "--partial")
    assert (result["n"], result["n_expected"]) == (1, 2) and "(partial)" in result["protocol"]
    assert any("official set has 2" in warning for warning in result["warnings"])


def test_compare(tmp_path, data):
    files = []
    for name, words in (("x.jsonl", "Yes Yes"), ("y.jsonl", "No No")):
        rows = [{"id": i, "answer": word} for i, word in zip((3, 4), words.split(), strict=True)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / name))
    amber.main(["--compare", *files, "--data", data, "--json", str(tmp_path / "r.json")])
    row = json.loads((tmp_path / "r.json").read_text())["compare"]["accuracy"]
    assert row == {"a": 0.0, "b": 100.0, "difference": 100.0, "interval": [100.0, 100.0]}


def test_a_missing_nltk_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.tag.perceptron", None)
    with pytest.raises(SystemExit, match="pip install nltk"):
        amber.load_tagger(str(tmp_path))


def test_tagger_files(tmp_path):
    pytest.importorskip("nltk", reason="nltk is optional")
    with pytest.raises(SystemExit, match="averaged_perceptron_tagger_eng.weights.json: no such file"):
        amber.load_tagger(str(tmp_path))
    # a tagger that knows its words by heart
    parts = {"weights": {}, "tagdict": {"Dogs": "NNS", "can": "MD", "run": "VB", ".": "."}, "classes": ["NNS", "MD"]}
    for name, part in parts.items():
        (tmp_path / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(part))
    assert amber.load_tagger(str(tmp_path))("Dogs can run.") == ["Dogs"]


@pytest.mark.parametrize("row", [1, {"id": 1}, {"type": "generative"}, {"id": 2, "type": "generative"}])
def test_annotations_that_are_not_ambers(tmp_path, data, row):
    with open(f"{data}/annotations.json", "w") as f:
        json.dump([row], f)
    with pytest.raises(SystemExit, match="annotations.json: row 1 is not AMBER's"):
        run(tmp_path, data, {1: "A dog."}, "--no-tagger")
