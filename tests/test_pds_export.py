"""The exported set: pairs by id, counts that add up, nested sizes, a card, and a step of training on it."""

import json

import pytest
from PIL import Image

import train
from formats.readers import read_pairs
from pds import card, export
from pds.candidates import Rules
from tests.test_pds_rank_images import write
from tests.test_pds_runner import read

TEXTS = ("The boat is red.", "Two dogs\n\nsleep near\r\nan old door.", "A tree stands there.")


def ranked(key: str, *scores, topic="art", texts=TEXTS) -> list[dict]:
    common = {"id": key, "image": f"images/{key}.png", "prompt": f"<image> What is {key}?", "topic": topic}
    return [
        common | {"responder": name, "answer": text, "finish": "eos", "score": score}
        for name, text, score in zip("abc", texts, scores, strict=True)
    ]


@pytest.fixture
def file(tmp_path):
    """Six questions: three pairs, a tie, one with two empty answers, one whose picture is missing."""
    rows = ranked("art-1", 0.1, 0.3, 0.2) + ranked("school-1", 0.3, 0.2, 0.1, topic="school")
    rows += ranked("art-2", 0.2, 0.1, 0.3) + ranked("art-3", 0.5, 0.5, 0.5)
    rows += ranked("art-4", 0.1, 0.2, 0.3, texts=("", " ", TEXTS[0])) + ranked("art-5", 0.1, 0.2, 0.3)
    (tmp_path / "images").mkdir()
    for i, key in enumerate(("art-1", "art-2", "school-1", "art-3", "art-4")):
        Image.new("RGB", (30 + i, 40), (50 * i, 9, 9)).save(tmp_path / "images" / f"{key}.png")
    return write(tmp_path / "ranked.jsonl", rows)


def test_the_pairs(file, tmp_path, capsys):
    export.main([str(file), "--out", str(tmp_path / "set")])
    pairs = {pair["id"]: pair for pair in read(tmp_path / "set" / "pairs.jsonl")}
    assert set(pairs) == {"art-1", "art-2", "school-1"}
    assert pairs["art-1"] == {
        "id": "art-1",
        "image": "images/art-1.png",
        "prompt": "What is art-1?",
        "chosen": TEXTS[1],
        "rejected": TEXTS[0],
        "score_chosen": 0.3,
        "score_rejected": 0.1,
        "responder_chosen": "b",
        "responder_rejected": "a",
    }
    out = capsys.readouterr().out
    assert "3 pairs of 6 questions; dropped: 1 picture, 1 tie, 1 too few" in out
    assert "answers that were no candidates: 2 empty" in out and "art-5: images/art-5.png: missing image" in out


def test_a_question_with_fewer_answers_is_named(file, tmp_path, capsys):
    """The shard of a responder is missing: 2 answers of 3 are left of one question."""
    rows = [row for row in read(file) if (row["id"], row["responder"]) != ("school-1", "b")]
    export.main([str(write(file, rows)), "--out", str(tmp_path / "set")])
    assert "1 question with fewer than 3 answers, such as school-1" in capsys.readouterr().out


def test_both_layouts_are_read_back_as_the_same_pairs(file, tmp_path):
    """Line ends inside an answer survive: the release writes one answer a line, and reads a \\r back as a new one."""
    export.main([str(file), "--out", str(tmp_path / "set")])
    ours, problems = read_pairs(tmp_path / "set" / "pairs.jsonl")
    theirs, more = read_pairs(tmp_path / "set" / "pds-dpo.json")
    assert not problems and not more and len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.prompt, a.chosen, a.rejected, a.image) == (b.id, b.prompt, b.chosen, b.rejected, b.image)
        assert a.image.is_file() and a.image.is_relative_to(tmp_path / "set")
    assert TEXTS[1] in {pair.chosen for pair in ours}
    stored = json.loads((tmp_path / "set" / "pds-dpo.json").read_text())[0]
    assert stored["conversations"][0] == {"from": "human", "value": "<image> What is art-1?"}
    assert stored["rejected_conversations"][0] == stored["conversations"][0]


def test_the_releases_pairs_lose_their_empty_answers():
    """Ten released pairs, as they are: y_l is "" twice and one word once, and DPO would win these for free."""
    rejected = {2: "", 3: "", 4: "сну"}
    rows = []
    for i in range(1, 11):
        for side, score in (("chosen", 1.0), ("rejected", 0.0)):
            text = rejected.get(i, TEXTS[2]) if side == "rejected" else TEXTS[0]
            rows.append(
                {
                    "id": f"art-{i}",
                    "image": "x.jpg",
                    "prompt": "<image> What?",
                    "responder": side,
                    "answer": f"What?  {text}",
                    "score": score,
                }
            )
    found = export.make_pairs(rows, Rules())
    assert [pair["id"] for pair in found.pairs] == [f"art-{i}" for i in (1, 5, 6, 7, 8, 9, 10)]
    assert found.dropped_answers == {"empty": 2, "short": 1} and found.dropped_pairs == {"too few": 3}
    assert {(pair["chosen"], pair["rejected"]) for pair in found.pairs} == {(TEXTS[0], TEXTS[2])}  # without "What?"


