"""Each benchmark's rows by hand; unknown files are said to be unknown; a bad question is named and stops all."""

import base64
import io
import json
import re

import pytest
from PIL import Image

import eval_chair
from evals import amber, answers, mmhal, pope, questions


def jpeg(colour=(200, 10, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def make(tmp_path, benchmark: str, rows, *more) -> list[dict]:
    (tmp_path / "out" / "q.jsonl").unlink(missing_ok=True)
    file = tmp_path / "official.json"
    file.write_text(
        json.dumps(rows) if "amber" in benchmark or benchmark == "mmhal" else "\n".join(map(json.dumps, rows))
    )
    questions.main([benchmark, str(file), "--out", str(tmp_path / "out" / "q.jsonl"), *more])
    return [json.loads(line) for line in (tmp_path / "out" / "q.jsonl").read_text().splitlines()]


def without_source(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "source"} for row in rows]


POPE = [
    {
        "question_id": i,
        "image": f"COCO_val2014_{i:012d}.jpg",
        "text": f"Is there a {what} in the image?",
        "label": label,
    }
    for i, what, label in ((1, "dog", "yes"), (2, "car", "no"))
]
MMHAL = [
    {
        "question_type": "attribute",
        "image_src": f"https://c4.example.com/8/72/{i}_o.jpg",
        "question": f"Which {i}?",
        "image_content": ["Vase"],
        "gt_answer": "A",
        "model_answer": "",
    }
    for i in range(96)
]


def test_pope(tmp_path):
    rows = make(tmp_path, "pope", POPE)
    assert without_source(rows) == [
        {
            "id": 1,
            "image": "COCO_val2014_000000000001.jpg",
            "question_id": 1,
            "label": "yes",
            "prompt": "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
        },
        {
            "id": 2,
            "image": "COCO_val2014_000000000002.jpg",
            "question_id": 2,
            "label": "no",
            "prompt": "Is there a car in the image?\nAnswer the question using a single word or phrase.",
        },
    ]
    answers = [row | {"answer": "Yes", "_where": "here"} for row in rows]
    labels = [label | {"_where": "there"} for label in POPE]
    assert [row["answer"] for row in pope.match(answers[::-1], labels)] == ["Yes", "Yes"]


def test_amber(tmp_path):
    generative = make(
        tmp_path, "amber-generative", [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
    )
    assert without_source(generative) == [{"id": 1, "image": "AMBER_1.jpg", "prompt": "Describe this image."}]
    asked = {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}
    [row] = make(tmp_path, "amber-discriminative", [asked])
    assert row["prompt"] == "Is the sky sunny in this image?\nAnswer with one word, Yes or No." and row["id"] == 1005
    assert amber.first_word("yes.") == "Yes"  # what the suffix asks for is what the scorer takes


def test_mmhal(tmp_path):
    rows = make(tmp_path, "mmhal", MMHAL)
    assert without_source(rows)[3] == {"id": 3, "image": "3_o.jpg", "prompt": "Which 3?", "question_type": "attribute"}
    mmhal.match([row | {"answer": "A", "_where": "here"} for row in rows], MMHAL)


def test_object_halbench_writes_the_pictures_as_they_are(tmp_path, capsys):
    picture = jpeg()
    stored = [
        {"org_idx": 7, "image_id": 339761, "question": "What is it?", "image": base64.b64encode(picture).decode()}
    ]
    [row] = make(tmp_path, "objhal", stored)
    assert without_source([row]) == [
        {"id": 339761, "image": "images/COCO_val2014_000000339761.jpg", "prompt": "What is it?", "image_id": 339761}
    ]
    assert (tmp_path / "out" / row["image"]).read_bytes() == picture
    assert eval_chair.image_id(row) == 339761
    found, paths = questions.read_questions(tmp_path / "out" / "q.jsonl", None)
    assert list(found) == ["339761"] and paths["339761"].is_file()


@pytest.mark.parametrize(
    "image, reason",
    [
        (base64.b64encode(jpeg()[:60]).decode(), "broken image"),
        ("not base64!", "base64|Only"),
        (None, "cannot be used"),
    ],
)
def test_object_halbench_with_a_broken_picture_writes_nothing(tmp_path, image, reason):
    good = {"image_id": 1, "question": "q", "image": base64.b64encode(jpeg()).decode()}
    with pytest.raises(SystemExit, match=rf"official.json:2: .*({reason})"):
        make(tmp_path, "objhal", [good, good | {"image_id": 2, "image": image}])
    assert not (tmp_path / "out").exists()


def test_an_unknown_file_is_marked_in_every_row_or_refused(tmp_path, capsys, monkeypatch):
    rows = make(tmp_path, "pope", POPE)
    assert "not a published version of pope" in capsys.readouterr().out
    assert all(row["source"].startswith("pope, UNKNOWN VERSION, sha256 ") for row in rows)
    with pytest.raises(SystemExit, match="not a published version.*github.com/RUCAIBox/POPE"):
        make(tmp_path, "pope", POPE, "--strict")
    # sha256 of "hello"; and what `git hash-object` says of it
    for known in (
        "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0",
    ):
        monkeypatch.setitem(questions.OFFICIAL, "pope", ({known: "the one"}, "somewhere", ""))
        (tmp_path / "hello").write_text("hello")
        assert questions.version("pope", tmp_path / "hello", True) == "pope, the one, sha256 2cf24dba5fb0a30e"


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.json: no such file. The official one: .*AMBER"):
        questions.main(["amber-generative", str(tmp_path / "nowhere.json"), "--out", str(tmp_path / "q.jsonl")])
    with pytest.raises(SystemExit, match="official.json:2: no 'label'; is this the file of pope"):
        make(tmp_path, "pope", [POPE[0], {k: v for k, v in POPE[1].items() if k != "label"}])
    with pytest.raises(SystemExit) as e:
        questions.main(["pope", "x", "--out", "y", "--prompt", "z"])
    assert e.value.code == 2


def test_a_folder_of_pictures(tmp_path):
    for name in ("b.JPG", "sub/a.png", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jpeg())
    questions.main(["folder", str(tmp_path / "in"), "--prompt", "What?", "--out", str(tmp_path / "q.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert without_source(rows) == [
        {"id": "b.JPG", "image": "b.JPG", "prompt": "What?"},
        {"id": "sub/a.png", "image": "sub/a.png", "prompt": "What?"},
    ]
    assert len(questions.read_questions(tmp_path / "q.jsonl", tmp_path / "in").rows) == 2
    with pytest.raises(SystemExit, match="no pictures"):
        questions.main(["folder", str(tmp_path / "out"), "--prompt", "What?", "--out", str(tmp_path / "q.jsonl")])


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image": "gone.png"}, "gone.png: missing image"),
        ({"image": "text.png"}, "text.png: broken image"),
        ({"image": "../a.png"}, "image path leaves the image folder"),
        ({"image": None}, "no image"),
        ({"image": 3}, "no image"),
        ({"prompt": " "}, "no prompt"),
        ({"prompt": "<image> and <image>"}, "several <image>"),
        ({"id": None}, "no id"),
        ({"prompt": "\ud800"}, "half a surrogate"),
        ({"image": "loop.png"}, "loop.png"),
        ({"id": "1"}, "this id was there before: .*q.jsonl:1"),
        ({"answer": "x"}, "name of one that is added.*answer"),
    ],
)
def test_a_bad_question_stops_before_anything_is_generated(tmp_path, change, reason):
    """The message has file, row, id and reason; a good question beside it does not help."""
    (tmp_path / "a.png").write_bytes(jpeg())
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    good = {"id": 1, "image": "a.png", "prompt": "q"}
    rows = [good, {"id": "x", "image": "a.png", "prompt": "q"} | change]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as e:
        questions.read_questions(tmp_path / "q.jsonl", None)
    first, last = str(e.value).splitlines()
    row_id = rows[1]["id"]
    assert f"q.jsonl:2: id {row_id}: " in first and re.search(reason, first), first
    assert last.startswith("1 of 2 questions cannot be asked; nothing was generated")


def test_what_was_begun_with_a_broken_line_inside_is_named(tmp_path):
    (tmp_path / "a.settings.json").write_text("{}")
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "answer": "\xff"}\n{"id": 2}\n')
    with pytest.raises(SystemExit, match="a.jsonl:1: broken JSON"):
        answers.read_partial(tmp_path / "a.jsonl", {"1": {"id": 1}}, {})
    (tmp_path / "a.settings.json").unlink()
    with pytest.raises(SystemExit, match="a.settings.json: no such file"):
        answers.read_partial(tmp_path / "a.jsonl", {"1": {"id": 1}}, {})


def test_a_question_answered_twice_is_named(tmp_path):
    (tmp_path / "a.settings.json").write_text("{}")
    rows = [{"id": 1, "answer": text, "n_tokens": 1, "finish": "eos"} for text in "xy"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="a.jsonl:2: id 1 is there twice"):
        answers.read_partial(tmp_path / "a.jsonl", {"1": {"id": 1}}, {})


def test_questions_that_are_there_are_not_replaced_by_others(tmp_path):
    out = tmp_path / "out" / "q.jsonl"
    make(tmp_path, "pope", POPE)
    before = out.read_bytes()
    questions.main(["pope", str(tmp_path / "official.json"), "--out", str(out)])  # the same ones are no harm
    (tmp_path / "official.json").write_text(json.dumps(POPE[1]))
    with pytest.raises(SystemExit, match="q.jsonl: holds other questions already"):
        questions.main(["pope", str(tmp_path / "official.json"), "--out", str(out)])
    assert out.read_bytes() == before
