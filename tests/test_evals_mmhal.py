"""MMHal-Bench: replies to ratings, ratings to scores, and the judge over real HTTP."""

import json

import pytest
from llm_server import serve

from evals import mmhal
from evals.mmhal import mmhal_scores, rating

PROMPT = "Objects: {}\nQuestion: {}\nHuman: {}\nAnswer: {}\nGive a Rating: N"


def write_reviews(path, ratings: list) -> str:
    replies = [f"Some words.\n\nRating: {r}, said." for r in ratings]
    rows = [{"model": "made-up", "choices": [{"message": {"content": text}}]} for text in replies]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def case(tmp_path):
    """Template, answers and prompt; question i is "Question i?" and its answer "Answer i"."""
    template = [
        {
            "question": f"Question {i}?",
            "image_content": ["Vase", f"Cup {i}"],
            "gt_answer": f"Truth {i}",
            "model_answer": "",
        }
        for i in range(96)
    ]
    (tmp_path / "template.json").write_text(json.dumps(template))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    rows = [{"id": i, "prompt": f"Question {i}?", "answer": f"Assistant: Answer {i} {{}}"} for i in range(96)]
    return tmp_path, rows


def run(folder, rows: list[dict], *more: str) -> dict:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--answers", str(folder / "a.jsonl"), "--template", str(folder / "template.json")]
    argv += ["--prompt", str(folder / "prompt.txt"), "--reviews", str(folder / "reviews.json")]
    mmhal.main([*argv, "--parallel", "1", "--json", str(folder / "r.json"), *more])
    return json.loads((folder / "r.json").read_text())


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("Rating: 6, very informative", 6),
        ("RATING: 0", 0),
        ("rating: 2 ... again Rating: 2", 2),
        ("Rating: 10", 1),
        ("Rating: 3.5", 3),
        ("Rating: 5, or rather Rating: 4", None),
        ("Rating:4", None),
        ("Rating:  4", None),
        ("**Rating**: 6", None),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_rating(reply, expected):
    assert rating(reply) == expected


def test_scores_by_hand():
    # 96 ratings 0 1 2 3 4 5 6 6, twelve times: the mean is 27 / 8; 3 of 8 are below 3
    s = mmhal_scores([0, 1, 2, 3, 4, 5, 6, 6] * 12)
    assert (s["score"], s["hallucination_rate"]) == (3.375, 0.375)
    # informative: 0 1 2 0 1 2 3 3 = 12 of 24
    assert s["informativeness"] == 0.5
    assert list(s["per_type"].values()) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert list(s["per_type"])[:2] == ["attribute", "adversarial"]


def test_scoring_saved_reviews_alone(tmp_path, capsys):
    path = write_reviews(tmp_path / "reviews.json", [4] * 95 + ["nine"])
    mmhal.main(["--reviews", path, "--json", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    # the last reply has no rating: 0, and a hallucination
    assert (result["metrics"]["score"], result["metrics"]["hallucination_rate"]) == (380 / 96, 1 / 96)
    assert result["reviews"]["n_without_rating"] == 1 and result["rows"][95]["rating"] is None
    assert (result["mean_words"], result["generation"], result["judge"]["prompt_sha256"]) == (None, None, None)
    assert result["judge"]["models"] == ["made-up"] and result["n"] == 96
    assert "1 replies without exactly one rating" in capsys.readouterr().out


@pytest.mark.parametrize("ratings", [[4] * 95, [4] * 97])
def test_another_number_of_reviews_is_an_error(tmp_path, ratings):
    with pytest.raises(SystemExit, match=f"{len(ratings)} reviews .* all 96 are needed"):
        mmhal.main(["--reviews", write_reviews(tmp_path / "reviews.json", ratings)])


def test_a_review_without_text_is_an_error(tmp_path):
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps([{"choices": []}] * 96))
    with pytest.raises(SystemExit, match="review 0: no choices"):
        mmhal.main(["--reviews", str(path)])


def test_judge_over_http_then_offline(case):
    folder, rows = case
    with serve(["timeout", (429, {}), "half"], lambda body: "Because.\nRating: 5, good") as server:
        result = run(folder, rows, "--judge", server.url, "--judge-model", "m", "--timeout", "0.3")
        assert len(server.seen) == 99
        body = server.seen[-1].body
    assert body["messages"] == [
        {
            "role": "user",
            "content": "Objects: Vase, Cup 95\nQuestion: Question 95?\nHuman: Truth 95\nAnswer: Answer 95 {}\n"
            "Give a Rating: N",
        }
    ]
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert result["metrics"]["score"] == 5.0 and result["mean_words"] == 3.0 and result["judge"]["models"] == ["m"]
    assert result["judge"]["prompt_official"] is False
    assert any("not the official prompt" in warning for warning in result["warnings"])
    assert run(folder, rows)["metrics"] == result["metrics"]  # no judge: from the saved reviews
    rows[3]["answer"] = "changed afterwards"
    with pytest.raises(SystemExit, match="reply 3 is for other answers"):
        run(folder, rows)


def test_an_unfinished_file_of_reviews_is_not_scored(case):
    folder, rows = case
    with serve(["ok", "ok", (500, {})], lambda body: "Rating: 5") as server:
        with pytest.raises(SystemExit, match="no usable reply for 2"):
            run(folder, rows, "--judge", server.url, "--judge-model", "m", "--tries", "1")
    with pytest.raises(SystemExit, match="94 of 96 replies are missing"):
        run(folder, rows)
    with pytest.raises(SystemExit, match="2 reviews"):
        mmhal.main(["--reviews", str(folder / "reviews.json")])


def test_answers_must_be_in_the_order_of_the_template(case):
    folder, rows = case
    with pytest.raises(SystemExit, match="a.jsonl:1: answers 'Question 95.', but question 0 of the template"):
        run(folder, rows[::-1])
    with pytest.raises(SystemExit, match="95 answers, 96 template records"):
        run(folder, rows[:95])


def test_prompt_from_a_python_file_and_its_slots(tmp_path):
    (tmp_path / "eval.py").write_text('other = "{} {}"\ntemplate = """a {} b {} c {} d {}\n"""\n')
    text, digest = mmhal.read_prompt(str(tmp_path / "eval.py"))
    assert text == "a {} b {} c {} d {}\n"
    # sha256 of these 20 bytes, from sha256sum
    assert digest == "5bd9b14da5a30f33d473946268ffe7e8da157a6fe6d70ffc54071a05988f8924"
    (tmp_path / "bad.txt").write_text("{} {} {}")
    with pytest.raises(SystemExit, match="needs four {}"):
        mmhal.read_prompt(str(tmp_path / "bad.txt"))


def test_compare_two_files_of_reviews(tmp_path):
    files = [write_reviews(tmp_path / "a", [2] * 96), write_reviews(tmp_path / "b", [5] * 96)]
    mmhal.main(["--compare", *files, "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())["compare"]
    assert rows["score"] == {"a": 2.0, "b": 5.0, "difference": 3.0, "interval": [3.0, 3.0]}
    assert rows["hallucination_rate"]["difference"] == -1.0


def test_flags_that_belong_together(capsys):
    with pytest.raises(SystemExit):
        mmhal.main(["--reviews", "r.json", "--answers", "a.jsonl"])
    assert "--answers, --template, --prompt and --reviews go together" in capsys.readouterr().err
