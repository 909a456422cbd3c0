"""One golden row per format, and what is refused; expected Pairs are written out by hand."""

import base64
import io
import json

import pytest
from format_rows import PNG, TEMPLATED, Y_L, Y_W, Q, rating, write
from PIL import Image

import data
from data import Pair, Problem
from formats.readers import read_pairs

# (rows as stored, file name, id, whether the picture is in the file)
GOLDEN = {
    "mDPO": ([{"img_path": "a.png", "prompt": TEMPLATED, "chosen": Y_W, "rejected": Y_L}], "d.json", "1", False),
    "PDS-DPO": (
        [
            {
                "id": "art-7",
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image> What is this?"},
                    {"from": "gpt", "value": " A red bus."},
                ],
                "rejected_conversations": [
                    {"from": "human", "value": "<image> What is this?"},
                    {"from": "gpt", "value": Y_L},
                ],
            }
        ],
        "d.json",
        "art-7",
        False,
    ),
    "RLHF-V": (
        [
            {
                "ds_name": "RLHF-V",
                "image": {"bytes": PNG, "path": "x.jpg"},
                "idx": 12,
                "image_path": "x.jpg",
                "text": json.dumps({"question": Q, "chosen": Y_W, "rejected": Y_L}),
            }
        ],
        "d.parquet",
        "12",
        True,
    ),
    "RLAIF-V": (
        [
            {
                "ds_name": "RLAIF-V",
                "image": {"bytes": PNG, "path": "x.jpg"},
                "question": Q,
                "chosen": Y_W,
                "rejected": Y_L,
                "idx": "3",
            }
        ],
        "d.parquet",
        "3",
        True,
    ),
    "LLaMA-Factory": (
        [
            {
                "conversations": [{"from": "human", "value": "<image>What is this?"}],
                "chosen": {"from": "gpt", "value": Y_W},
                "rejected": {"from": "gpt", "value": Y_L},
                "images": [{"bytes": PNG, "path": None}],
            }
        ],
        "d.parquet",
        "1",
        True,
    ),
    "VLFeedback, jsonl": (
        [
            {
                "id": "v1",
                "prompt": Q,
                "img_path": "a.png",
                "models": ["a", "b", "c", "d"],
                "completions": [
                    {"model": "a", "response": "so so", "annotations": rating("5", "3", "3")},  # mean 3.67
                    {"model": "b", "response": Y_W, "annotations": rating("4", "5", "4")},  # 4.33, the best
                    {"model": "c", "response": "not rated", "annotations": rating("5", "N/A", "5")},
                    {"model": "d", "response": Y_L, "annotations": rating("1", "5", "1")},  # 2.33, the worst
                ],
            }
        ],
        "d.jsonl",
        "v1",
        False,
    ),
    "VLFeedback, parquet": (
        [
            {
                "id": "v1",
                "prompt": Q,
                "img_path": "a.png",
                "completions": {
                    "model": ["a", "b"],
                    "response": [Y_L, Y_W],
                    "annotations": [rating("3", "5", "3"), rating("4", "5", "3")],
                },
            }
        ],
        "d.parquet",
        "v1",
        False,
    ),
    "TRL, text": ([{"images": ["a.png"], "prompt": Q, "chosen": Y_W, "rejected": Y_L}], "d.jsonl", "1", False),
    "TRL, chat": (
        [
            {
                "images": [{"bytes": PNG, "path": None}],
                "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": Q}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": Y_W}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": Y_L}]}],
            }
        ],
        "d.parquet",
        "1",
        True,
    ),
    "plain": ([{"id": 5, "image": "a.png", "prompt": Q, "chosen": Y_W, "rejected": Y_L}], "d.json", "5", False),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_row(name, tmp_path, capsys):
    rows, file, row_id, inside = GOLDEN[name]
    pairs, problems = read_pairs(write(tmp_path, rows, file))
    image = PNG if inside else tmp_path.resolve() / "a.png"
    assert (pairs, problems) == ([Pair(row_id, image, Q, Y_W, Y_L, row=1)], [])
    assert f"1 row, format {name.split(',')[0]}" in capsys.readouterr().out


def row(**changes) -> dict:
    return {"image": "a.png", "prompt": Q, "chosen": Y_W, "rejected": Y_L} | changes


def first(folder, **changes):
    """The pair or the problem that one plain row becomes."""
    pairs, problems = read_pairs(write(folder, [row(**changes)], "one.jsonl"))
    return (pairs + problems)[0]


