"""The table's numbers are the results', scaled as in the paper; the curves show what the log says."""

import json
import sys

import pytest

from bases.adapter import adapter_sha256
from evals import pope
from external import files
from lab import report


def result(protocol: str, n: int = 300, **metrics) -> dict:
    made = {"decoding": {"method": "beam search", "beams": 3}, "max_new_tokens": 1024, "image_mode": "pad"}
    return {"protocol": protocol, "n": n, "metrics": metrics, "generation": made, "warnings": []}


def write_run(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"eval_{name}.json").write_text(json.dumps(content))
    return folder


def row_of(text: str, name: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_row_beside_the_papers(tmp_path):
    full = write_run(
        tmp_path / "full",
        mmhal=result("MMHal-Bench, judge m", 96, score=2.386, hallucination_rate=0.541, informativeness=0.5),
        chair=result("Object HalBench, no language model", chair_s=0.30, chair_s_refine=0.3567, chair_i=0.0981),
        amber=result("AMBER generative", 1004, chair=4.4, cover=52.4, hal=24.5, cog=2.4),
        pope=result("POPE, mean over 3 splits", 9000, accuracy=0.8712, f1=0.8598),
    )
    partly = write_run(tmp_path / "partly", amber=result("AMBER discriminative", 14216, f1=80.0))
    text = report.table([full, partly])
    # 100 x 0.3567 = 35.67, 100 x 0.0981 = 9.81, 100 x 0.8712 = 87.12, 100 x 0.8598 = 85.98
    assert row_of(text, str(full)) == ["2.39", "0.54", "35.7", "9.8", "4.4", "52.4", "24.5", "2.4", "87.1", "86.0"]
    assert row_of(text, str(partly)) == ["-"] * 10
    paper = row_of(text, "LLaVA + mDPO (the paper's)")  # mDPO, Table 1
    assert paper == ["2.39", "0.54", "35.7", "9.8", "4.4", "52.4", "24.5", "2.4", "-", "-"]
    assert text.count("(the paper's)") == 6
    note = (
        f'- {full}, eval_chair.json: Object HalBench, no language model; n 300; {{"method": "beam search", "beams": 3}}'
    )
    assert note + ", at most 1024 tokens, image pad" in text


def test_another_benchmark_is_not_put_into_the_column(tmp_path):
    """CHAIR 2018 is not Object HalBench, though one scorer writes both; the note says what the file holds."""
    run = write_run(tmp_path / "a", chair=result("CHAIR 2018", chair_s_refine=0.5, chair_i=0.1) | {"generation": None})
    run_warned = write_run(tmp_path / "b", amber=result("AMBER", 3, chair=1.0) | {"warnings": ["3 rows, not 1004"]})
    text = report.table([run, run_warned])
    assert row_of(text, str(run))[2:4] == ["-", "-"]
    assert "CHAIR 2018; n 300; decoding not recorded" in text
    assert f"- {run_warned}, eval_amber.json: warning: 3 rows, not 1004" in text


def test_a_number_that_does_not_compare_is_marked_in_its_cell(tmp_path):
    """A copied row keeps its marks; equal reasons share one."""
    cut, judge = "60 rows, the official set has 300", "judge m: published scores are gpt-4's"
    one = result("AMBER generative", 60, chair=4.4, cover=52.4) | {"warnings": [cut], "not_comparable": [cut]}
    two = result("MMHal-Bench, judge m", 96, score=2.0) | {"warnings": [judge, cut], "not_comparable": [judge, cut]}
    runs = [write_run(tmp_path / "a", amber=one), write_run(tmp_path / "b", amber=one, mmhal=two)]
    text = report.table(runs)
    assert row_of(text, str(runs[0]))[4:7] == ["4.4 (a)", "52.4 (a)", "-"]
    assert row_of(text, str(runs[1]))[:6] == ["2.00 (b, a)", "-", "-", "-", "4.4 (a)", "52.4 (a)"]
    assert f"(a) not comparable with the paper's: {cut}\n(b) not comparable with the paper's: {judge}\n" in text
    assert [report.letters(i) for i in (0, 25, 26, 52)] == ["a", "z", "aa", "ba"]


def test_results_that_cannot_be_shown_are_errors(tmp_path):
    run = write_run(tmp_path / "a", pope={"a": {}, "b": {}, "compare": {}})
    with pytest.raises(SystemExit, match="eval_pope.json: not the result of one answer file"):
        report.table([run])
    with pytest.raises(SystemExit, match="nowhere: no such run folder"):
        report.table([tmp_path / "nowhere"])


def test_a_scorers_own_file_is_read(tmp_path):
    """The column names are those that a scorer writes."""
    labels = [{"question_id": i, "text": f"{i}?", "label": label} for i, label in enumerate(["yes", "no", "no", "yes"])]
    answers = [{"question_id": i, "question": f"{i}?", "answer": a} for i, a in enumerate(["Yes", "No", "Yes", "Yes"])]
    for name, rows in (("labels", labels), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = write_run(tmp_path / "run")
    files = [str(tmp_path / "answers.jsonl"), "--labels", str(tmp_path / "labels.jsonl")]
    pope.main(["--answers", *files, "--json", str(run / "eval_pope.json")])
    # 3 of 4 are right; P = 2/3, R = 1, F1 = 2 (2/3) / (5/3) = 0.8
    assert row_of(report.table([run]), str(run))[-2:] == [
        "75.0 (a)",
        "80.0 (a)",
    ]  # marked: no published version of the labels


# ---- curves --------------------------------------------------------------------------------------------------------


def write_log(folder, rows: list[tuple], beta: float, tail: str = ""):
    folder.mkdir()
    keys = ("step", "loss", "rewards/margins", "rewards/chosen")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows]
    (folder / "log.jsonl").write_text("".join(lines) + tail)
    (folder / "args.json").write_text(json.dumps({"beta": beta}))
    return folder


def test_points_of_the_curves(tmp_path):
    a = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0), (1, 1.5, 0.5, 0.2), (2, 1.0, 1.0, -0.4)], 0.1, '{"step": 3, "lo')
    b = write_log(tmp_path / "b & c", [(0, 2.0, 0.0, 0.0), (4, 1.0, 0.5, 0.1)], 0.5)
    figure = report.draw([a, b], tmp_path / "c.png")
    loss, margin, image_margin, chosen = figure.axes
    assert [line.get_xydata().tolist() for line in loss.lines[::2]] == [  # the others are the moving means
        [[0, 2.0], [1, 1.5], [2, 1.0]],
        [[0, 2.0], [4, 1.0]],
    ]
    assert margin.lines[0].get_ydata().tolist() == [0.0, 0.5, 1.0]
    assert chosen.lines[0].get_ydata().tolist() == pytest.approx([0.0, 2.0, -4.0])  # r / beta with beta 0.1
    assert chosen.lines[2].get_ydata().tolist() == pytest.approx([0.0, 0.2])  # and with 0.5
    assert len(image_margin.lines) == 0  # neither run has an m_l
    assert loss.get_xlabel() == "optimiser step" and chosen.get_ylabel() == "nats"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(a), str(b)]


