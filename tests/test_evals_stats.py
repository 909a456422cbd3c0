"""Answer files, intervals, and the form of a result."""

import pytest

from evals import stats
from evals.stats import Part, ratio


def mean_part(ids: list, numbers: list[float]) -> Part:
    return Part(ids, [{"sum": number, "n": 1} for number in numbers], lambda s: {"mean": ratio(s["sum"], s["n"])})


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 1, "answer": "a"}\n\n{"id": 2, "answer": ""}\n',
        '\ufeff{"id": 1, "answer": "a"}\r\n{"id": 2, "answer": ""}',
        '[{"id": 1, "response": "a"},\n {"id": 2, "response": ""}]',
        '{"overall": {}, "imgToEval": {"1": {"id": 1, "caption": "a"}, "2": {"id": 2, "caption": ""}}}',
        '{\n "imgToEval": {\n"1": {"id": 1, "caption": "a"}, "2": {"id": 2, "caption": ""}}}',
    ],
)
def test_every_layout_gives_the_same_rows(tmp_path, text):
    (tmp_path / "a").write_text(text, encoding="utf-8")
    assert [(row["id"], row["answer"]) for row in stats.read_answers(tmp_path / "a")] == [(1, "a"), (2, "")]


def test_our_answer_wins_over_the_question_text_of_the_label_row(tmp_path):
    (tmp_path / "a").write_text('{"text": "Is there a dog?", "answer": "No", "model_answer": ""}')
    assert stats.read_answers(tmp_path / "a")[0]["answer"] == "No"


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"answer": "a"}\n{"answer": "caf\xe9"}\n', r"a:2: not UTF-8 \(byte 31\)"),
        (b'{"answer": "a"}\n{"answer": "b"\n', "a:2: broken JSON"),
        (b'[{"answer": "a"}, {"answer"', "a: broken JSON"),
        (b'{"answer": "a", "answer": "b"}', "a:1: broken JSON .a key stands twice"),
        (b'{"imgToEval": {"1": {"caption": "a"}, "1": {"caption": "b"}}}', "a key stands twice"),
        (b'{"answer": "a"}\n{"id": 2}\n', "a:2: no answer"),
        (b'[{"answer": "a"}, {"answer": null}]', "a row 1: `answer` is None"),
        (b'{"answer": "a"}\n["b"]\n', "a:2: a row must be a JSON object"),
        (b"\n \n", "a: no rows"),
        (b"[]", "a: no rows"),
        (b'{"imgToEval": [1, 2]}', "a: no rows"),
        (None, "a: no such file"),
    ],
)
def test_a_bad_file_ends_the_run_by_name(tmp_path, data, message):
    if data is not None:
        (tmp_path / "a").write_bytes(data)
    with pytest.raises(SystemExit, match=message):
        stats.read_answers(tmp_path / "a")


def test_duplicates_name_both_places():
    rows = [{"_where": f"a:{i}"} for i in (1, 2, 3)]
    with pytest.raises(SystemExit, match="a:3: image 7 was answered at a:1 already"):
        stats.check_unique([7, 8, 7], rows, "image")


def test_header_counts_lengths_limits_and_copies_the_settings(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answer": "one two three", "n_tokens": 5, "finish": "eos"}\n')
    (tmp_path / "answers.settings.json").write_text('{"base": "b", "decoding": {"beams": 3}}')
    rows = [
        {"answer": "one two three", "n_tokens": 5, "finish": "eos"},
        {"answer": " ", "n_tokens": 8, "finish": "length"},
        {"answer": "four", "n_tokens": 2, "finish": "eos"},
    ]
    header = stats.header("s 1", "p", [str(path)], rows, 4)
    assert header["mean_words"] == 4 / 3  # 3 + 0 + 1 words
    assert header["mean_tokens"] == 5  # 15 tokens / 3
    assert header["share_at_token_limit"] == 1 / 3
    assert header["generation"] == {"base": "b", "decoding": {"beams": 3}}
    assert (header["n"], header["n_expected"], header["n_empty"], len(header["warnings"])) == (3, 4, 1, 2)
    del rows[1]["finish"], rows[1]["n_tokens"]  # what the file lacks is null, not a mean over the rest
    (tmp_path / "answers.settings.json").unlink()
    header = stats.header("s 1", "p", [str(path)], rows)
    assert (header["mean_tokens"], header["share_at_token_limit"], header["generation"]) == (None, None, None)


def test_bootstrap_interval_of_a_coin():
    # 10,000 rows, half 1: a resample's mean has standard deviation sqrt(.25 / 10000) = .005, so 95 % is .5 -+ .0098
    part = mean_part(list(range(10_000)), [0, 1] * 5000)
    low, high = stats.summary(part)["intervals"]["mean"]
    assert abs(low - 0.4902) < 0.001 and abs(high - 0.5098) < 0.001
    assert stats.summary(part) == stats.summary(part)  # a fixed seed


def test_a_zero_denominator_is_none_and_its_interval_too():
    part = Part([1, 2], [{"a": 0, "b": 0}] * 2, lambda s: {"r": ratio(s["a"], s["b"])})
    assert stats.summary(part) == {"metrics": {"r": None}, "intervals": {"r": None}}


def test_compare_is_paired_and_matches_rows_by_id():
    # B is A + 1 in every question but in another order: the difference is 1 in every resample
    a, b = mean_part([1, 2, 3, 4], [0, 10, 20, 30]), mean_part([4, 3, 2, 1], [31, 21, 11, 1])
    assert stats.compare(a, b)["mean"] == {"a": 15.0, "b": 16.0, "difference": 1.0, "interval": [1.0, 1.0]}


def test_compare_refuses_different_questions():
    with pytest.raises(SystemExit, match=r"2 are in one only: \[2, 3\]"):
        stats.compare(mean_part([1, 2], [0, 0]), mean_part([1, 3], [0, 0]))


@pytest.mark.parametrize("cut, warned", [(4, False), (5, True), (10, True)])
def test_a_result_says_when_most_answers_were_cut_off(cut, warned):
    """Of ten answers: from half of them on."""
    ends = ["length"] * cut + ["eos"] * (10 - cut)
    rows = [{"answer": "a", "n_tokens": 1, "finish": end} for end in ends]
    result = stats.header("s 1", "p", [], rows)
    assert ([f"{10 * cut} % of the answers were cut off" in w for w in result["warnings"]] == [True]) is warned
    assert result["not_comparable"] == result["warnings"]


def test_a_difference_that_is_not_the_models_alone_is_warned_of(tmp_path, capsys):
    """Another judge, or other beams: B - A shows that too."""
    part = mean_part([0, 1], [1.0, 3.0])
    results = []
    for beams, protocol in ((1, "MMHal-Bench, judge m"), (3, "MMHal-Bench, judge n")):
        (tmp_path / "a.jsonl").write_text("{}")
        result = stats.header("s", protocol, [str(tmp_path / "a.jsonl")], [{"answer": "x"}])
        result["generation"] = {"decoding": {"beams": beams}, "base": f"base {beams}", "dtype": "float32"}
        results.append((result | stats.summary(part), [part]))
    stats.report(results, None)
    out = capsys.readouterr().out
    assert "A is MMHal-Bench, judge m, B is MMHal-Bench, judge n: B - A shows that too" in out
    assert "A was made with decoding {'beams': 1}, B with {'beams': 3}" in out
    assert "base 1, B with" not in out  # another base is what is compared
    assert stats.other_making(results[0][0], results[0][0]) == []
