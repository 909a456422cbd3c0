"""POPE: the yes/no rule, the metrics, and matching answers to labels."""

import json

import pytest

from evals import pope
from evals.pope import pope_counts, pope_metrics, yes_or_no
from evals.stats import Part, sums, values


def pope_scores(said: list[str], truth: list[str]) -> dict:
    counts = pope_counts(said, truth)
    return values(Part([], counts, pope_metrics)) | sums(counts)


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labels(words: str, numbered: bool = True) -> list[dict]:
    rows = [{"text": f"Is there a thing{i} in the image?", "label": w} for i, w in enumerate(words.split())]
    return [{"question_id": i + 1, **row} if numbered else row for i, row in enumerate(rows)]


def answers(words: str, numbered: bool = True) -> list[dict]:
    prompt = "Is there a thing{} in the image?\nAnswer the question using a single word or phrase."
    rows = [{"id": f"q{i}", "prompt": prompt.format(i), "answer": w} for i, w in enumerate(words.split())]
    return [{"question_id": i + 1, **row} if numbered else row for i, row in enumerate(rows)]


def run(tmp_path, *argv: str) -> dict:
    pope.main([*argv, "--json", str(tmp_path / "r.json")])
    return json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize(
    "answer", ["No", "no", "No, nothing", "It is not.", "There is no cat.", "I am not sure", "Yes, no"]
)
def test_read_as_no(answer):
    assert yes_or_no(answer) == "no"


@pytest.mark.parametrize(
    "answer",
    [
        "Yes",
        "",
        "NO",
        "Well,no",
        "None",
        "nothing",
        "No!",
        "No\n",
        "It isn't",
        "It cannot be",
        "A dog. There is no cat.",
    ],
)
def test_read_as_yes(answer):
    assert yes_or_no(answer) == "yes"


def test_metrics_by_hand():
    said = ["yes"] * 4 + ["no"] * 4
    truth = ["yes", "yes", "yes", "no", "yes", "no", "no", "no"]
    # tp 3, fp 1, fn 1, tn 3: accuracy 6/8, P 3/4, R 3/4, F1 3/4, yes 4/8
    s = pope_scores(said, truth)
    assert (s["tp"], s["fp"], s["tn"], s["fn"]) == (3, 1, 3, 1)
    assert [s[k] for k in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == [0.75, 0.75, 0.75, 0.75, 0.5]
    s = pope_scores(["yes", "yes", "yes", "no"], ["yes", "no", "no", "yes"])
    # tp 1, fp 2, fn 1: P 1/3, R 1/2, F1 2 (1/6) / (5/6) = 0.4
    assert (s["precision"], s["recall"], round(s["f1"], 12), s["yes_ratio"]) == (1 / 3, 0.5, 0.4, 0.75)


def test_all_no_gives_null_not_a_crash():
    s = pope_scores(["no", "no"], ["yes", "no"])
    assert (s["accuracy"], s["precision"], s["recall"], s["f1"]) == (0.5, None, 0.0, None)


def test_mean_over_splits_in_any_order_of_ids(tmp_path):
    a = write(tmp_path / "a.jsonl", answers("Yes No Yes Yes")[::-1])  # shuffled rows are matched by question_id
    b = write(tmp_path / "b.jsonl", answers("No No"))
    la = write(tmp_path / "coco_pope_random.json", labels("yes no no yes"))
    lb = write(tmp_path / "coco_pope_popular.json", labels("yes no"))
    result = run(tmp_path, "--answers", a, b, "--labels", la, lb)
    # accuracy 3/4 and 1/2; yes-ratio 3/4 and 0; P is undefined in the second split, so its mean is too
    assert result["metrics"]["accuracy"] == 0.625 and result["metrics"]["yes_ratio"] == 0.375
    assert result["metrics"]["precision"] is None
    assert result["splits"]["coco_pope_random"]["metrics"]["precision"] == 2 / 3
    assert [row["said"] for row in result["splits"]["coco_pope_random"]["rows"]] == ["yes", "no", "yes", "yes"]
    assert (result["n"], result["protocol"]) == (6, "POPE, mean over 2 splits")
    low, high = result["intervals"]["accuracy"]
    assert low < 0.625 < high
    assert any("unknown" in warning for warning in result["warnings"])


def test_official_layout_by_order(tmp_path):
    rows = [{"question": f"Is there a thing{i} in the image?", "answer": w} for i, w in enumerate(("No", "Yes"))]
    a, key = write(tmp_path / "a.jsonl", rows), write(tmp_path / "l.jsonl", labels("no yes"))
    assert run(tmp_path, "--answers", a, "--labels", key)["metrics"]["accuracy"] == 1.0
    a = write(tmp_path / "a.jsonl", rows[::-1])
    with pytest.raises(SystemExit, match="a.jsonl:1: answers 'Is there a thing1 .*l.jsonl:1 asks 'Is there a thing0"):
        run(tmp_path, "--answers", a, "--labels", key)


@pytest.mark.parametrize(
    "said, truth, message",
    [
        (answers("No No")[:1], labels("no no"), r"1 questions have no answer, such as \[2\]"),
        (answers("No No No"), labels("no no"), r"1 questions have no label, such as \[3\]"),
        ([*answers("No No"), answers("No")[0]], labels("no no"), "a.jsonl:3: question 1 was answered at"),
        (answers("No No", False)[:1], labels("no no", False), "1 answers for 2 labels"),
        ([{"answer": "No"}], labels("no"), "a.jsonl:1: answers ''"),
        ([{**answers("No")[0], "label": "yes"}], labels("no"), "another order or version of the questions"),
        ([{**answers("No")[0], "prompt": "Is there an old thing?"}], labels("no"), "another order or version"),
        (answers("No"), [{"question_id": 1, "text": "?", "label": "maybe"}], "l.jsonl:1: a label row needs"),
    ],
)
def test_answers_that_do_not_fit_the_labels(tmp_path, said, truth, message):
    a, key = write(tmp_path / "a.jsonl", said), write(tmp_path / "l.jsonl", truth)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, "--answers", a, "--labels", key)


def test_compare(tmp_path):
    a = write(tmp_path / "a.jsonl", answers("Yes Yes Yes"))
    b = write(tmp_path / "b.jsonl", answers("No No No"))
    key = write(tmp_path / "l.jsonl", labels("no no no"))
    result = run(tmp_path, "--compare", a, b, "--labels", key)
    assert result["compare"]["accuracy"] == {"a": 0.0, "b": 1.0, "difference": 1.0, "interval": [1.0, 1.0]}
    assert result["compare"]["recall"]["difference"] is None  # no question whose answer is yes


def test_one_label_file_per_answer_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pope.main(["--answers", "a", "b", "--labels", "l"])
    assert "one file per file of --answers" in capsys.readouterr().err