def test_the_image_margin_is_drawn_where_there_is_one(tmp_path):
    with_m_l = write_log(tmp_path / "mdpo", [(0, 2.0, 0.0, 0.0), (1, 1.5, 0.5, 0.2)], 0.1)
    rows = [json.loads(line) | {"rewards/image_margins": 0.25} for line in open(with_m_l / "log.jsonl")]
    (with_m_l / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = write_log(tmp_path / "dpo", [(0, 2.0, 0.0, 0.0)], 0.1)
    figure = report.draw([without, with_m_l], tmp_path / "c.svg")
    assert [line.get_ydata().tolist() for line in figure.axes[2].lines] == [[0.25, 0.25], [0.25, 0.25]]


@pytest.mark.parametrize("name, start", [("c.png", b"\x89PNG"), ("c.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_the_ending_decides_the_kind_of_file(tmp_path, name, start):
    run = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0)], 0.1)
    report.main([str(run), "--curves", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_an_ending_that_matplotlib_does_not_write(tmp_path):
    run = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0)], 0.1)
    with pytest.raises(SystemExit, match="c.txt: no picture can be written with the ending '.txt'; known: .*png"):
        report.main([str(run), "--curves", str(tmp_path / "c.txt")])
    assert not (tmp_path / "c.txt").exists()