@pytest.mark.parametrize(
    "image",
    [base64.b64encode(PNG).decode(), "data:image/png;base64," + base64.b64encode(PNG).decode()],
    ids=["bare", "data url"],
)
def test_base64_picture(image, tmp_path):
    assert first(tmp_path, image=image).image == PNG


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "JPEG", "GIF"])
def test_base64_of_every_format_and_in_lines(file_format, tmp_path):
    out = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(out, file_format)
    assert first(tmp_path, image=base64.b64encode(out.getvalue()).decode()).image == out.getvalue()
    assert first(tmp_path, image=base64.encodebytes(out.getvalue()).decode()).image == out.getvalue()


@pytest.mark.parametrize(
    "image, reason",
    [
        ("http://127.0.0.1/a.png", "image is an address"),
        ("file:///etc/passwd", "image is an address"),
        ("a\0.png", "image path cannot be followed"),
        ("loop/a.png", "image path cannot be followed"),
        ("no. picture. " * 1000, "image is neither a path nor bytes"),
        ("data:image/png;base64,\u00e9", "broken image"),
    ],
)
def test_odd_picture_sources_are_problems_of_one_line(image, reason, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    problem = first(tmp_path, image=image)
    assert problem.reason == reason and len(problem.detail) < 250


def test_given_rejected_image(tmp_path):
    assert first(tmp_path, image_rejected="b.png").image_rejected == tmp_path.resolve() / "b.png"


def test_a_path_in_a_dict_and_no_picture(tmp_path):
    assert first(tmp_path, image={"bytes": None, "path": "a.png"}).image == tmp_path.resolve() / "a.png"
    assert first(tmp_path, image=None).image is None
    assert first(tmp_path, image=[]).image is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": ["a.png", "b.png"]}, "several images"),
        ({"image": 7}, "image is neither a path nor bytes"),
        ({"image": "data:image/png;base64,*"}, "broken image"),
        ({"image": "../a.png"}, "image path leaves the image folder"),
        ({"prompt": "<image> and <image>"}, "several <image>"),
        ({"prompt": "USER: <image>\nWhat? ASSISTANT:"}, "prompt is in another template"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "not one question and one answer",
        ),
        ({"prompt": None}, "no prompt"),
        ({"chosen": 3}, "row does not fit the file's format"),
        ({"rejected": "half a pair \ud83d"}, "rejected is not valid Unicode"),
    ],
)
def test_bad_row_is_a_problem(changes, reason, tmp_path):
    problem = first(tmp_path, id="x9", **changes)
    assert isinstance(problem, Problem) and problem[:3] == (1, "x9", reason)


@pytest.mark.parametrize("stored", ["<image>\nWhat is this?", "What is this?\n<image>", " What is this? ", TEMPLATED])
def test_bare_question(stored):
    assert data.bare_question(stored) == Q


def test_several_turns_and_different_questions(tmp_path):
    turns = [{"value": Q}, {"value": Y_W}]
    rows = [
        {"image": "a.png", "conversations": turns * 2, "rejected_conversations": turns},
        {"image": "a.png", "conversations": turns, "rejected_conversations": [{"value": "Where?"}, {"value": Y_L}]},
    ]
    _, problems = read_pairs(write(tmp_path, rows))
    assert [p.reason for p in problems] == [
        "not one question and one answer",
        "chosen and rejected answer different questions",
    ]


def test_answer_and_question_the_wrong_way_round(tmp_path):
    """The answer was once trained as the question, with exit status 0."""
    turns = [{"from": "human", "value": Q}, {"from": "gpt", "value": Y_W}]
    row = {"image": "a.png", "conversations": turns[::-1], "rejected_conversations": turns}
    _, (problem,) = read_pairs(write(tmp_path, [row]))
    assert problem.reason == "not one question and one answer"
    assert problem.detail == "the question in conversations is from 'gpt'"


def test_ties_are_left_out_and_counted(tmp_path, capsys):
    def rated(*ratings):
        answers = [{"response": f"r{i}", "annotations": rating(*r)} for i, r in enumerate(ratings)]
        return {"prompt": Q, "img_path": "a.png", "completions": answers}

    tie, one, pair = rated("444", "345"), rated("444", ["N/A"] * 3), rated("111", "555", "555", "111")
    pairs, problems = read_pairs(write(tmp_path, [tie, one, pair, tie], "v.jsonl"))
    assert [(p.row, p.chosen, p.rejected) for p in pairs] == [(3, "r1", "r0")] and not problems  # the first of equals
    out = capsys.readouterr().out
    assert "4 rows" in out and "1 pair; left out: 2 with all ratings equal; left out: 1 with fewer than two" in out