def test_nested_sizes_with_balanced_topics():
    pairs = [{"id": f"{topic}-{i}"} for topic, n in (("art", 10), ("school", 4), ("urban", 2)) for i in range(n)]
    topics = {pair["id"]: pair["id"].split("-")[0] for pair in pairs}

    def counts(n, seed=0):
        taken = [pair["id"].split("-")[0] for pair in export.balanced_order(pairs, topics, seed)[:n]]
        return [taken.count(topic) for topic in ("art", "school", "urban")]

    assert counts(3) == [1, 1, 1] and counts(6) == [2, 2, 2] and counts(9) == [4, 3, 2] and counts(16) == [10, 4, 2]
    orders = [
        [pair["id"] for pair in export.balanced_order(own, topics, seed)]
        for own, seed in ((pairs, 0), (pairs[::-1], 0), (pairs, 1))
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_sizes_are_files_that_hold_each_other(file, tmp_path):
    export.main([str(file), "--out", str(tmp_path / "set"), "--sizes", "1", "2"])
    one, two = (read(tmp_path / "set" / f"pairs-{n}.jsonl") for n in (1, 2))
    assert len(one) == 1 and two[:1] == one and {pair["id"][:3] for pair in two} == {"art", "sch"}
    with pytest.raises(SystemExit, match="--sizes 4: there are only 3 pairs"):
        export.main([str(file), "--out", str(tmp_path / "other"), "--sizes", "4"])
    assert not (tmp_path / "other" / "pairs.jsonl").exists()


def test_only_an_earlier_exports_subsets_are_removed(file, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "pairs-7.jsonl").write_text("a user's")  # no export was here
    (out / "pairs-mine.jsonl").write_text("a user's")
    export.main([str(file), "--out", str(out), "--sizes", "1", "2"])
    assert (out / "pairs-7.jsonl").read_text() == "a user's"
    export.main([str(file), "--out", str(out), "--sizes", "1"])
    assert {path.name for path in out.glob("pairs-*")} == {"pairs-1.jsonl", "pairs-mine.jsonl"}


def test_pictures_outside_the_folder_are_no_pairs(file, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path.parent / "secret.png")
    rows = [row | {"image": "../secret.png"} if row["id"] == "art-1" else row for row in read(file)]
    write(file, rows)
    export.main([str(file), "--out", str(tmp_path / "set")])
    assert {pair["id"] for pair in read(tmp_path / "set" / "pairs.jsonl")} == {"art-2", "school-1"}
    assert not list((tmp_path / "set").rglob("secret*"))


def test_the_card_says_where_everything_came_from(file, tmp_path):
    write(tmp_path / "answers.jsonl", [{"id": "x"}, {"id": "y", "error": "HTTP 500"}])
    (tmp_path / "ranked.settings.json").write_text(
        json.dumps(
            {
                "stage": "rank_responses",
                "in": "answers.jsonl",
                "judge": {"model": "RLHFlow/ArmoRM-Llama3-8B-v0.1", "revision": "abc", "weights_sha256": "1"},
            }
        )
    )
    (tmp_path / "answers.settings.json").write_text(
        json.dumps(
            {
                "stage": "responses",
                "in": "questions.jsonl",
                "seed": 3,
                "responders": {"a": {"model": "/home/somebody/my-model", "revision": None, "weights_sha256": "77"}},
            }
        )
    )
    export.main([str(file), "--out", str(tmp_path / "set"), "--min-margin", "0.05"])
    text = (tmp_path / "set" / "README.md").read_text()
    assert text.startswith("---\n") and "data_files: pairs.jsonl" in text
    assert (
        "| responses | answers.jsonl | 2 | 1 | 3 |" in text and "| rank_responses | ranked.jsonl | 18 | 0 | - |" in text
    )
    assert (
        "| rank_responses | RLHFlow/ArmoRM-Llama3-8B-v0.1 | abc | Llama 3 Community" in text and "CC-BY-NC-4.0" in text
    )
    assert "| responses | my-model | weights 77 | not known here" in text and "somebody" not in text
    assert "Questions without a pair: 1 picture, 1 tie, 1 too few" in text and "least margin 0.05" in text
    assert "| school | 1 |" in text


def test_a_chain_of_settings_that_bites_its_tail_ends(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "x"}])
    (tmp_path / "a.settings.json").write_text('{"stage": "loop", "in": "a.jsonl"}')
    assert len(card.chain(tmp_path / "a.jsonl")) == 1


def test_nothing_left_is_said(tmp_path):
    file = write(tmp_path / "r.jsonl", ranked("art-1", 0.1, 0.1, 0.1))
    with pytest.raises(SystemExit, match="no pair is left; dropped: 1 tie"):
        export.main([str(file), "--out", str(tmp_path / "set")])


def test_train_takes_a_step_on_the_export(file, tmp_path, tiny_base):
    export.main([str(file), "--out", str(tmp_path / "set")])
    train.main(
        [
            "--base",
            str(tiny_base),
            "--recipe",
            "pds-dpo",
            "--data",
            str(tmp_path / "set" / "pairs.jsonl"),
            "--out",
            str(tmp_path / "run"),
            "--batch",
            "3",
            "--epochs",
            "1",
            "--max-steps",
            "1",
            "--workers",
            "0",
            "--lora-r",
            "2",
        ]
    )
    [line] = read(tmp_path / "run" / "log.jsonl")
    assert line["loss"] == pytest.approx(0.6931, abs=1e-3)