def test_without_matplotlib_the_message_has_the_command(tmp_path, monkeypatch):
    run = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0)], 0.1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install 'matplotlib>=3.8'"):
        report.main([str(run), "--curves", str(tmp_path / "c.png")])


def test_smoothing_is_the_mean_of_the_last_twentieth():
    values = [float(i % 2) for i in range(40)]  # a window of 2
    assert report.smooth(values)[:3] == [0.0, 0.5, 0.5]
    assert report.smooth([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]  # short runs stay as they are


def test_runs_without_a_log(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SystemExit, match="a: no log.jsonl and args.json"):
        report.main([str(tmp_path / "a"), "--curves", str(tmp_path / "c.svg")])
    run = write_log(tmp_path / "b", [], 0.1)
    with pytest.raises(SystemExit, match="no complete step yet"):
        report.main([str(run), "--curves", str(tmp_path / "c.svg")])
    with pytest.raises(SystemExit) as e:
        report.main([str(run)])
    assert e.value.code == 2 and not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize("row", [{"step": 0}, {"loss": 1.0}, [1]])
def test_a_log_of_something_else_is_named_with_its_line(tmp_path, row):
    run = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0)], 0.1)
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="log.jsonl:2: no row of a run of train.py"):
        report.main([str(run), "--curves", str(tmp_path / "c.svg")])


def test_curves_go_into_a_new_folder_or_the_end_is_a_sentence(tmp_path):
    run = write_log(tmp_path / "a", [(0, 2.0, 0.0, 0.0)], 0.1)
    report.main([str(run), "--curves", str(tmp_path / "new" / "c.svg")])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["c.svg"]
    with pytest.raises(SystemExit, match="c.svg: cannot be written"):
        report.main([str(run), "--curves", str(run / "log.jsonl" / "c.svg")])


def test_a_name_with_a_bar_stays_one_cell(tmp_path):
    run = write_run(tmp_path / "a|b")
    text = report.table([run])
    assert f"| {tmp_path}/a\\|b " in text


def test_a_result_of_an_earlier_adapter_is_marked(tmp_path):
    """Trained on after it was scored: the table must not show the old number as the run's."""
    run = write_run(tmp_path / "run", pope=result("POPE", accuracy=0.5))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).write_text("{}")
    file = run / "eval_pope.json"
    for sha256, expected in ((adapter_sha256(run), "50.0"), ("of an earlier one", "50.0 (a)"), (None, "50.0 (a)")):
        found = result("POPE", accuracy=0.5)
        found["generation"]["adapter_sha256"] = sha256
        file.write_text(json.dumps(found))
        text = report.table([run])
        assert row_of(text, str(run))[8] == expected
        assert ("answers of another adapter" in text) == (expected != "50.0")


@pytest.mark.parametrize(
    "change",
    [
        {"warnings": 3},
        {"answers": [3]},
        {"not_comparable": [3]},
        {"metrics": {"accuracy": float("nan")}},
        {"metrics": {"f1": 10**400}},
    ],
)
def test_an_edited_result_is_refused_by_name(tmp_path, change):
    run = write_run(tmp_path / "run", pope=result("POPE", accuracy=0.5) | change)
    with pytest.raises(SystemExit, match="eval_pope.json: not the result of one answer file"):
        report.table([run])


def test_control_characters_of_a_result_do_not_reach_the_terminal(tmp_path):
    odd = result("POPE \x1b[2J", accuracy=0.5) | {"not_comparable": ["b\x1b[2J"]}
    text = report.table([write_run(tmp_path / "run", pope=odd)])
    assert "\x1b" not in text and "POPE \\x1b[2J" in text


def test_a_result_whose_answers_have_changed_is_marked(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("{}")
    scored = result("POPE", accuracy=0.5) | {"answers": [{"path": str(answers), "sha256": files.file_sha256(answers)}]}
    run = write_run(tmp_path / "run", pope=scored)
    assert row_of(report.table([run]), str(run))[8] == "50.0"
    answers.write_text("{} ")
    text = report.table([run])
    assert row_of(text, str(run))[8] == "50.0 (a)" and "answers.jsonl has changed since; score it again" in text