def test_ratings_are_means_not_sums(tmp_path):
    one = {"response": Y_W, "annotations": {"Helpfulness": {"Rating": "5"}}}  # mean 5, sum 5
    three = {"response": Y_L, "annotations": rating("3", "3", "3")}  # mean 3, sum 9
    pairs, _ = read_pairs(write(tmp_path, [{"prompt": Q, "img_path": "a.png", "completions": [three, one]}]))
    assert (pairs[0].chosen, pairs[0].rejected) == (Y_W, Y_L)


def test_unknown_columns_name_what_was_found_and_the_nearest(tmp_path):
    with pytest.raises(SystemExit) as e:
        read_pairs(write(tmp_path, [{"image": "a", "question": Q, "chosen": Y_W, "worse": Y_L}]))
    assert "Found: chosen, image, question, worse" in str(e.value)
    assert "Nearest format: RLAIF-V, lacking rejected" in str(e.value)
    assert "mDPO: chosen, img_path, prompt, rejected" in str(e.value)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.json", "[{", "not readable as .json"),
        ("a.json", "{}", "expected a list of rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "5", "expected a list of rows"),
        ("a.jsonl", "\n{", "broken row"),
        ("a.parquet", "PAR1", "not readable as .parquet"),
    ],
)
def test_unreadable_file(name, content, reason, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=rf"{name}(:2)?: {reason}"):
        read_pairs(tmp_path / name)
    with pytest.raises(SystemExit, match="no such file"):
        read_pairs(tmp_path / "none.json")


def test_jsonl_line_separators_inside_a_text(tmp_path):
    # JSON allows U+2028 and U+0085 raw inside a string: they do not end a row
    text = json.dumps(row(chosen="two\u2028lines\u0085here"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text + "\n\n" + text + "\n", encoding="utf-8")
    pairs, problems = read_pairs(tmp_path / "a.jsonl")
    assert [p.chosen for p in pairs] == ["two\u2028lines\u0085here"] * 2 and not problems


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        read_pairs(tmp_path / "a.parquet")


def test_folder(tmp_path, capsys):
    shards = [write(tmp_path, [row(id=i)], f"train-{i}.parquet") for i in (0, 1)]
    assert [(p.id, p.row) for p in read_pairs(tmp_path)[0]] == [("0", 1), ("1", 2)]  # rows are counted over shards
    write(tmp_path, [row(id="t")], "test-0.parquet")
    write(tmp_path, [{"features": {}}], "dataset_info.json")
    assert [p.id for p in read_pairs(tmp_path)[0]] == ["0", "1"]
    assert "1 other file left alone" in capsys.readouterr().out
    for file in [*shards, tmp_path / "test-0.parquet"]:
        file.unlink()
    with pytest.raises(SystemExit, match="no .json, .jsonl or .parquet"):
        read_pairs(tmp_path)
    write(tmp_path, [row()], "a.json"), write(tmp_path, [row()], "b.json")
    with pytest.raises(SystemExit, match=r"several data files \(a.json, b.json\)"):
        read_pairs(tmp_path)


def test_an_image_root_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="--image-root .*/nowhere: no such folder"):
        read_pairs(write(tmp_path, [row()]), tmp_path / "nowhere")


def test_image_root_may_be_a_link_but_pictures_stay_inside(tmp_path):
    (tmp_path / "real").mkdir(), (tmp_path / "outside.png").touch(), (tmp_path / "real/in.png").touch()
    (tmp_path / "root").symlink_to("real")
    (tmp_path / "real/link.png").symlink_to("in.png"), (tmp_path / "real/out.png").symlink_to("../outside.png")
    rows = [row(image=name) for name in ("in.png", "link.png", "out.png", "../outside.png", "/etc/passwd")]
    rows += [row(image=str(tmp_path / "real/in.png"))]  # absolute, but inside
    pairs, problems = read_pairs(write(tmp_path, rows), tmp_path / "root")
    inside = (tmp_path / "real/in.png").resolve()
    assert [(p.row, p.image) for p in pairs] == [(1, inside), (2, inside), (6, inside)]
    assert [(p.row, p.reason) for p in problems] == [(i, "image path leaves the image folder") for i in (3, 4, 5)]
